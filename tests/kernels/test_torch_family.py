"""The torch family: which versions it takes, how it packs, what its devices do."""

import threading
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narsil_stream.kernels import torch_family
from narsil_stream.kernels.artifact import Artifact, write
from narsil_stream.kernels.backend import Backend, IdOutOfRange, RaggedBatch
from narsil_stream.kernels.cutting import pieces
from narsil_stream.kernels.init import criteo_spec, random_batch, random_model
from narsil_stream.kernels.quantize import quantize
from narsil_stream.kernels.reference import Reference, sigmoid
from narsil_stream.kernels.torch_family import unit
from narsil_stream.kernels.torch_family.packing import Packing
from narsil_stream.schemas.model import DlrmDot, ModelSpec, Table
from tests.kernels.conftest import small_spec

REQUIREMENTS = Path(__file__).parents[2] / "requirements"


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Pretend that exactly these distributions are installed."""

    def version(name: str) -> str:
        try:
            return versions[name.replace("-", "_")]
        except KeyError:
            raise PackageNotFoundError(name) from None

    monkeypatch.setattr(unit, "version", version)


@pytest.mark.parametrize(
    "versions",
    [
        {"torch": "2.13.0+cpu", "fbgemm_gpu_cpu": "1.8.0", "torchrec": "1.8.0"},
        {"torch": "2.11.0+cu130", "fbgemm_gpu": "1.6.0", "torchrec": "1.6.1"},
    ],
)
def test_the_locked_units_are_taken(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    """Whatever torch was built for: that is no part of its version."""
    installed(monkeypatch, **versions)
    assert versions["torch"].startswith(torch_family.require_unit().torch)


@pytest.mark.parametrize(
    ("versions", "found"),
    [
        ({}, "torch missing, fbgemm-gpu missing, torchrec missing"),
        ({"torch": "2.14.0", "fbgemm_gpu_cpu": "1.8.0", "torchrec": "1.8.0"}, "torch 2.14.0, fbgemm-gpu-cpu 1.8.0"),
        ({"torch": "2.13.0", "fbgemm_gpu": "1.8.0", "torchrec": "1.8.0"}, "fbgemm-gpu 1.8.0"),
        (
            {"torch": "2.13.0", "fbgemm_gpu": "1.8.0", "fbgemm_gpu_cpu": "1.8.0", "torchrec": "1.8.0"},
            "fbgemm-gpu-cpu 1.8.0 and fbgemm-gpu 1.8.0",
        ),
        ({"torch": "2.11.0", "fbgemm_gpu": "1.6.0"}, "torchrec missing"),
    ],
)
def test_any_other_trio_is_refused_with_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, versions: dict[str, str], found: str
) -> None:
    """FBGEMM is bound to one torch: another fails on an undefined symbol, if one is lucky."""
    installed(monkeypatch, **versions)
    with pytest.raises(torch_family.Unavailable) as refused:
        torch_family.load(tmp_path)
    message = str(refused.value)
    assert found in message
    step = message.partition("Next: ")[2]
    for locked in torch_family.UNITS:
        assert all(part in message for part in (locked.machine, locked.torch, locked.fbgemm, locked.torchrec))
        assert f"{locked.install} ({locked.machine})" in step


def test_the_requirements_install_what_the_table_says() -> None:
    """The documented command must lead to a unit that is taken."""
    for locked in torch_family.UNITS:
        files = [part for part in locked.install.split() if part.startswith("requirements/")]
        lines = "\n".join((REQUIREMENTS.parent / file).read_text() for file in files).splitlines()
        assert {f"torch=={locked.torch}", f"torchrec=={locked.torchrec}", locked.fbgemm.replace(" ", "==")} <= set(
            lines
        )


@pytest.mark.parametrize(("extra", "file"), [("torch", "torch-cpu.txt"), ("torch-cuda", "torch-cuda.txt")])
def test_an_extra_leads_to_a_locked_unit(extra: str, file: str) -> None:
    """A bare `torch` would bring a version that FBGEMM is not built for."""
    project = tomllib.loads((REQUIREMENTS.parent / "pyproject.toml").read_text())["project"]
    lines = (REQUIREMENTS / file).read_text().splitlines()
    assert project["optional-dependencies"][extra] == [line for line in lines if not line.startswith("#")]


def mixed_spec(spec: ModelSpec) -> ModelSpec:
    """Tables of three types: they cannot be joined."""
    kinds = ("FP32", "INT8", "FP16")
    tables = tuple(msgspec.structs.replace(t, dtype=kinds[i % 3]) for i, t in enumerate(spec.tables))
    return msgspec.structs.replace(spec, tables=tables)


def unpacked(packing: Packing, spec: ModelSpec, values: np.ndarray, offsets: np.ndarray) -> list[list[list[int]]]:
    """[rows][vectors] bags of (table's own) ids, whichever way they were packed."""
    vectors = packing.vectors
    rows = (len(offsets) - 1) // vectors
    starts = np.cumsum([0, *(table.rows for table in spec.tables)])
    found = []
    for row in range(rows):
        bags = []
        for vector in range(vectors):
            bag = row * vectors + vector if packing.joined else vector * rows + row
            ids = values[offsets[bag] : offsets[bag + 1]]
            first = starts[vector - 1] if packing.joined and 1 <= vector <= spec.n_sparse else 0
            bags.append((ids - first).tolist())
        found.append(bags)
    return found


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    padding=st.integers(0, 5),
    bag=st.sampled_from([None, 1, 4]),
    mixed=st.booleans(),
    kind=st.sampled_from(["dlrm-dot", "dcn-v2"]),
    seed=st.integers(0, 1000),
)
def test_packing_keeps_every_bag_in_its_place(
    rows: int, padding: int, bag: int | None, mixed: bool, kind: str, seed: int
) -> None:
    """Joined or by table, one-hot or multi-hot, padded or not, in fresh memory or in memory used before."""
    spec = small_spec(kind=kind)
    spec = mixed_spec(spec) if mixed else spec
    packing = Packing(spec, align=8)
    batch = random_batch(spec, rows, seed, bag)
    lengths = np.ones((rows, spec.n_sparse), int) if batch.lengths is None else batch.lengths
    cuts = np.split(batch.ids, np.cumsum(lengths.reshape(-1))[:-1])
    room = packing.room(rows + padding, 100)
    room.values[:], room.offsets[1:] = 5, 77
    for given_room in (None, room):
        packed = packing.pack(batch, rows + padding, given_room)
        assert packed.dense.shape == (rows + padding, 8)
        np.testing.assert_array_equal(packed.dense[:rows, : spec.n_dense], batch.dense)
        found = unpacked(packing, spec, packed.values, packed.offsets)
        for row in range(rows):
            expected = [cut.tolist() for cut in cuts[row * spec.n_sparse : (row + 1) * spec.n_sparse]]
            assert found[row][1 : 1 + spec.n_sparse] == expected
            assert found[row][0] == [] and not any(found[row][1 + spec.n_sparse :])
        assert all(id_ == 0 for row in found[rows:] for ids in row for id_ in ids)


