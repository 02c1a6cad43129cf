"""Work in steps on the kernel's own thread, between whatever else it does.

For what must not run in a thread: a forward pass that is watched while another cell runs the same
model would be watched with that cell's.
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
    """A generator that is run to its end, by a loop or at once; stopped, it can go on later.

    Parameters
    ----------
    steps : generator
        Yields the share that is done, in [0, 1], and returns what is wanted. An error ends it.

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
        # A page's messages may be answered by another thread than the loop's.
        self._taking = threading.Lock()
        self._ruling = threading.RLock()
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
        """Take all steps that are left now, and return the result; an error is raised again."""
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
        report : callable
            Called by the loop with the share after every step, but the last.
        end : callable
            Called by the loop once: with None when the result is there, or with the error.
        """
        with self._ruling:
            if not self._running:
                self._running = True
                self._turn += 1
                loop.call_soon_threadsafe(self._go_on, self._turn, loop, report, end)

    def stop(self) -> None:
        """Take no further step until somebody starts again."""
        with self._ruling:
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
        with self._ruling:
            if turn != self._turn:
                return
            if problem is None and not self._result:
                report(self.share)
                loop.call_later(PAUSE, self._go_on, turn, loop, report, end)
                return
            self._running = False
        end(problem)

    def _step(self) -> None:
        """The next step, unless somebody else took the last one meanwhile."""
        with self._taking:
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
