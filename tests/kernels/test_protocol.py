"""The Backend protocol: every family that this machine has keeps it, and so does the example in the documentation."""

import re
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import msgspec
import numpy as np
import pytest

from narsil_stream.kernels import native, noop, reference, torch_family
from narsil_stream.kernels.artifact import Artifact, ArtifactError, write
from narsil_stream.kernels.backend import PROTOCOL, Backend, Loader, RaggedBatch, Unfit, speaks, unfit
from narsil_stream.kernels.init import random_batch, random_model
from narsil_stream.kernels.reference import Reference, sigmoid
from narsil_stream.kernels.torch_family import unit
from tests.kernels.conftest import small_spec
from tests.support import PATIENCE_S

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"
MODEL = random_model(small_spec(rows=(40, 900, 3)), seed=1)


def documented(artifact: Path) -> Backend:
    """The family that docs/families.md shows."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "def warm_up" in block)
    namespace: dict[str, Loader] = {}
    exec(code, namespace)
    return namespace["load"](artifact)


torch_is_here = pytest.mark.skipif(not unit.is_here(), reason="no locked unit of torch, FBGEMM and TorchRec")
Load = Callable[[Path], Backend]


def on(device: torch_family.Device) -> Load:
    return lambda folder: torch_family.load(folder, precision="fp32", device=device)


FAMILIES = [
    pytest.param(reference.load, id="reference"),
    pytest.param(noop.load, id="noop"),
    pytest.param(documented, id="documented"),
    pytest.param(on("cpu"), id="torch", marks=torch_is_here),
    pytest.param(lambda folder: native.load(folder, precision="fp32", lanes=3), id="native", marks=pytest.mark.gpu),
    pytest.param(on("cuda"), id="torch-cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=FAMILIES)
def load(request: pytest.FixtureRequest) -> Load:
    found: Load = request.param
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "m", MODEL)
    return tmp_path / "m"


@pytest.fixture
def backend(load: Load, folder: Path) -> Iterator[Backend]:
    """Warmed up for 200 rows."""
    loaded = load(folder)
    loaded.warm_up(200)
    yield loaded
    loaded.unload()


def batches(backend: Backend, count: int = 12) -> list[RaggedBatch]:
    """Of all sizes, none and more than was warmed up among them; bags too, where they are taken."""
    sizes = (0, 1, 3, 127, 128, 129, 200, 450)
    bags = (None, 3) if backend.capabilities.multi_hot else (None,)
    return [random_batch(MODEL.spec, sizes[i % len(sizes)], i, bags[i % len(bags)]) for i in range(count)]


def scores(backend: Backend, batch: RaggedBatch) -> np.ndarray:
    memory = backend.empty(batch.rows)
    memory[:] = np.nan
    backend.run(batch, memory)
    return memory


def same(backend: Backend, found: np.ndarray, right: np.ndarray) -> bool:
    """Bit for bit; on the native backend's lanes, cuBLASLt may multiply by different algorithms."""
    if backend.info.name == "native":
        return np.allclose(found, right, rtol=0, atol=1e-6)
    return found.tobytes() == right.tobytes()


def expected(backend: Backend, batch: RaggedBatch) -> np.ndarray:
    if backend.info.name == "noop":
        firsts = np.cumsum(batch.lengths.sum(axis=1)) - batch.lengths.sum(axis=1) if batch.lengths is not None else None
        ids = batch.ids[:: MODEL.spec.n_sparse] if firsts is None else np.append(batch.ids, 0)[firsts]
        empty = batch.lengths is not None and batch.lengths.sum(axis=1) == 0
        return np.where(empty, 0, ids % noop.SCORES / noop.SCORES)
    return np.asarray(sigmoid(Reference(MODEL).logits(batch)))


def test_a_backend_says_what_it_is_and_can(backend: Backend) -> None:
    """Logs, tables and callers are told nothing else."""
    can = backend.capabilities
    assert (backend.spec.name, backend.spec.tables) == (MODEL.spec.name, MODEL.spec.tables)
    assert backend.info.precision in can.precisions
    assert backend.info.lanes >= 1
    assert speaks(can.protocol)
    assert (can.device_kind == "cpu") == (backend.info.device == "cpu")
    assert can.max_rows in (0, 200)


def test_every_batch_is_scored_into_memory_of_any_kind(backend: Backend) -> None:
    """An executor gives a part of larger memory, which was used before; others give their own."""
    for batch in batches(backend):
        np.testing.assert_allclose(scores(backend, batch), expected(backend, batch), rtol=0, atol=1e-5)
        large = np.full(batch.rows + 7, np.nan, np.float32)
        backend.run(batch, large[: batch.rows])
        np.testing.assert_allclose(large[: batch.rows], expected(backend, batch), rtol=0, atol=1e-5)
        assert np.isnan(large[batch.rows :]).all()
    assert backend.unprepared == 0


def test_batches_computed_at_once_score_bit_for_bit_as_alone(backend: Backend) -> None:
    """As many threads as it has lanes, all in `run` at the same time, again and again."""
    given = batches(backend)
    alone = [scores(backend, batch) for batch in given]
    lanes = backend.info.lanes
    together = Barrier(lanes)

    def work(lane: int) -> list[int]:
        together.wait(PATIENCE_S)
        order = [(lane * 5 + turn) % len(given) for turn in range(10 * len(given))]
        return [i for i in order if not same(backend, scores(backend, given[i]), alone[i])]

    with ThreadPoolExecutor(lanes) as threads:
        assert list(threads.map(work, range(lanes))) == [[]] * lanes


