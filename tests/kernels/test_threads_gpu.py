"""Several threads on one GPU: each batch has the scores that it has alone, bit for bit, whatever computes beside it."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event

import numpy as np
import pytest

from narsil_stream.kernels import native
from narsil_stream.kernels.artifact import Artifact, write
from narsil_stream.kernels.backend import Backend, IdOutOfRange, RaggedBatch, Unfit
from narsil_stream.kernels.families import choose
from narsil_stream.kernels.init import Cross, criteo_spec, random_batch, random_model
from narsil_stream.kernels.native.engine import Engine
from narsil_stream.kernels.native.native import Native
from narsil_stream.kernels.quantize import quantize
from narsil_stream.kernels.reference import Reference, sigmoid
from narsil_stream.kernels.torch_family import unit
from tests.support import PATIENCE_S

pytestmark = pytest.mark.gpu

LANES = 3
ROWS = 1024
TABLE_ROWS = 3000
ROOM = 64 << 20
ROUNDS = 150
Right = Callable[[RaggedBatch, np.ndarray], bool]
torch_is_here = pytest.mark.skipif(not unit.is_here(), reason="no locked unit of torch, FBGEMM and TorchRec")


@pytest.fixture(scope="module")
def models() -> dict[str, Artifact]:
    widths = {"rows": TABLE_ROWS, "dim": 64, "bottom": (512, 256), "top": (512, 512, 256)}
    return {
        "dlrm": quantize(random_model(criteo_spec("dlrm", **widths), seed=1), "INT8"),
        "dcn": quantize(random_model(criteo_spec("dcn", **widths, cross=Cross(3, 64)), seed=2), "INT8"),
    }


@pytest.fixture(params=["dlrm fp16", "dlrm bf16", "dcn fp16"])
def backend(request: pytest.FixtureRequest, models: dict[str, Artifact]) -> Iterator[Native]:
    """The fused kernel where there is one, and products of cuBLASLt."""
    name, precision = request.param.split()
    made = Native(models[name], precision=precision, lanes=LANES)
    made.warm_up(ROWS)
    yield made
    made.unload()


def mixed(model: Artifact) -> list[RaggedBatch]:
    """One-hot and bags, at and around buckets; some are cut for their rows, some for their ids, one is empty."""
    sizes = [(0, None), (1, None), (100, None), (128, None), (129, None), (600, None), (ROWS, None), (2500, None)]
    sizes += [(1, 3), (127, 2), (500, 4), (ROWS, 1), (700, 9), (2100, 3)]
    return [random_batch(model.spec, rows, seed, bag) for seed, (rows, bag) in enumerate(sizes)]


def alone(engine: Engine, batch: RaggedBatch) -> list[set[bytes]]:
    """Of each piece of a batch: what the slots say, one after the other. Lanes may multiply by different algorithms."""
    found = []
    for piece in engine.cut(batch):
        said = set()
        for slot in engine.slots:
            slot.fill(piece)
            engine.submit(slot)
            said.add(engine.wait(slot).tobytes())
        found.append(said)
    return found


def matches(engine: Engine, batch: RaggedBatch, right: list[set[bytes]], scores: np.ndarray) -> bool:
    ends = np.cumsum([piece.rows for piece in engine.cut(batch)])[:-1]
    return all(
        part.tobytes() in said for part, said in zip(np.split(scores, ends) if right else [], right, strict=True)
    )


def scored(backend: Backend, batch: RaggedBatch) -> np.ndarray:
    scores = backend.empty(batch.rows)
    scores[:] = np.nan
    backend.run(batch, scores)
    return scores


def in_threads(count: int, work: Callable[[int], list[int]]) -> list[int]:
    """All of `work(0)` ... at the same time."""
    together = Barrier(count)

    def begin(index: int) -> list[int]:
        together.wait(PATIENCE_S)
        return work(index)

    with ThreadPoolExecutor(count) as threads:
        return [one for found in threads.map(begin, range(count)) for one in found]


def test_batches_of_every_kind_at_once_score_as_alone(backend: Native) -> None:
    """One-hot and multi-hot batches of all sizes in every lane: none may see another's memory, graph or scratch."""
    given = mixed(Artifact(backend.spec, {}))
    right = [alone(backend.engine, batch) for batch in given]
    for batch, said in zip(given, right, strict=True):
        assert matches(backend.engine, batch, said, scored(backend, batch)), "one thread alone"

    def work(lane: int) -> list[int]:
        order = np.random.default_rng(lane).integers(0, len(given), ROUNDS)
        return [i for i in order if not matches(backend.engine, given[i], right[i], scored(backend, given[i]))]

    for threads in (2, LANES):
        assert in_threads(threads, work) == []
    assert backend.unprepared == 0


