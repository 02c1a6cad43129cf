"""Work beside a kernel's loop: results, errors and stops arrive in the loop, and nowhere else."""

import asyncio
import threading

import pytest

from goatviz.explore.task import Cancelled, Task, run_beside, running_loop


def run(compute, *, stop_after=None):
    """What report and end were called with, and in which threads."""

    async def inside():
        reports, ended, threads = [], asyncio.Event(), set()
        found = []

        def report(share):
            reports.append(share)
            threads.add(threading.current_thread())
            if stop_after is not None and share >= stop_after:
                task.stop()

        def end(result, error):
            found.append((result, error))
            threads.add(threading.current_thread())
            ended.set()

        task = Task()
        run_beside(asyncio.get_running_loop(), task, compute, report, end)
        await asyncio.wait_for(ended.wait(), 30)
        return reports, found, threads

    reports, found, threads = asyncio.run(inside())
    assert threads <= {threading.current_thread()}
    assert len(found) == 1
    return reports, found[0]


def test_a_result_and_its_progress():
    def compute(task):
        for part in range(1000):
            task(part / 1000)
        return "done"

    reports, (result, error) = run(compute)
    assert (result, error) == ("done", None)
    assert reports == sorted(reports) and 50 <= len(reports) <= 100


def test_an_error_is_handed_over():
    def compute(task):
        raise ValueError("no")

    _, (result, error) = run(compute)
    assert result is None and isinstance(error, ValueError)


def test_what_is_stopped_ends_without_result_or_error():
    seen = threading.Event()

    def compute(task):
        for part in range(100_000):
            if task.stopped:
                seen.set()
            task(part / 100_000)
            threading.Event().wait(0.001)
        return "never"

    _, ended = run(compute, stop_after=0.02)
    assert ended == (None, None)


def test_a_task_without_a_loop():
    shares = []
    task = Task(shares.append)
    task(0.3)
    task(7)
    task.stop()
    with pytest.raises(Cancelled):
        task(0.5)
    assert shares == [0.3, 1.0] and task.stopped
    assert running_loop() is None
