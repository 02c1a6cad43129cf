"""Work in steps on the kernel's own thread, between its other work.

For work that must not run in another thread: if a cell ran the same model during a watched forward
pass, the calls of both would be recorded.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

T = TypeVar("T")

#: Seconds between two steps, in which the kernel answers its messages.
PAUSE = 0.01


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
