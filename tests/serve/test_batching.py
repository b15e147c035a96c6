"""Dynamic batches, and the limit of a sum over concurrent tasks."""

import asyncio
import gc
import threading
import weakref

import numpy as np
import pytest

from hfvit.serve.batching import Budget, DynamicBatcher, QueueFullError


class Model:
    """Model that returns twice its values, fails on negative ones, and can be held up."""

    def __init__(self, largest: int = 100):
        self.largest = largest
        self.batches: list[list] = []
        self.may_run = threading.Event()
        self.may_run.set()

    def __call__(self, values: list) -> np.ndarray:
        self.batches.append(values)
        assert self.may_run.wait(10)
        if min(values) < 0 or len(values) > self.largest:
            raise ValueError(values)
        return 2 * np.array(values)


def run_with(model, test, max_batch_size=8, max_delay=0.0, queue_size=100, **options):
    """Run `test`, a coroutine function of a batcher."""

    async def run() -> None:
        batcher = DynamicBatcher(
            model, max_batch_size=max_batch_size, max_delay=max_delay, queue_size=queue_size, **options
        )
        async with batcher, asyncio.timeout(20):
            await test(batcher)
        assert batcher.reserved == batcher.submitted == 0

    asyncio.run(run())


async def ask(batcher: DynamicBatcher, *values) -> list:
    """Submit the images of one request, and return its rows or errors."""
    with batcher.reservation() as places:
        places.add(len(values))
        return await asyncio.gather(*map(places.submit, values), return_exceptions=True)


async def started(model: Model, batches: int) -> None:
    """Wait until a number of batches have begun."""
    while len(model.batches) < batches:
        await asyncio.sleep(0.001)


def test_batches_hold_what_arrived_while_the_last_one_ran():
    model = Model()

    async def test(batcher):
        model.may_run.clear()
        first = asyncio.create_task(ask(batcher, 0))
        await started(model, 1)
        others = [asyncio.create_task(ask(batcher, value, value + 100)) for value in range(1, 6)]
        await asyncio.sleep(0)
        model.may_run.set()
        assert await first == [0]
        assert await asyncio.gather(*others) == [[2 * value, 2 * value + 200] for value in range(1, 6)]

    run_with(model, test)
    assert [len(batch) for batch in model.batches] == [1, 8, 2]


def test_image_waits_only_for_others_that_are_on_their_way():
    model = Model()

    async def test(batcher):
        assert await ask(batcher, 1) == [2]  # at once
        with batcher.reservation() as reading:
            reading.add(1)
            one = asyncio.create_task(ask(batcher, 2))
            await asyncio.sleep(0.05)
            assert len(model.batches) == 1
            assert await reading.submit(3) == 6
            assert await one == [4]

    run_with(model, test, max_delay=10.0)
    assert model.batches == [[1], [2, 3]]


def test_image_that_the_model_fails_on_fails_alone():
    model = Model()
    measured = []

    async def test(batcher):
        answers = await asyncio.gather(*(ask(batcher, value) for value in (0, 1, 2, -3, 4, 5)))
        assert [answer[0] for answer in answers if not isinstance(answer[0], Exception)] == [0, 2, 4, 8, 10]
        assert isinstance(answers[3][0], ValueError)
        assert batcher.is_running

    run_with(model, test, max_delay=0.05, on_batch=lambda size, seconds: measured.append(size))
    assert len(model.batches[0]) == 6
    assert sum(measured) == 5


def test_batch_that_takes_too_much_memory_is_divided():
    model = Model(largest=2)

    async def test(batcher):
        assert await ask(batcher, *range(8)) == [2 * value for value in range(8)]

    run_with(model, test)
    assert [len(batch) for batch in model.batches] == [8, 4, 2, 2, 4, 2, 2]


def test_result_of_the_wrong_length_is_an_error_and_the_batcher_goes_on():
    async def test(batcher):
        assert isinstance((await ask(batcher, 1))[0], ValueError)
        assert isinstance((await ask(batcher, 1))[0], ValueError)
        assert batcher.is_running

    run_with(lambda values: np.zeros(len(values) + 1), test)


def test_abandoned_images_take_no_memory_and_no_place_in_a_batch():
    class Value(float):
        pass

    model = Model()

    async def test(batcher):
        model.may_run.clear()
        first = asyncio.create_task(ask(batcher, 0))
        await started(model, 1)
        values = [Value(value) for value in range(1, 8)]
        known = [weakref.ref(value) for value in values]
        abandoned = [asyncio.create_task(ask(batcher, value)) for value in values]
        await asyncio.sleep(0)
        assert all(task.cancel() for task in abandoned)
        await asyncio.gather(*abandoned, return_exceptions=True)
        values.clear()
        abandoned.clear()
        await asyncio.sleep(0)
        gc.collect()
        assert [reference() for reference in known] == [None] * 7
        others = [asyncio.create_task(ask(batcher, value)) for value in range(10, 14)]
        await asyncio.sleep(0)
        model.may_run.set()
        await asyncio.gather(first, *others)

    run_with(model, test, max_batch_size=4)
    assert model.batches == [[0], [10, 11, 12, 13]]


def test_full_queue_says_when_it_has_been_worked_off():
    model = Model()

    async def test(batcher):
        with batcher.reservation() as places:
            places.add(4)
            with pytest.raises(QueueFullError) as full:
                places.add(1)
            assert full.value.retry_after == 1  # unknown
        model.may_run.clear()
        threading.Timer(0.6, model.may_run.set).start()
        await ask(batcher, 1)
        with batcher.reservation() as places, batcher.reservation() as other:
            places.add(4)
            with pytest.raises(QueueFullError) as full:
                other.add(1)
        assert full.value.retry_after in (3, 4)  # four times 0.6 s or a little more

    run_with(model, test, queue_size=4)


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
