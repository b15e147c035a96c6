"""Limit of a sum over concurrent tasks."""

import asyncio

import pytest

from hfvit.serve.batching import Budget


def test_budget_is_never_exceeded_and_all_tasks_get_their_part():
    budget = Budget(10)
    taken = []

    async def task(amount: int) -> None:
        async with budget.take(amount):
            taken.append(budget.limit - budget.free)
            await asyncio.sleep(0.001)

    async def run() -> None:
        await asyncio.gather(*map(task, [4, 7, 10, 1, 3] * 8))

    asyncio.run(run())
    assert len(taken) == 40
    assert max(taken) == 10
    assert budget.free == 10


def test_budget_is_free_again_after_an_error_and_a_cancelled_wait():
    budget = Budget(10)

    async def fail() -> None:
        async with budget.take(6):
            await asyncio.sleep(0.01)
            raise ValueError

    async def wait() -> None:
        async with budget.take(6):
            raise AssertionError

    async def run() -> None:
        failing, waiting = asyncio.create_task(fail()), asyncio.create_task(wait())
        await asyncio.sleep(0.001)
        waiting.cancel()
        with pytest.raises(ValueError):  # noqa: PT011
            await failing
        with pytest.raises(asyncio.CancelledError):
            await waiting
        async with budget.take(10):
            assert budget.free == 0

    asyncio.run(run())
    assert budget.free == 10
