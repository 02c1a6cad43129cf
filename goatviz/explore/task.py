"""Work that reports its progress and can be stopped, beside the kernel's own work.

Threads compute; only the kernel's own loop touches widgets.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Cancelled(Exception):
    """Raised inside a computation that was stopped."""


class Task:
    """One computation: calling it reports a share in [0, 1], or raises after it was stopped.

    Parameters
    ----------
    report : callable, optional
        Function called with the share.

    Examples
    --------
    >>> task = Task(print)
    >>> task(0.5)
    0.5
    >>> task.stop()
    >>> task(0.6)
    Traceback (most recent call last):
    goatviz.explore.task.Cancelled
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


def run_beside(
    loop: asyncio.AbstractEventLoop,
    task: Task,
    compute: Callable[[Task], T],
    report: Callable[[float], None],
    end: Callable[[T | None, Exception | None], None],
) -> None:
    """Compute in a thread; `report` and `end` are called by the loop.

    Parameters
    ----------
    loop : asyncio.AbstractEventLoop
        Event loop of the caller.
    task : Task
        Task that `compute` gets; at most a hundred of its reports go to `report`.
    compute : callable
        Function that computes the result, in a thread.
    report : callable
        Function called with the share that is done.
    end : callable
        Function called with the result and the exception, one of which is None; with None for both
        if the task was stopped.
    """
    reached = [0.0]

    def forward(share: float) -> None:
        if share - reached[0] >= 0.01:
            reached[0] = share
            loop.call_soon_threadsafe(report, share)

    def work() -> None:
        result: Any = None
        problem: Exception | None = None
        try:
            result = compute(task)
        except Cancelled:
            pass
        except Exception as error:  # noqa: BLE001 - handed to whoever asked
            problem = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(end, result, problem)

    task.report = forward
    threading.Thread(target=work, daemon=True, name="goatviz explorer").start()


class Newest:
    """Work beside the kernel's own, one computation at a time: a new one stops the one before.

    Parameters
    ----------
    report : callable
        Called by the loop with the share that is done, and with -1 when nothing is being computed.
    """

    def __init__(self, report: Callable[[float], None]) -> None:
        self._report = report
        self._task: Task | None = None

    def start(
        self,
        loop: asyncio.AbstractEventLoop,
        compute: Callable[[Task], T],
        end: Callable[[T | None, Exception | None], None],
    ) -> None:
        """Compute in a thread; as `run_beside`, but a stopped task has neither result nor error."""
        self.stop()
        self._task = task = Task()
        self._report(0.0)

        def report(share: float) -> None:
            if self._task is task:
                self._report(share)

        def finish(result: T | None, error: Exception | None) -> None:
            if self._task is not task:
                end(None, None)
                return
            self._task = None
            self._report(-1.0)
            end(result, error)

        run_beside(loop, task, compute, report, finish)

    def stop(self) -> None:
        """Stop what is being computed, if anything is."""
        if self._task is not None:
            self._task.stop()
            self._task = None
            self._report(-1.0)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The kernel's loop, or None outside one."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
