"""Which family computes: what auto takes, what is refused and how it is told."""

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from narsil_stream.kernels import families, native, torch_family
from narsil_stream.kernels.artifact import write
from narsil_stream.kernels.backend import Unfit
from narsil_stream.kernels.families import choose
from narsil_stream.kernels.init import Cross, criteo_spec, random_batch, random_model
from narsil_stream.kernels.reference import Reference, sigmoid
from narsil_stream.kernels.torch_family.unit import UNITS
from narsil_stream.schemas.model import Table

SMALL = criteo_spec(rows=50)
LARGE = criteo_spec(rows=50, dim=64, bottom=(512, 256), top=(512, 512, 256))
CPU, CUDA = UNITS


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> "type[Machine]":
    """A machine without anything, until a test says what it has."""
    Machine.patch = monkeypatch
    Machine.has()
    return Machine


class Machine:
    """What is installed, by monkeypatching the families' own questions."""

    patch: pytest.MonkeyPatch

    @classmethod
    def has(cls, cupy: bool = False, gpu: bool = False, unit: object = None, lacks: str = "") -> None:
        def require_gpu() -> None:
            if lacks:
                raise native.Unavailable(f"{lacks}. Next: choose another")
            if not gpu:
                raise native.Unavailable("no GPU. Next: check nvidia-smi")

        def require_unit() -> object:
            if unit is None:
                raise torch_family.Unavailable("no unit. Next: install one")
            return unit

        cls.patch.setattr(families.importlib.util, "find_spec", lambda name: object() if cupy else None)
        cls.patch.setattr(native, "require_gpu", require_gpu)
        cls.patch.setattr(torch_family, "require_unit", require_unit)


def test_auto_takes_native_on_a_gpu(machine: type[Machine]) -> None:
    """The fastest, whatever else is installed."""
    machine.has(cupy=True, gpu=True, unit=CUDA)
    assert choose("auto", "auto", SMALL).name == "native"


def test_auto_takes_torch_where_a_unit_is_installed_and_pays(machine: type[Machine]) -> None:
    """On a CPU for models of some size; with the CUDA unit for all."""
    machine.has(cupy=True, unit=CPU)
    choice = choose("auto", "auto", LARGE)
    assert (choice.name, "no GPU" in choice.reason) == ("torch", True)
    assert choose("auto", "auto", SMALL).name == "reference"
    assert choose("auto", "bf16", SMALL).name == "torch", "the reference has no bf16"
    machine.has(unit=CUDA)
    assert choose("auto", "auto", SMALL).name == "torch"


def test_auto_takes_the_reference_when_there_is_nothing_else_and_says_what_is_missing() -> None:
    """The log line is where people look when it is slow."""
    choice = choose("auto", "auto", LARGE)
    assert choice.name == "reference"
    assert "no CuPy" in choice.reason and "no locked unit" in choice.reason


@pytest.mark.parametrize(
    ("backend", "precision", "told"),
    [
        ("native", "auto", "no GPU. Next: check nvidia-smi"),
        ("torch", "auto", "no unit. Next: install one"),
        ("reference", "bf16", "fp64 alone, not in bf16"),
        ("auto", "fp16", "fp64 alone, not in fp16"),
        ("auto", "int8", "INT8 rows, but table C1 of dlrm has FP32 rows. Next: narsil model quantize"),
        ("cuda", "auto", "no backend is called 'cuda'"),
        ("auto", "fp4", "no precision is called 'fp4'"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_reason(backend: str, precision: str, told: str) -> None:
    """An explicit choice is never replaced by another one in silence."""
    with pytest.raises(Unfit) as refused:
        choose(backend, precision, LARGE)
    assert told in str(refused.value)


def test_int8_takes_a_model_with_int8_rows() -> None:
    """It speaks of the tables; arithmetic stays the family's own choice."""
    tables = tuple(msgspec.structs.replace(table, dtype="INT8") for table in SMALL.tables)
    assert choose("auto", "int8", msgspec.structs.replace(SMALL, tables=tables)).name == "reference"


@pytest.mark.parametrize("told", ["compute capability 8.0 or newer; Tesla T4 has 7.5", "no usable NVIDIA driver (999)"])
def test_auto_passes_over_a_gpu_that_will_not_do_and_says_why(machine: type[Machine], told: str) -> None:
    """An old GPU or a broken driver must not end a server that could compute on the processor."""
    machine.has(cupy=True, unit=CPU, lacks=told)
    choice = choose("auto", "auto", LARGE)
    assert choice.name == "torch"
    assert told in choice.reason and "Next" not in choice.reason
    with pytest.raises(Unfit, match="Next: choose another"):
        choose("native", "auto", LARGE)


def test_lanes_reach_the_family_that_has_them(
    machine: type[Machine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """0 leaves their number to the family."""
    machine.has(cupy=True, gpu=True)
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(native, "load", lambda _, *, precision, lanes: asked.append((precision, lanes)))
    for lanes in (0, 5):
        choose("auto", "auto", SMALL, lanes).load(tmp_path)
    assert asked == [("fp16", native.LANES), ("fp16", 5)]


def test_more_lanes_than_a_family_has_are_said_to_be_of_no_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A setting that changes nothing in silence is believed to work."""
    write(tmp_path / "m", random_model(SMALL, 1))
    families.loader("reference", "auto", 1)(tmp_path / "m")
    assert "executor.lanes" not in caplog.text
    families.loader("reference", "auto", 3)(tmp_path / "m")
    assert "executor.lanes is 3, but the reference backend computes 1 at a time" in caplog.text


def test_the_chosen_loader_loads(tmp_path: Path) -> None:
    """A choice is of use only with a backend behind it."""
    model = random_model(SMALL, 1)
    write(tmp_path / "m", model)
    backend = choose("auto", "fp32", SMALL).load(tmp_path / "m")
    batch = random_batch(SMALL, 5, 1)
    scores = np.empty(5, np.float32)
    backend.run(batch, scores)
    np.testing.assert_allclose(scores, sigmoid(Reference(model).logits(batch)), atol=1e-6)


def test_multiply_adds_are_counted_as_published() -> None:
    """The reference configuration's row is 782,528 of them."""
    assert families.macs(LARGE) == 782_528
    spec = criteo_spec(rows=5, dim=8, bottom=(16,), top=(4,), cross=Cross(2, 3))
    assert families.macs(spec) == 13 * 16 + 16 * 8 + 2 * 2 * 3 * 216 + 216 * 4 + 4


def test_choosing_needs_neither_torch_nor_cupy() -> None:
    """The light installation has none of them, and starts quickly."""
    code = (
        "import sys; from narsil_stream.kernels import families, init;"
        "families.choose('reference', 'auto', init.criteo_spec());"
        "assert not {'torch', 'cupy', 'fbgemm_gpu', 'torchrec'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_int8_is_exact_arithmetic_on_a_cpu_and_fp16_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, machine: "type[Machine]"
) -> None:
    """Who asks for INT8 rows by name is promised 2e-3; BF16 behind them is off by more."""
    asked: dict[str, str] = {}

    def load(artifact: Path, *, precision: str, **_: int) -> None:
        asked["precision"] = precision

    monkeypatch.setattr(torch_family, "load", load)
    int8 = msgspec.structs.replace(LARGE, tables=tuple(Table(t.name, t.rows, "INT8") for t in LARGE.tables))
    for unit, arithmetic in ((CPU, "fp32"), (CUDA, "fp16")):
        machine.has(unit=unit)
        choose("torch", "int8", int8).load(Path())
        assert asked["precision"] == arithmetic