@pytest.mark.parametrize("bag", [None, 3])
@pytest.mark.parametrize("wrong", [-1, 7, 2**31 - 1])
def test_an_id_outside_its_table_is_refused_by_name(bag: int | None, wrong: int) -> None:
    """In joined tables it would be the next table's row: a plausible score."""
    spec = small_spec()
    batch = random_batch(spec, 5, 1, bag)
    lengths = np.ones((5, 3), np.int32) if batch.lengths is None else batch.lengths
    place = int(np.flatnonzero(np.repeat(np.tile(np.arange(3), 5), lengths.reshape(-1)) == 0)[0])
    ids = batch.ids.copy()
    ids[place] = wrong
    with pytest.raises(IdOutOfRange, match="table t0"):
        Packing(spec).pack(RaggedBatch(batch.dense, ids, batch.lengths), 8)


def test_tables_that_int32_cannot_count_together_are_not_joined() -> None:
    """Their rows would wrap to negative ids."""
    shape = DlrmDot(1, 4, (4,), (1,))
    spec = ModelSpec("huge", shape, tuple(Table(f"t{i}", 2**30) for i in range(2)))
    assert not Packing(spec).joined
    assert Packing(msgspec.structs.replace(spec, tables=spec.tables[:1])).joined


def expected(model: Artifact, batch: RaggedBatch) -> np.ndarray:
    return sigmoid(Reference(model).logits(batch))