def test_the_fused_kernel_scores_alike_on_every_lane(models: dict[str, Artifact]) -> None:
    """A caller who asks twice gets the same score, bit for bit."""
    backend = Native(models["dlrm"], lanes=LANES)
    if backend.engine.plan.name != "fused":
        pytest.skip("this GPU has no fused kernel")
    backend.warm_up(ROWS)
    for batch in mixed(models["dlrm"]):
        assert all(len(said) == 1 for said in alone(backend.engine, batch))
        np.testing.assert_allclose(
            scored(backend, batch), sigmoid(Reference(models["dlrm"]).logits(batch)), rtol=0, atol=5e-3
        )
    backend.unload()


def test_an_id_out_of_range_fails_its_own_batch_alone(backend: Native) -> None:
    """Errors are found on the device, in memory of the slot."""
    good = random_batch(backend.spec, 300, seed=1)
    right = alone(backend.engine, good)
    bad = RaggedBatch(good.dense, np.where(np.arange(good.ids.size) == 777, TABLE_ROWS, good.ids).astype(np.int32))

    def work(lane: int) -> list[int]:
        wrong = []
        for turn in range(ROUNDS):
            if lane == 0:
                with pytest.raises(IdOutOfRange):
                    scored(backend, bad)
            elif not matches(backend.engine, good, right, scored(backend, good)):
                wrong.append(turn)
        return wrong

    assert in_threads(LANES, work) == []


def test_a_capture_for_a_live_batch_disturbs_no_other(backend: Native) -> None:
    """A bag larger than the memory kept for it makes a slot's memory grow, and its graphs are captured anew."""
    good = random_batch(backend.spec, 300, seed=1)
    right = alone(backend.engine, good)
    ids = np.random.default_rng(0).integers(0, TABLE_ROWS, 400_000).astype(np.int32)

    def work(lane: int) -> list[int]:
        wrong = []
        for turn in range(30):
            if lane == 0:
                size = 200_000 + 5_000 * turn
                lengths = np.zeros((1, backend.spec.n_sparse), np.int32)
                lengths[0, 3] = size
                huge = RaggedBatch(np.ones((1, backend.spec.n_dense), np.float32), ids[:size], lengths)
                first, again = scored(backend, huge), scored(backend, huge)
                # So long a bag overflows FP16 around cuBLASLt: NaN, each time.
                if not np.allclose(first, again, rtol=0, atol=1e-6, equal_nan=True):
                    wrong.append(turn)
            elif not matches(backend.engine, good, right, scored(backend, good)):
                wrong.append(1000 + turn)
        return wrong

    assert in_threads(LANES, work) == []
    assert backend.unprepared > 0


def test_a_model_is_loaded_replaced_and_freed_while_another_computes(
    backend: Native, models: dict[str, Artifact]
) -> None:
    """A hot swap: allocation, upload, captures and the freeing of memory, under batches of the one that serves."""
    given = mixed(Artifact(backend.spec, {}))
    right = [alone(backend.engine, batch) for batch in given]
    over = Event()

    def work(lane: int) -> list[int]:
        if lane == 0:
            try:
                for name in ("dlrm", "dcn", "dlrm"):
                    other = Native(models[name], lanes=LANES)
                    other.warm_up(ROWS)
                    batch = random_batch(other.spec, 200, seed=5)
                    expected = sigmoid(Reference(models[name]).logits(batch))
                    assert np.allclose(scored(other, batch), expected, rtol=0, atol=2e-3)
                    other.unload()
            finally:
                over.set()
            return []
        wrong = []
        while not over.is_set():
            wrong += [i for i, b in enumerate(given) if not matches(backend.engine, b, right[i], scored(backend, b))]
        return wrong

    assert in_threads(LANES, work) == []
    assert backend.unprepared == 0


