"""Work beside a kernel's loop: results, errors and stops arrive in the loop, and nowhere else."""

import asyncio
import threading

import pytest

from goatviz.explore.jobs import Cancelled, Job, Newest, running_loop


def run(compute, *, stop_after=None):
    """What report and end were called with, and in which threads."""

    async def inside():
        reports, ended, threads = [], asyncio.Event(), set()
        found = []

        def report(share):
            reports.append(share)
            threads.add(threading.current_thread())
            if stop_after is not None and share >= stop_after:
                work.stop()

        def end(result, error):
            found.append((result, error))
            threads.add(threading.current_thread())
            ended.set()

        work = Newest(report)
        work.start(asyncio.get_running_loop(), compute, end)
        await asyncio.wait_for(ended.wait(), 30)
        return reports, found, threads

    reports, found, threads = asyncio.run(inside())
    assert threads <= {threading.current_thread()}
    assert len(found) == 1
    return reports, found[0]


def test_a_result_and_its_progress():
    def compute(job):
        for part in range(1000):
            job(part / 1000)
        return "done"

    reports, (result, error) = run(compute)
    assert (result, error) == ("done", None)
    assert reports[-1] == -1 and reports[:-1] == sorted(reports[:-1]) and 50 <= len(reports) <= 100


def test_an_error_is_handed_over():
    def compute(job):
        raise ValueError("no")

    _, (result, error) = run(compute)
    assert result is None and isinstance(error, ValueError)


def test_what_is_stopped_ends_without_result_or_error():
    seen = threading.Event()

    def compute(job):
        for part in range(100_000):
            if job.stopped:
                seen.set()
            job(part / 100_000)
            threading.Event().wait(0.001)
        return "never"

    _, ended = run(compute, stop_after=0.02)
    assert ended == (None, None)


def test_a_job_without_a_loop():
    shares = []
    job = Job(shares.append)
    job(0.3)
    job(7)
    job.stop()
    with pytest.raises(Cancelled):
        job(0.5)
    assert shares == [0.3, 1.0] and job.stopped
    assert running_loop() is None
