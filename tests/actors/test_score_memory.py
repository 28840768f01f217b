"""Memory that is used again: after the last look at it, and never before."""

import gc

import numpy as np

from narsil_stream.actors.score_memory import KEPT, ScoreMemory
from narsil_stream.kernels.backend import Floats


class Device:
    """Counts what it was asked for."""

    def __init__(self) -> None:
        self.given: list[int] = []

    def empty(self, rows: int) -> Floats:
        self.given.append(rows)
        return np.empty(rows, np.float32)


def write(scores: ScoreMemory, value: float, rows: int = 3) -> memoryview:
    memory = scores.take(rows)
    memory[:rows] = value
    return scores.lend(memory, rows)


def floats(view: memoryview) -> list[float]:
    found: list[float] = np.frombuffer(view, np.float32).tolist()
    return found


def test_memory_is_used_again_once_nobody_looks_at_it() -> None:
    """Pinned memory takes the driver a hundred times as long as a batch takes the device."""
    device = Device()
    scores = ScoreMemory(device.empty, 8)
    for i in range(100):
        assert floats(write(scores, i)) == [i] * 3
    assert device.given == [8]


def test_memory_that_somebody_still_looks_at_is_never_written() -> None:
    """Whoever holds a slice, or an array over one, would find another batch's scores there."""
    scores = ScoreMemory(Device().empty, 8)
    held: list[object] = []
    for i in range(50):
        lent = write(scores, i)
        views = lent, lent[4:8], lent.cast("f"), np.frombuffer(lent[:4], np.float32), np.asarray(lent)[:4]
        held.append(views[i % 5])
        del views
        del lent
    for i, one in enumerate(held):
        assert set(np.asarray(one).view(np.uint8).ravel().view(np.float32).tolist()) == {i}
    del one


def test_memory_comes_back_with_the_last_of_several_looks() -> None:
    """Each request of a batch has a slice of its own, and goes its own way."""
    device = Device()
    scores = ScoreMemory(device.empty, 4)
    lent = write(scores, 1, 4)
    first, last = lent[:4], lent[12:]
    del lent, first
    write(scores, 2, 4)
    assert device.given == [4, 4]
    assert floats(last) == [1]
    del last
    write(scores, 3, 4)
    kept = [write(scores, i, 4) for i in (4, 5)]
    assert device.given == [4, 4]
    assert [floats(one) for one in kept] == [[4] * 4, [5] * 4]


def test_longer_batches_get_memory_of_their_own_which_is_not_kept() -> None:
    """They are not expected: one must not make every later batch large."""
    device = Device()
    scores = ScoreMemory(device.empty, 4)
    assert floats(write(scores, 7, 9)) == [7] * 9
    write(scores, 1, 9)
    write(scores, 1, 2)
    assert device.given == [9, 9, 4]


def test_memory_that_was_not_lent_is_not_used_again() -> None:
    """After a failed batch nobody knows whether the device still writes there."""
    device = Device()
    scores = ScoreMemory(device.empty, 4)
    scores.take(2)
    write(scores, 1)
    assert device.given == [4, 4]


def test_a_burst_does_not_hold_its_memory_for_ever() -> None:
    """A thousand batches on their way at once happen when a receiver stands still."""
    device = Device()
    scores = ScoreMemory(device.empty, 4)
    burst = [write(scores, i) for i in range(3 * KEPT)]
    burst.clear()
    gc.collect()
    burst = [write(scores, i) for i in range(2 * KEPT)]
    assert len(device.given) == 3 * KEPT + KEPT