def test_nothing_refers_to_a_batch_or_its_scores_any_more(backend: Backend) -> None:
    """The executor writes the next scores into the same memory, while these are on their way."""
    (batch,) = batches(backend, 4)[3:]
    memory = np.empty(batch.rows, np.float32)
    held = [weakref.ref(array) for array in (batch.dense, batch.ids, memory)]
    backend.run(batch, memory)
    before = memory.copy()
    scores(backend, batches(backend, 7)[6])
    np.testing.assert_array_equal(memory, before)
    del batch, memory
    assert [ref() for ref in held] == [None, None, None]


def test_two_models_of_a_family_compute_at_the_same_time(load: Load, folder: Path) -> None:
    """An executor serves several, in threads of its own."""
    models = [load(folder), load(folder)]
    for one in models:
        one.warm_up(200)
    given = batches(models[0])
    alone = [scores(models[0], batch) for batch in given]

    def work(one: Backend) -> bool:
        return all(
            same(one, scores(one, batch), right) for _ in range(10) for batch, right in zip(given, alone, strict=True)
        )

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(work, models)) == [True, True]
    models[0].unload()
    assert work(models[1])
    models[1].unload()


def test_an_unloaded_backend_may_be_unloaded_again(load: Load, folder: Path) -> None:
    """After a failed warm-up it is unclear to a caller who has freed what."""
    backend = load(folder)
    memory = backend.empty(3)
    backend.unload()
    backend.unload()
    memory[:] = 1


def test_an_unfit_artifact_is_refused_as_such(load: Load, folder: Path) -> None:
    """The operator repairs the artifact, not the machine."""
    (folder / "model.json").write_text("{")
    with pytest.raises(ArtifactError):
        load(folder)


def test_the_documented_family_names_what_it_cannot_do(tmp_path: Path) -> None:
    """An example without the unhappy path would be copied without it."""
    write(tmp_path / "dcn", random_model(small_spec(kind="dcn-v2"), 1))
    with pytest.raises(Unfit, match=r"no cross networks\. Next: --backend reference"):
        documented(tmp_path / "dcn")


@pytest.mark.parametrize(
    ("protocol", "works"),
    [(PROTOCOL, True), ("1.0", True), ("1.1", False), ("0.9", False), ("2.0", False), ("", False), ("1", False)],
)
def test_a_backend_of_another_major_or_a_newer_minor_version_is_told_apart(protocol: str, works: bool) -> None:
    """It may rely on calls that this executor does not make."""
    assert speaks(protocol) is works


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("no such width"), "it could not load: no such width. Next: do this"),
        (ValueError("bad. Next: do that"), "it could not load: bad. Next: do that"),
        (ValueError(), "it could not load: ValueError. Next: do this"),
        (MemoryError("Unable to allocate 9 GiB"), "Unable to allocate 9 GiB. Next: unload another model"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "Tried to allocate. Next: unload another model"),
    ],
)
def test_a_failure_is_told_with_what_failed_and_the_next_step(error: Exception, told: str) -> None:
    """`RuntimeError: CUDA error` alone sends people to a search engine."""
    with pytest.raises(Unfit) as refused, unfit("it could not load", "do this", ValueError, MemoryError, RuntimeError):
        raise error
    assert told in str(refused.value)


def test_what_a_failed_load_held_is_free_when_it_is_told() -> None:
    """A traceback keeps every array of the calls that failed, for as long as somebody holds the error."""
    held: list[weakref.ref[np.ndarray]] = []

    def load() -> None:
        weights = np.zeros(1000)
        held.append(weakref.ref(weights))
        raise MemoryError("no more")

    with pytest.raises(Unfit) as refused, unfit("it could not load", "do this", MemoryError):
        load()
    assert refused.value.__cause__ is not None
    assert held[0]() is None


def test_an_error_that_nobody_expects_is_not_hidden() -> None:
    """A bug wants its traceback, not advice."""
    with pytest.raises(KeyError), unfit("it could not load", "do this", ValueError):
        raise KeyError("x")


@torch_is_here
def test_what_torch_raises_while_loading_or_warming_up_is_unfit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries that do not load, operators that are missing, memory that does not suffice."""
    from narsil_stream.kernels.torch_family import cpu, devices

    backend = torch_family.load(folder, precision="fp32", device="cpu")
    monkeypatch.setattr(cpu.Packing, "pack", _raises(RuntimeError("could not create a primitive")))
    with pytest.raises(
        Unfit, match=r"torch backend could not warm up for 200 rows: could not create.*--backend reference"
    ):
        backend.warm_up(200)
    backend.unload()
    monkeypatch.setattr(devices, "build", _raises(OSError("libgomp.so.1: cannot open shared object file")))
    with pytest.raises(Unfit, match="torch backend could not load this model: libgomp"):
        torch_family.load(folder, precision="fp32", device="cpu")


def _raises(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_the_document_lists_the_capabilities_that_callers_see() -> None:
    """Names in a document drift away from those in the code."""
    from narsil_stream.core.config import Config
    from narsil_stream.gateways.metadata import model_config
    from narsil_stream.schemas.internal import ModelCard

    backend = Reference(Artifact(MODEL.spec, MODEL.tensors))
    card = ModelCard("d", MODEL.spec, "reference", "cpu", "fp64", 1, backend.capabilities)
    told = msgspec.to_builtins(model_config(card, Config()))["parameters"]
    assert told["backend_protocol"]["string_value"] == PROTOCOL
    assert [name for name in told if f"`{name}`" not in DOCUMENT.read_text()] in ([], ["digest"])
