"""How images that wait become runs."""

import time
from collections.abc import Sequence
from typing import Any

import pytest

from diffopt.errors import Cancelled
from diffopt.serving.batcher import Batcher, Batching, Job, Refused
from tests.serving.fake_engine import FakeEngine, wait_until


def jobs(count: int, first: int = 0, **more: Any) -> list[Job]:
    return [Job({"seed": first + k, **more}) for k in range(count)]


def batcher(engine: FakeEngine, **batching: Any) -> Batcher:
    low, high = engine.batch or (1, 1)
    return Batcher(
        engine.serve,
        Batching(**{"low": low, "high": high, "wait": 0.05, **batching}),
        end=engine.cancel,
    )


def sizes(engine: FakeEngine) -> list[int]:
    return [len(run) for run in engine.runs]


def results(waiting: Sequence[Job]) -> list[Any]:
    return [job.result.result(5).images[0].getpixel((0, 0))[0] for job in waiting]


def test_images_that_wait_share_a_run() -> None:
    engine = FakeEngine((1, 4))
    queue = batcher(engine)
    first, second = jobs(1), jobs(2, 5)
    queue.submit(first)
    queue.submit(second)
    assert results([*first, *second]) == [0, 5, 6]
    assert sizes(engine) == [3]
    wait_until(lambda: queue.is_idle)


def test_a_full_batch_does_not_wait() -> None:
    engine = FakeEngine((1, 4))
    queue = batcher(engine, wait=60)
    waiting = jobs(8)
    queue.submit(waiting)
    assert results(waiting) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert sizes(engine) == [4, 4]


def test_the_wait_is_from_the_first_image_on() -> None:
    engine = FakeEngine((1, 4))
    queue = batcher(engine, wait=0.3)
    began = time.monotonic()
    first = jobs(1)
    queue.submit(first)
    time.sleep(0.2)
    queue.submit(jobs(1, 1))
    results(first)
    assert 0.3 <= time.monotonic() - began < 0.5
    assert sizes(engine) == [2]


def test_what_came_while_the_engine_ran_does_not_wait_again() -> None:
    engine = FakeEngine((1, 4), seconds=0.3)
    queue = batcher(engine, wait=0.2)
    first, second = jobs(1), jobs(3, 1)
    queue.submit(first)
    wait_until(lambda: engine.runs)
    queue.submit(second)
    results(first)
    began = time.monotonic()
    results(second)
    assert time.monotonic() - began < 0.45  # the run alone, and not 0.2 s more
    assert sizes(engine) == [1, 3]


def test_one_at_a_time_where_the_engine_runs_one() -> None:
    engine = FakeEngine(None)
    queue = batcher(engine)
    waiting = jobs(3)
    queue.submit(waiting)
    assert results(waiting) == [0, 1, 2]
    assert sizes(engine) == [1, 1, 1]


def test_an_engine_for_several_is_given_copies() -> None:
    engine = FakeEngine((3, 4))
    queue = batcher(engine)
    waiting = jobs(1, 9)
    queue.submit(waiting)
    assert results(waiting) == [9]
    assert [request["seed"] for request in engine.runs[0]] == [9, 9, 9]


def test_a_full_queue_takes_all_of_a_request_or_nothing() -> None:
    engine = FakeEngine((1, 1))
    engine.gate.clear()
    queue = batcher(engine, queue=3)
    running = jobs(1)
    queue.submit(running)
    wait_until(lambda: engine.runs)
    queue.submit(jobs(2, 1))
    with pytest.raises(Refused, match=r"^2 images wait already, and 3 may; try again later$") as it:
        queue.submit(jobs(2, 3))
    assert it.value.retry_after >= 1
    assert queue.count_waiting() == 2
    queue.submit(jobs(1, 3))
    engine.gate.set()
    wait_until(lambda: queue.is_idle)


def test_images_of_those_who_left_are_not_made() -> None:
    engine = FakeEngine((1, 1))
    engine.gate.clear()
    queue = batcher(engine)
    running, dropped, kept = jobs(1), jobs(1, 1), jobs(1, 2)
    for each in (running, dropped, kept):
        queue.submit(each)
    wait_until(lambda: engine.runs)
    queue.cancel(dropped)
    assert queue.count_waiting() == 1
    engine.gate.set()
    results(kept)
    assert [run[0]["seed"] for run in engine.runs] == [0, 2]
    assert dropped[0].result.cancelled()