needs_unit = pytest.mark.skipif(not unit.is_here(), reason="no locked unit of torch, FBGEMM and TorchRec")


@needs_unit
class TestCpu:
    """On the CPU."""

    @pytest.fixture(autouse=True)
    def _threads(self) -> None:
        """Two threads, whatever this machine has."""
        import torch

        torch.set_num_threads(2)

    def load(self, model: Artifact, tmp_path: Path, **options: str) -> Backend:
        write(tmp_path / "model", model)
        return torch_family.load(tmp_path / "model", device="cpu", **options)  # type: ignore[arg-type]

    @pytest.mark.parametrize("bag", [None, 3])
    @pytest.mark.parametrize("kind", ["dlrm-dot", "dcn-v2"])
    @pytest.mark.parametrize("rows", ["FP32", "INT8", "mixed"])
    def test_odd_models_score_like_the_reference(self, tmp_path: Path, rows: str, kind: str, bag: int | None) -> None:
        """One layer, narrow widths, a table of one row, tables of several types."""
        spec = small_spec("FP32", kind=kind)
        full = random_model(spec, seed=3)
        model = (
            random_model(mixed_spec(spec), 3) if rows == "mixed" else full if rows == "FP32" else quantize(full, "INT8")
        )
        backend = self.load(model, tmp_path, precision="fp32")
        for size in (1, 31, 200, 2500):
            batch = random_batch(spec, size, size, bag)
            scores = np.full(size, np.nan, np.float32)
            backend.run(batch, scores)
            np.testing.assert_allclose(scores, expected(model, batch), rtol=0, atol=1e-5)
        backend.unload()

    def test_more_products_than_numpy_takes_score_the_same(self, tmp_path: Path) -> None:
        """Wide models leave them to torch."""
        tables = tuple(Table(name=f"t{i}", rows=5) for i in range(40))
        spec = ModelSpec("wide", DlrmDot(dense=3, dim=96, bottom=(96,), top=(6, 1)), tables)
        model = random_model(spec, seed=1)
        backend = self.load(model, tmp_path, precision="fp32")
        batch = random_batch(spec, 33, 1)
        scores = np.full(33, np.nan, np.float32)
        backend.run(batch, scores)
        np.testing.assert_allclose(scores, expected(model, batch), rtol=0, atol=1e-5)
        backend.unload()

    def test_it_works_from_any_thread_and_leaves_torchs_threads_alone(self, tmp_path: Path) -> None:
        """An executor computes in a thread of its own; training in the same process keeps its speed."""
        import torch

        model = random_model(criteo_spec(rows=50), seed=1)
        backend = self.load(model, tmp_path, precision="fp32")
        assert torch.get_num_threads() == 2
        batch = random_batch(model.spec, 300, 1)
        scores = np.zeros(300, np.float32)

        def compute() -> None:
            backend.warm_up(256)
            backend.run(batch, scores)

        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
        np.testing.assert_allclose(scores, expected(model, batch), rtol=0, atol=1e-5)
        backend.unload()

    def test_it_says_what_it_is(self, tmp_path: Path) -> None:
        """`narsil serve` shows it."""
        backend = self.load(random_model(small_spec(), 1), tmp_path, precision="fp32")
        assert (backend.info.name, backend.info.device, backend.info.precision) == ("torch", "cpu", "fp32")
        backend.unload()

    def test_a_precision_without_instructions_for_it_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """FP16 on most CPUs is seven times slower than FP32: nobody wants that by accident."""
        from narsil_stream.kernels.torch_family import devices

        monkeypatch.setattr(devices, "_cpu_multiplies", lambda precision: False)
        with pytest.raises(torch_family.Unavailable, match="bf16 numbers in hardware"):
            devices.resolve("cpu", "bf16")
        assert devices.resolve("cpu", "auto") == ("cpu", "fp32")
        monkeypatch.setattr(devices, "_cpu_multiplies", lambda precision: precision == "bf16")
        assert devices.resolve("cpu", "auto") == ("cpu", "bf16")

    def test_cuda_without_a_gpu_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Silently computing on the CPU would look like a slow GPU."""
        import torch

        from narsil_stream.kernels.torch_family import devices

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(torch_family.Unavailable, match="nvidia-smi"):
            devices.resolve("cuda", "fp16")


@pytest.mark.gpu
class TestCuda:
    """On a GPU: graphs, buckets, and another library beside it."""

    @pytest.fixture(scope="class")
    def model(self) -> Artifact:
        return random_model(criteo_spec(rows=500, dim=16), seed=1)

    def test_graphs_serve_every_size_without_a_fallback(self, model: Artifact) -> None:
        """A live batch must not pay for a capture, nor run kernel by kernel unseen."""
        from narsil_stream.kernels.torch_family.cuda import CudaBackend

        backend = CudaBackend(model, "fp16")
        backend.warm_up(1000)
        for bag in (None, 3, 30):
            for size in (1, 127, 128, 129, 999, 1000, 1001, 3000):
                batch = random_batch(model.spec, size, size, bag)
                scores = np.full(size, np.nan, np.float32)
                backend.run(batch, scores)
                np.testing.assert_allclose(scores, expected(model, batch), rtol=0, atol=2e-2)
        assert backend.eager == 0
        backend.unload()

    def test_what_has_no_graph_is_computed_and_counted(self, model: Artifact) -> None:
        """Before warm-up, and for a single row with more ids than there is memory for."""
        from narsil_stream.kernels.torch_family.cuda import CudaBackend

        backend = CudaBackend(model, "fp32")
        self.check(backend, model, random_batch(model.spec, 9, 1))
        backend.warm_up(128)
        assert backend.eager == 1
        lengths = np.zeros((2, 26), np.int32)
        lengths[1, 3] = 20_000
        ids = np.random.default_rng(0).integers(0, 500, 20_000).astype(np.int32)
        self.check(backend, model, RaggedBatch(np.ones((2, 13), np.float32), ids, lengths), atol=1e-3)
        assert backend.eager == 2
        backend.unload()

    def check(self, backend: Backend, model: Artifact, batch: RaggedBatch, atol: float = 1e-5) -> None:
        scores = np.full(batch.rows, np.nan, np.float32)
        backend.run(batch, scores)
        np.testing.assert_allclose(scores, expected(model, batch), rtol=0, atol=atol)

    def test_torch_and_cupy_share_a_gpu_in_one_process(self, model: Artifact) -> None:
        """Two allocators and two streams: memory of one that the other still uses gives plausible nonsense."""
        pytest.importorskip("cupy")
        from narsil_stream.kernels.native.native import Native
        from narsil_stream.kernels.torch_family.cuda import CudaBackend

        backends = [CudaBackend(model, "fp32"), Native(model, precision="fp32")]
        wrong: list[str] = []
        ready = threading.Barrier(len(backends))

        def work(index: int) -> None:
            backend = backends[index]
            try:
                for round_ in range(200):
                    batch = random_batch(model.spec, 1 + 97 * round_ % 900, round_, bag=None if round_ % 3 else 2)
                    self.check(backend, model, batch)
            except BaseException as error:
                wrong.append(f"{backend.info.name}: {error!r}")

        for backend in backends:  # captures are made while nothing else uses the GPU
            backend.warm_up(1024)
        threads = [threading.Thread(target=lambda i=i: (ready.wait(), work(i))) for i in range(len(backends))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        for backend in backends:
            backend.unload()


def test_long_batches_are_cut_where_rows_end() -> None:
    """The CPU shares a batch among threads by this."""
    batch = random_batch(small_spec(), 50, 1, bag=3)
    cut = pieces(batch, 16, max_ids=2**31 - 1)
    assert [piece.rows for piece in cut] == [16, 16, 16, 2]
    np.testing.assert_array_equal(np.concatenate([piece.ids for piece in cut]), batch.ids)
