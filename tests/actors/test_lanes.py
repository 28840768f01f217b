"""Threads that compute: never more of a model than its backend takes, never fewer than it could."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from narsil_stream.actors.lanes import Lanes, Work
from tests.support import PATIENCE_S, until


class Job:
    """Work that ends when it is let go."""

    def __init__(self, model: str, lanes: int = 1) -> None:
        self.begun = threading.Event()
        self.ended = threading.Event()
        self._go = threading.Event()
        self.work = Work(model, lanes, self._do)

    def end(self) -> None:
        self._go.set()
        assert self.ended.wait(PATIENCE_S)

    def _do(self) -> None:
        self.begun.set()
        assert self._go.wait(PATIENCE_S)
        self.ended.set()


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    """Three wide."""
    made = Lanes("test")
    made.widen(3)
    yield made
    made.stop()


def begun(*jobs: Job) -> list[bool]:
    return [job.begun.is_set() for job in jobs]


def put(lanes: Lanes, *jobs: Job) -> None:
    for job in jobs:
        lanes.put(job.work)


def test_a_model_computes_as_many_at_once_as_it_has_lanes_and_the_next_when_one_ends(lanes: Lanes) -> None:
    """More would use what belongs to another batch, fewer would leave the device idle."""
    jobs = [Job("m", 2) for _ in range(4)]
    put(lanes, *jobs)
    until(lambda: begun(*jobs) == [True, True, False, False], "two compute")
    jobs[1].end()
    until(lambda: begun(*jobs) == [True, True, True, False], "the first that waits follows")
    for job in (jobs[0], jobs[2]):
        job.end()
    assert jobs[3].begun.wait(PATIENCE_S)
    jobs[3].end()


def test_a_model_that_waits_for_itself_holds_up_no_other(lanes: Lanes) -> None:
    """A slow model with one lane must not take the threads of all."""
    slow, waits, other = Job("slow"), Job("slow"), Job("other")
    put(lanes, slow, waits, other)
    assert other.begun.wait(PATIENCE_S)
    assert begun(waits) == [False]
    other.end()
    slow.end()
    assert waits.begun.wait(PATIENCE_S)
    waits.end()


def test_all_models_together_keep_to_the_width(lanes: Lanes) -> None:
    """Models of one device share it."""
    jobs = [Job(f"m{i}", 3) for i in range(4)]
    put(lanes, *jobs)
    until(lambda: begun(*jobs) == [True, True, True, False], "three compute")
    lanes.widen(4)
    assert jobs[3].begun.wait(PATIENCE_S)
    for job in jobs:
        job.end()


def test_the_end_drops_what_waits_and_waits_for_what_computes(lanes: Lanes) -> None:
    """Memory is freed next."""
    computes, waits = Job("m"), Job("m")
    put(lanes, computes, waits)
    assert computes.begun.wait(PATIENCE_S)
    with ThreadPoolExecutor(1) as threads:
        stopping = threads.submit(lanes.stop)
        assert not stopping.done()
        computes.end()
        stopping.result(PATIENCE_S)
    assert begun(waits) == [False]


def test_much_work_of_many_models_is_done_once_each_within_the_limits(lanes: Lanes) -> None:
    """Threads end and begin work at the same time."""
    lock = threading.Lock()
    running = {"a": 0, "b": 0, "c": 0}
    done: list[int] = []
    wrong: list[str] = []
    limits = {"a": 1, "b": 2, "c": 3}

    def do(index: int, model: str) -> None:
        with lock:
            running[model] += 1
            if running[model] > limits[model] or sum(running.values()) > 3:
                wrong.append(f"{running}")
        with lock:
            running[model] -= 1
            done.append(index)

    count = 3_000
    for index in range(count):
        model = "abc"[index % 3]
        lanes.put(Work(model, limits[model], lambda index=index, model=model: do(index, model)))  # type: ignore[misc]
    until(lambda: len(done) == count, "all is done")
    assert wrong == []
    assert sorted(done) == list(range(count))
    assert [i for i in done if i % 3 == 0] == list(range(0, count, 3)), "one lane keeps the order"


def test_a_lane_that_is_claimed_is_taken_until_it_is_released(lanes: Lanes) -> None:
    """Who computes where the batch arrives would otherwise be one more than the backend takes."""
    assert lanes.claim("m")
    job = Job("m")
    put(lanes, job)
    assert not lanes.claim("n"), "others wait, or compute"
    assert begun(job) == [False]
    lanes.release("m")
    assert job.begun.wait(PATIENCE_S)
    assert not lanes.claim("m")
    job.end()
    until(lambda: lanes.claim("m"), "all is done")


def test_claims_beside_threads_never_exceed_the_lanes(lanes: Lanes) -> None:
    """The event loop looks while a thread is between two batches."""
    lock, running, most, done = threading.Lock(), [0], [0], [0]

    def do() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        with lock:
            running[0] -= 1
            done[0] += 1

    for _ in range(3_000):
        if lanes.claim("m"):
            do()
            lanes.release("m")
        else:
            lanes.put(Work("m", 1, do))
    until(lambda: done[0] == 3_000, "all is done")
    assert most == [1]