def test_a_run_ends_when_all_have_left() -> None:
    engine = FakeEngine((1, 2))
    engine.gate.clear()
    queue = batcher(engine)
    waiting = jobs(2)
    queue.submit(waiting)
    wait_until(lambda: engine.runs)
    queue.cancel(waiting[:1])
    queue.cancel(waiting[1:])
    engine.gate.set()
    for job in waiting:
        with pytest.raises(Cancelled):
            job.result.result(5)
    assert engine.ended == 1
    again = jobs(1, 4)
    queue.submit(again)
    assert results(again) == [4]


def test_a_run_goes_on_for_one_who_stays() -> None:
    engine = FakeEngine((1, 2))
    engine.gate.clear()
    queue = batcher(engine)
    waiting = jobs(2)
    queue.submit(waiting)
    wait_until(lambda: engine.runs)
    queue.cancel(waiting[:1])
    engine.gate.set()
    assert results(waiting[1:]) == [1]
    assert engine.ended == 0


def test_what_is_done_is_not_ended() -> None:
    engine = FakeEngine((1, 2))
    queue = batcher(engine)
    (job,) = jobs(1)
    job.result.add_done_callback(lambda _: queue.cancel([job]))
    queue.submit([job])
    wait_until(lambda: engine.runs and queue.is_idle)
    assert engine.cancels == 0


def test_the_fault_of_one_is_not_that_of_others() -> None:
    engine = FakeEngine((1, 4))
    queue = batcher(engine)
    waiting = [*jobs(1), *jobs(1, 1, prompt="fail"), *jobs(1, 2)]
    queue.submit(waiting)
    assert results([waiting[0], waiting[2]]) == [0, 2]
    with pytest.raises(RuntimeError, match="out of luck"):
        waiting[1].result.result(5)
    assert sizes(engine) == [3, 1, 1, 1]


def test_steps_are_told_to_those_who_want_to_know() -> None:
    engine = FakeEngine((1, 2), steps=3)
    queue = batcher(engine)
    told: list[tuple[int, int]] = []
    waiting = [
        Job({"seed": 0}, lambda step, place: 1 / 0),  # whose fault ends nothing
        Job({"seed": 1}, lambda step, place: told.append((step.index, place))),
    ]
    queue.submit(waiting)
    assert results(waiting) == [0, 1]
    assert told == [(1, 1), (2, 1), (3, 1)]


def test_closing_finishes_what_was_taken() -> None:
    engine = FakeEngine((1, 2), seconds=0.05)
    queue = batcher(engine, wait=60)
    waiting = jobs(3)
    queue.submit(waiting)
    queue.close()
    with pytest.raises(Refused, match=r"^the server is shutting down$"):
        queue.submit(jobs(1))
    assert results(waiting) == [0, 1, 2]
    wait_until(lambda: queue.is_idle)


def test_only_runs_that_someone_looks_at_are_watched() -> None:
    watched: list[bool] = []

    def serve(requests: Sequence[Any], on_step: Any = None) -> list[Any]:
        watched.append(on_step is not None)
        return list(requests)

    queue = Batcher(serve, Batching(1, 2, 0.05))
    for waiting in (jobs(1), [*jobs(1), Job({}, lambda step, place: None)]):
        queue.submit(waiting)
        for job in waiting:
            job.result.result(5)
    assert watched == [False, True]


def test_aborting_ends_the_run_and_refuses_what_waits() -> None:
    engine = FakeEngine((1, 1))
    engine.gate.clear()
    queue = batcher(engine)
    waiting = jobs(2)
    queue.submit(waiting)
    wait_until(lambda: engine.runs)
    queue.abort()
    with pytest.raises(Refused, match="shutting down"):
        waiting[1].result.result(5)
    engine.gate.set()
    with pytest.raises(Cancelled):
        waiting[0].result.result(5)
    wait_until(lambda: queue.is_idle)


def test_runs_are_observed() -> None:
    seen: list[int] = []
    engine = FakeEngine((1, 4))
    queue = Batcher(
        engine.serve, Batching(1, 4, 0.02), observe=lambda count, seconds: seen.append(count)
    )
    waiting = jobs(3)
    queue.submit(waiting)
    results(waiting)
    assert seen == [3]
