"""Tasks that begin others: the error of the first one that fails is raised as it is, and nothing is left running."""

import asyncio

import pytest

from fipo_megatron.rollout.group_sampler import _tasks


class FirstError(Exception):
    pass


async def sleep_for_ever():
    await asyncio.sleep(3600)


def test_a_task_may_begin_others_and_all_are_waited_for():
    done = []

    async def count(begin, left):
        await asyncio.sleep(0)
        done.append(left)
        if left:
            begin(count(begin, left - 1))

    async def run():
        async with _tasks() as begin:
            begin(count(begin, 5))

    asyncio.run(run())
    assert done == [5, 4, 3, 2, 1, 0]


def test_the_first_error_is_raised_with_its_cause_although_another_task_begins_one():
    async def fail():
        await asyncio.sleep(0)
        raise FirstError("first") from ValueError("cause")

    async def begin_late(begin):
        try:
            await sleep_for_ever()
        finally:
            begin(sleep_for_ever())

    async def run():
        async with _tasks() as begin:
            begin(begin_late(begin))
            begin(fail())

    with pytest.raises(FirstError, match="first") as raised:
        asyncio.run(run())
    assert isinstance(raised.value.__cause__, ValueError)


def test_a_cancellation_stays_one_although_a_task_fails_meanwhile():
    async def fail_when_cancelled():
        try:
            await sleep_for_ever()
        except asyncio.CancelledError:
            raise FirstError from None

    async def block():
        async with _tasks() as begin:
            begin(fail_when_cancelled())

    async def run():
        task = asyncio.create_task(block())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
