"""Work that reports its progress and can be stopped, while the kernel answers its messages.

A `Job` runs in a thread of its own; `Steps` are taken by the kernel's loop, for work that must not
run beside a cell: the calls of a model that a cell runs during a watched forward pass would be
recorded too. Only the kernel's own loop touches widgets.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

#: Seconds between two steps, in which the kernel answers its messages.
PAUSE = 0.01


class Cancelled(Exception):
    """Raised inside a computation that was stopped."""


class Job:
    """One computation: calling it reports a share in [0, 1], or raises after it was stopped.

    Parameters
    ----------
    report : callable, optional
        Function called with the share.

    Examples
    --------
    >>> job = Job(print)
    >>> job(0.5)
    0.5
    >>> job.stop()
    >>> job(0.6)
    Traceback (most recent call last):
    goatviz.explore.jobs.Cancelled
    """

    def __init__(self, report: Callable[[float], None] | None = None) -> None:
        self._stopped = threading.Event()
        self.report = report

    def stop(self) -> None:
        """Make the next report raise `Cancelled`."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        """Whether it was told to stop."""
        return self._stopped.is_set()

    def __call__(self, share: float) -> None:
        if self._stopped.is_set():
            raise Cancelled
        if self.report is not None:
            self.report(min(max(float(share), 0.0), 1.0))


class Newest:
    """Work beside the kernel's own, one computation at a time: a new one stops the one before.

    Parameters
    ----------
    report : callable
        Called by the loop with the share that is done, and with -1 when nothing is being computed.
    """

    def __init__(self, report: Callable[[float], None]) -> None:
        self._report = report
        self._job: Job | None = None

    def start(
        self,
        loop: asyncio.AbstractEventLoop,
        compute: Callable[[Job], T],
        end: Callable[[T | None, Exception | None], None],
    ) -> None:
        """Compute in a thread, and stop what was being computed.

        Parameters
        ----------
        loop : asyncio.AbstractEventLoop
            Event loop of the caller, which calls `end` and at most a hundred times `report`.
        compute : callable
            Function of a job that computes the result.
        end : callable
            Function of the result and the exception, one of which is None; both are None if the
            job was stopped.
        """
        self.stop()
        job = Job()
        self._job = job
        self._report(0.0)
        reached = [0.0]

        def report(share: float) -> None:
            if self._job is job:
                self._report(share)

        def forward(share: float) -> None:
            if share - reached[0] >= 0.01:
                reached[0] = share
                loop.call_soon_threadsafe(report, share)

        def finish(result: T | None, error: Exception | None) -> None:
            if self._job is not job:
                end(None, None)
                return
            self._job = None
            self._report(-1.0)
            end(result, error)

        def work() -> None:
            result: Any = None
            problem: Exception | None = None
            try:
                result = compute(job)
            except Cancelled:
                pass
            except Exception as error:  # noqa: BLE001 - handed to whoever asked
                problem = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(finish, result, problem)

        job.report = forward
        threading.Thread(target=work, daemon=True, name="goatviz explorer").start()

    def stop(self) -> None:
        """Stop what is being computed, if anything is."""
        if self._job is not None:
            self._job.stop()
            self._job = None
            self._report(-1.0)


class Steps(Generic[T]):
    """A generator that is run to its end, by a loop or at once; it can be stopped and resumed.

    Parameters
    ----------
    steps : generator
        Generator that yields the share that is done, in [0, 1], and returns the result. An error
        ends it.

    Examples
    --------
    >>> def halves():
    ...     yield 0.5
    ...     return "done"
    >>> Steps(halves()).finish()
    'done'
    """

    def __init__(self, steps: Generator[float, None, T]) -> None:
        self._steps = steps
        self._result: list[T] = []
        self._error: Exception | None = None
        self.share = 0.0
        # Messages of a page may be answered in another thread than the loop's.
        self._step_lock = threading.Lock()
        self._state_lock = threading.RLock()
        self._turn = 0
        self._running = False

    @property
    def running(self) -> bool:
        """Whether a loop will take the next step."""
        return self._running

    @property
    def done(self) -> bool:
        """Whether the result is there."""
        return bool(self._result)

    def finish(self) -> T:
        """Take all remaining steps now and return the result, or raise the steps' error."""
        while not self._result:
            self._step()
        return self._result[0]

    def start(
        self,
        loop: asyncio.AbstractEventLoop,
        report: Callable[[float], None],
        end: Callable[[Exception | None], None],
    ) -> None:
        """Have the loop take the steps, in its thread.

        Parameters
        ----------
        loop : asyncio.AbstractEventLoop
            Event loop of the kernel.
        report : callable
            Function that the loop calls with the share after every step but the last.
        end : callable
            Function that the loop calls once: with None when the result is there, or with the
            error.
        """
        with self._state_lock:
            if not self._running:
                self._running = True
                self._turn += 1
                loop.call_soon_threadsafe(self._go_on, self._turn, loop, report, end)

    def stop(self) -> None:
        """Take no further step until it is started again."""
        with self._state_lock:
            self._running = False
            self._turn += 1

    def _go_on(
        self,
        turn: int,
        loop: asyncio.AbstractEventLoop,
        report: Callable[[float], None],
        end: Callable[[Exception | None], None],
    ) -> None:
        if turn != self._turn:
            return
        problem: Exception | None = None
        try:
            self._step()
        except Exception as error:  # noqa: BLE001 - handed on
            problem = error
        with self._state_lock:
            if turn != self._turn:
                return
            if problem is None and not self._result:
                report(self.share)
                loop.call_later(PAUSE, self._go_on, turn, loop, report, end)
                return
            self._running = False
        end(problem)

    def _step(self) -> None:
        """Take the next step, unless another thread has taken the last one in the meantime."""
        with self._step_lock:
            if self._result:
                return
            if self._error is not None:
                raise self._error
            try:
                self.share = next(self._steps)
            except StopIteration as end:
                self._result.append(end.value)
            except Exception as error:
                self._error = error
                raise


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The kernel's loop, or None outside one."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
