"""Work that can be stopped, beside a kernel's loop, whose thread alone hears of it, or in steps.

A job's results, errors and stops arrive in the loop; steps are taken between its messages or at
once, stopped and continued, and keep their error.
"""

import asyncio
import threading

import pytest

from goatviz.explore.jobs import Cancelled, Job, Newest, Steps, running_loop


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


def counted(seen, count=4, fails_at=None):
    for number in range(count):
        if number == fails_at:
            raise ValueError("no such step")
        seen.append(number)
        yield (number + 1) / count
    return "result"


def test_at_once():
    seen = []
    steps = Steps(counted(seen))
    assert not steps.done and not steps.running
    assert steps.finish() == "result" == steps.finish()
    assert seen == [0, 1, 2, 3] and steps.done and steps.share == 1.0


def test_a_loop_does_other_work_between_two_steps():
    seen, shares, ends = [], [], []

    async def main():
        steps = Steps(counted(seen))
        steps.start(asyncio.get_running_loop(), shares.append, ends.append)
        steps.start(asyncio.get_running_loop(), shares.append, ends.append)
        assert steps.running and seen == []
        while not ends:
            before = len(seen)
            await asyncio.sleep(0)
            assert len(seen) - before <= 1
        assert not steps.running and steps.done

    asyncio.run(main())
    assert seen == [0, 1, 2, 3] and shares == [0.25, 0.5, 0.75, 1.0] and ends == [None]


def test_what_was_stopped_goes_on_where_it_was():
    seen, ends = [], []

    async def main():
        loop = asyncio.get_running_loop()
        steps = Steps(counted(seen))
        steps.start(loop, lambda share: steps.stop() if share == 0.5 else None, ends.append)
        await asyncio.sleep(0.1)
        assert seen == [0, 1] and not steps.running and not steps.done and ends == []
        steps.start(loop, lambda share: None, ends.append)
        while not ends:
            await asyncio.sleep(0.01)
        assert steps.finish() == "result"

    asyncio.run(main())
    assert seen == [0, 1, 2, 3]


def test_whoever_needs_the_result_finishes_what_a_loop_began():
    seen, ends = [], []

    async def main():
        steps = Steps(counted(seen))
        steps.start(asyncio.get_running_loop(), lambda share: None, ends.append)
        await asyncio.sleep(0)
        assert steps.finish() == "result" and ends == []
        while not ends:
            await asyncio.sleep(0.01)

    asyncio.run(main())
    assert seen == [0, 1, 2, 3] and ends == [None]


def test_an_error_is_kept_and_raised_again():
    seen, ends = [], []

    async def main():
        steps = Steps(counted(seen, fails_at=2))
        for _ in range(2):
            steps.start(asyncio.get_running_loop(), lambda share: None, ends.append)
            while steps.running:
                await asyncio.sleep(0.01)
        with pytest.raises(ValueError, match="no such step"):
            steps.finish()

    asyncio.run(main())
    assert [str(error) for error in ends] == ["no such step"] * 2 and seen == [0, 1]
