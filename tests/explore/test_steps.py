"""Work in steps: between messages of a loop or at once, stopped and continued, errors kept."""

import asyncio

import pytest

from goatviz.explore.jobs import Steps


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
