"""TorchRec checkpoints: into artifacts and back, bit for bit, and how unfit ones are told."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

from narsil_stream.cli.model import model as command
from narsil_stream.kernels.artifact import Artifact, ArtifactError, read, write
from narsil_stream.kernels.init import Cross, plain_spec, random_batch, random_model
from narsil_stream.kernels.quantize import quantize
from narsil_stream.kernels.reference import Reference
from narsil_stream.kernels.torch_family import checkpoint, unit

DOT = plain_spec("x", 3, [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], 4, (6,), (9, 7))
CROSS = plain_spec("x", 3, [5, 6, 7], 4, (6,), (9, 7), cross=Cross(2, 3))
torch = pytest.importorskip("torch", reason="torch is not installed")


def run(*args: object) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in args], env={"COLUMNS": "300"})


@pytest.fixture(params=[DOT, CROSS], ids=["dot", "cross"])
def made(request: pytest.FixtureRequest) -> Artifact:
    return random_model(request.param, seed=4)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_round_trip_keeps_every_bit(made: Artifact, tmp_path: Path, ending: str) -> None:
    """Out to TorchRec and home again, by the commands; table 10 does not come before table 2."""
    write(tmp_path / "one", made)
    assert run("export", tmp_path / "one", tmp_path / f"c.{ending}").exit_code == 0
    result = run("import", tmp_path / f"c.{ending}", tmp_path / "two", "--name", "x")
    assert result.exit_code == 0, result.output
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert one.spec.tables == two.spec.tables
    assert one.spec.architecture == two.spec.architecture
    assert all(one.tensors[name].tobytes() == two.tensors[name].tobytes() for name in one.tensors | two.tensors)


@pytest.mark.skipif(not unit.is_here(), reason="no locked unit of torch, FBGEMM and TorchRec")
def test_torchrecs_own_model_gives_and_takes_the_checkpoint(made: Artifact, tmp_path: Path) -> None:
    """Names, orientation and the order of products are TorchRec's: the scores are the same."""
    from narsil_stream.bench.torchrec_eager import TorchRecEager

    theirs = TorchRecEager(made)  # load_state_dict is strict
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    back = checkpoint.to_artifact(checkpoint.read_checkpoint(tmp_path / "theirs.pt"), "x")
    assert all(np.array_equal(back.tensors[name], made.tensors[name]) for name in made.tensors)
    batch = random_batch(made.spec, 40, 1)
    scores, expected = np.empty(40, np.float32), np.empty(40, np.float32)
    theirs.run(batch, scores)
    Reference(back).run(batch, expected)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


def state(made: Artifact) -> dict[str, Any]:
    return dict(checkpoint.to_state(made))


def test_wrappers_and_buffers_are_left_out(made: Artifact) -> None:
    """DistributedModelParallel and DLRMTrain put `module.` and `model.` before every key."""
    wrapped = {f"module.model.{key}": tensor for key, tensor in state(made).items()}
    wrapped["module.model.inter_arch.triu_indices"] = np.zeros((2, 66), np.int64)
    back = checkpoint.to_artifact(wrapped, "x")
    assert all(np.array_equal(back.tensors[name], made.tensors[name]) for name in made.tensors)


def test_the_order_of_tables_can_be_given() -> None:
    """It decides which product is which; .safetensors forgets it."""
    made = random_model(CROSS, 1)
    back = checkpoint.to_artifact(state(made), "x", tables=["C3", "C1", "C2"])
    assert [table.name for table in back.spec.tables] == ["C3", "C1", "C2"]
    with pytest.raises(ArtifactError, match="each of C1, C2, C3 once"):
        checkpoint.to_artifact(state(made), "x", tables=["C1"])


@pytest.mark.parametrize(
    ("key", "tensor", "told"),
    [
        ("over_arch.model.1.bias", None, "key over_arch.model.1.bias: found no such key"),
        ("over_arch.model.0._mlp.1._linear.bias", np.zeros(8, np.float32), "found float32 [8], expected shape [7]"),
        ("over_arch.model.0._mlp.0._linear.weight", np.zeros((9, 71), np.float32), "expected shape [9,"),
        ("extra.weight", np.zeros(3, np.float32), "key extra.weight: found float32 [3], expected no such key"),
        ("dense_arch.model._mlp.0._linear.bias", np.zeros(6), "found float64 [6]"),
        ("dense_arch.model._mlp.1._linear.weight", np.full((4, 6), np.nan, np.float32), "nan"),
    ],
)
def test_an_unfit_key_is_named_with_what_was_expected(
    made: Artifact, tmp_path: Path, key: str, tensor: Any, told: str
) -> None:
    """People see where their model is another one."""
    given = {name: torch.from_numpy(np.ascontiguousarray(t)) for name, t in state(made).items()}
    given.pop(key, None)
    if tensor is not None:
        given[key] = torch.from_numpy(tensor)
    torch.save(given, tmp_path / "c.pt")
    result = run("import", tmp_path / "c.pt", tmp_path / "m")
    assert result.exit_code == 1
    assert told in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "m").exists()


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """A whole pickled model executes what its author wrote."""
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    (tmp_path / "text.pt").write_text("hello")
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    for name, told in (
        ("whole.pt", "save model.state_dict()"),
        ("text.pt", "save model.state_dict()"),
        ("none.pt", "found nothing"),
        ("none.safetensors", "none.safetensors"),
        ("other.safetensors", "at least one table"),
    ):
        result = run("import", tmp_path / name, tmp_path / "m")
        assert result.exit_code == 1
        assert told in " ".join(result.stderr.replace("│", " ").split())
        assert "Traceback" not in result.stderr


def test_small_rows_are_decoded_for_torchrec_and_bf16_is_widened(tmp_path: Path) -> None:
    """TorchRec's model has FP32 rows; FP32 holds every BF16 number."""
    made = random_model(DOT, 2)
    found = checkpoint.to_state(quantize(made, "INT8"))
    key = "sparse_arch.embedding_bag_collection.embedding_bags.C1.weight"
    assert found[key].dtype == np.float32
    np.testing.assert_allclose(found[key], made.tensors["tables.C1.weight"], atol=0.02)
    half = {name: torch.from_numpy(np.ascontiguousarray(t)).bfloat16() for name, t in checkpoint.to_state(made).items()}
    torch.save({"state_dict": half}, tmp_path / "half.pt")
    back = checkpoint.to_artifact(checkpoint.read_checkpoint(tmp_path / "half.pt"), "x")
    assert {tensor.dtype for tensor in back.tensors.values()} == {np.dtype(np.float32)}


def test_export_keeps_files_that_stand_there_and_models_that_torchrec_lacks(tmp_path: Path) -> None:
    """A slip of the hand must not cost a checkpoint."""
    write(tmp_path / "m", random_model(DOT, 1))
    (tmp_path / "c.pt").write_text("mine")
    result = run("export", tmp_path / "m", tmp_path / "c.pt")
    assert result.exit_code == 1 and "--overwrite" in result.stderr
    assert (tmp_path / "c.pt").read_text() == "mine"
    assert run("export", tmp_path / "m", tmp_path / "c.pt", "--overwrite").exit_code == 0
    write(tmp_path / "flat", random_model(plain_spec("x", 3, [5], 4, (6,), ()), 1))
    assert "architecture.top" in run("export", tmp_path / "flat", tmp_path / "d.pt").stderr
