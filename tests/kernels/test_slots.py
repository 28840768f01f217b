"""Slots of the native engine, as threads take and give them back. Needs no GPU."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from narsil_stream.kernels.native.slots import Pool
from tests.support import PATIENCE_S, until


@dataclass(eq=False)
class Slot:
    index: int
    lane: int
    used: int = 0


Make = Callable[[int, int], tuple[Pool[Slot], list[Slot]]]


@pytest.fixture
def make() -> Make:
    def pool(lanes: int, count: int) -> tuple[Pool[Slot], list[Slot]]:
        slots = [Slot(i, i % lanes) for i in range(count)]
        return Pool(slots, lanes), slots

    return pool


def take(pool: Pool[Slot]) -> Slot:
    slot = pool.take(wait=True)
    assert slot is not None
    return slot


def test_batches_go_to_the_lane_with_the_least_to_do(make: Make) -> None:
    """Two on one stream run one after the other, while another stream is idle."""
    pool, _ = make(3, 4)
    first = [take(pool) for _ in range(3)]
    assert sorted(slot.lane for slot in first) == [0, 1, 2]
    assert take(pool).lane == 0
    pool.give_back(next(slot for slot in first if slot.lane == 2))
    assert take(pool).lane == 2


def test_there_is_no_slot_for_who_need_not_wait_while_none_is_free_or_others_wait(make: Make) -> None:
    """A long batch that took each slot as it came free would starve the short ones."""
    pool, slots = make(1, 2)
    assert [take(pool).index for _ in slots] == [0, 1]
    assert pool.take(wait=False) is None
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(take, pool)
        until(lambda: pool.waiting == 1, "somebody waits")
        with pool.changed:  # the one that waits cannot take it yet
            pool.give_back(slots[0])
            assert pool.take(wait=False) is None
        assert waiting.result(PATIENCE_S) is slots[0]
    pool.give_back(slots[1])
    assert pool.take(wait=False) is slots[1]


def test_threads_with_long_and_short_batches_never_share_a_slot_and_all_end(make: Make) -> None:
    """Long batches hold several slots and want more: threads that waited for each other would stand for ever."""
    pool, slots = make(3, 4)
    wrong: list[int] = []
    together = threading.Barrier(6)

    def work(pieces: int) -> int:
        together.wait(PATIENCE_S)
        done = 0
        for _ in range(200):
            flying: list[Slot] = []
            for _ in range(pieces):
                while (slot := pool.take(wait=not flying)) is None:
                    done += land(flying)
                slot.used += 1
                if slot.used != 1:
                    wrong.append(slot.index)
                flying.append(slot)
            while flying:
                done += land(flying)
        return done

    def land(flying: list[Slot]) -> int:
        slot = flying.pop(0)
        slot.used -= 1
        pool.give_back(slot)
        return 1

    lengths = (1, 1, 3, 7, 16, 2)
    with ThreadPoolExecutor(len(lengths)) as running:
        assert list(running.map(work, lengths, timeout=60)) == [200 * pieces for pieces in lengths]
    assert wrong == []
    assert sorted(slot.index for slot in (take(pool) for _ in slots)) == [0, 1, 2, 3]