@torch_is_here
def test_threads_of_a_torch_model_wait_for_each_other_and_those_of_two_do_not_meet(models: dict[str, Artifact]) -> None:
    """There is one staging memory a model, and one current stream a thread."""
    from narsil_stream.kernels.torch_family.cuda import CudaBackend

    backends = [CudaBackend(models["dlrm"], "fp16"), CudaBackend(models["dcn"], "fp16")]
    given = [mixed(model) for model in models.values()]
    right = []
    for one, batches in zip(backends, given, strict=True):
        one.warm_up(ROWS)
        right.append([scored(one, batch).tobytes() for batch in batches])

    def work(lane: int) -> list[int]:
        which = lane % 2
        order = np.random.default_rng(lane).integers(0, len(given[which]), 60)
        return [i for i in order if scored(backends[which], given[which][i]).tobytes() != right[which][i]]

    assert in_threads(4, work) == []
    assert [one.unprepared for one in backends] == [0, 0]
    for one in backends:
        one.unload()


def test_a_device_without_room_is_told_and_nothing_is_left_behind(models: dict[str, Artifact]) -> None:
    """The old version goes on serving from the same memory."""
    import cupy

    def free() -> int:
        gc.collect()
        return int(cupy.cuda.runtime.memGetInfo()[0])

    def fill() -> None:
        """In ever smaller pieces, until nothing fits."""
        for size in (64 << 20, 2 << 20, 64 << 10):
            with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
                while True:
                    hogs.append(cupy.cuda.Memory(size))

    cupy.get_default_memory_pool().free_all_blocks()
    before = free()
    backend = Native(models["dcn"], lanes=LANES)
    hogs = [cupy.cuda.Memory(free() - ROOM)]
    try:
        with pytest.raises(Unfit, match=r"(?s)could not warm up for 65,536 rows in 3 lanes on .*Next: unload another"):
            backend.warm_up(1 << 20)
        backend.unload()
        del backend
        fill()
        with pytest.raises(Unfit, match=r"(?s)could not load this model on .*Next: unload another model"):
            Native(models["dlrm"])
    finally:
        hogs.clear()
    assert free() > before - ROOM
    again = Native(models["dlrm"])
    again.warm_up(128)
    assert np.isfinite(scored(again, random_batch(again.spec, 9, 1))).all()
    again.unload()


def test_a_device_without_room_is_told_by_torch_too(models: dict[str, Artifact]) -> None:
    """The same words, whichever library has failed."""
    import torch

    from narsil_stream.kernels.torch_family.cuda import CudaBackend

    torch.cuda.empty_cache()
    backend = CudaBackend(models["dcn"], "fp16")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    try:
        with pytest.raises(Unfit, match=r"(?s)could not warm up for 65,536 rows on .*Next: unload another model"):
            backend.warm_up(1 << 20)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    backend.unload()
    del backend
    again = CudaBackend(models["dlrm"], "fp16")
    again.warm_up(128)
    assert np.isfinite(scored(again, random_batch(again.spec, 9, 1))).all()
    again.unload()


def test_a_gpu_that_is_too_old_is_passed_over(monkeypatch: pytest.MonkeyPatch, models: dict[str, Artifact]) -> None:
    """Auto goes on with what there is and says why; whoever asked for native is told."""
    monkeypatch.setattr(native, "OLDEST", (99, 0))
    with pytest.raises(native.Unavailable, match=r"needs compute capability 99\.0 or newer; .* has \d+\.\d+\. Next: "):
        choose("native", "auto", models["dlrm"].spec)
    choice = choose("auto", "auto", models["dlrm"].spec)
    assert choice.name != "native"
    assert "needs compute capability 99.0" in choice.reason


def test_scores_go_into_pinned_memory(models: dict[str, Artifact], tmp_path: Path) -> None:
    """Memory that the device can write outlives the model that it came from."""
    import cupy

    write(tmp_path / "m", models["dlrm"])
    backend = native.load(tmp_path / "m")
    backend.warm_up(128)
    memory = backend.empty(100)
    assert cupy.cuda.runtime.pointerGetAttributes(memory.ctypes.data).type == cupy.cuda.runtime.memoryTypeHost
    assert backend.empty(0).shape == (0,)
    backend.run(random_batch(backend.spec, 100, 1), memory)
    before = memory.copy()
    backend.unload()
    np.testing.assert_array_equal(memory, before)
