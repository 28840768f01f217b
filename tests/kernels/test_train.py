import sys
from pathlib import Path

import numpy as np
import pytest

from narsil_stream.core.criteo import Parser
from narsil_stream.kernels import artifact, reference
from narsil_stream.kernels.artifact import ArtifactError
from narsil_stream.kernels.backend import RaggedBatch
from narsil_stream.kernels.init import Cross, criteo_spec
from narsil_stream.kernels.metrics import auc
from narsil_stream.kernels.synthetic import clicks
from narsil_stream.kernels.train import Progress, Settings, TrainError, train
from narsil_stream.schemas.model import ModelSpec

SPEC = criteo_spec(name="trained", rows=2000, dim=8, bottom=(16,), top=(32,))
CROSS = criteo_spec(name="trained", rows=2000, dim=8, bottom=(16,), top=(32,), cross=Cross(2, 16))


def unwatched(_: Progress) -> None:
    pass


@pytest.fixture
def torch() -> None:
    pytest.importorskip("torch", reason="torch is not installed")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "clicks.tsv"
    path.write_bytes(b"".join(piece.text for piece in clicks(30_000, seed=1)))
    return path


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("given", [SPEC, CROSS], ids=["dot", "cross"])
def test_training_finds_much_of_what_can_be_found(data: Path, tmp_path: Path, given: ModelSpec) -> None:
    """A loss with the wrong sign, labels moved by a row, or weights stored transposed all end near an AUC of 0.5."""
    seen: list[Progress] = []
    spec = train(data, tmp_path / "model", given, Settings(epochs=2, batch_rows=256), seen.append)
    assert spec.metrics["auc"] > 0.66
    assert spec.metrics["log_loss"] < 0.5
    assert (spec.metrics["train_rows"], spec.metrics["holdout_rows"]) == (27_000, 3000)
    assert artifact.read(tmp_path / "model").spec == spec
    assert spec.preprocessing is not None

    done = [progress.done for progress in seen]
    assert done == sorted(done)
    assert (seen[0].stage, seen[-1].stage, done[-1]) == ("epoch 1/2", "measuring", 1.0)


@pytest.mark.usefixtures("torch")
def test_the_metrics_are_those_of_the_served_scores_on_the_held_out_lines(data: Path, tmp_path: Path) -> None:
    """A number that cannot be reproduced from the artifact is worth nothing."""
    spec = train(data, tmp_path / "model", SPEC, Settings(holdout_every=7), unwatched)
    rows = Parser([table.rows for table in spec.tables]).feed(data.read_bytes())
    scores = np.empty(len(rows.lines), np.float32)
    reference.load(tmp_path / "model").run(RaggedBatch(rows.dense, rows.sparse.reshape(-1)), scores)
    assert rows.labels is not None
    held = rows.lines % 7 == 0
    assert spec.metrics["auc"] == pytest.approx(auc(rows.labels[held], scores[held]), abs=1e-4)
    assert spec.metrics["holdout_rows"] == held.sum()


@pytest.mark.usefixtures("torch")
def test_the_same_data_and_settings_give_the_same_model(data: Path, tmp_path: Path) -> None:
    """Whoever repeats a training must be able to tell that they got the same thing."""
    small = tmp_path / "small.tsv"
    small.write_bytes(b"".join(data.read_bytes().splitlines(keepends=True)[:2000]))
    first = train(small, tmp_path / "first", SPEC, Settings(), unwatched)
    again = train(small, tmp_path / "again", SPEC, Settings(), unwatched)
    assert first.metrics == pytest.approx(again.metrics)
    one, two = (artifact.read(tmp_path / name).tensors for name in ("first", "again"))
    for name, tensor in one.items():
        np.testing.assert_allclose(tensor, two[name], atol=1e-5)


@pytest.mark.usefixtures("torch")
def test_a_bad_row_ends_training_by_name_or_is_left_out_and_counted(data: Path, tmp_path: Path) -> None:
    """Damage in a training file must be seen, and must not stop those who expect it."""
    lines = data.read_bytes().splitlines(keepends=True)[:300]
    lines[41] = lines[41].replace(b"\t", b"\tx", 1)
    (tmp_path / "bad.tsv").write_bytes(b"".join(lines))
    with pytest.raises(TrainError, match=r"bad.tsv, line 42, I1: found 'x.*--skip-bad"):
        train(tmp_path / "bad.tsv", tmp_path / "model", SPEC, Settings(), unwatched)
    spec = train(tmp_path / "bad.tsv", tmp_path / "model", SPEC, Settings(skip_bad=True), unwatched)
    assert (spec.metrics["skipped_rows"], spec.metrics["train_rows"]) == (1, 269)


@pytest.mark.usefixtures("torch")
def test_metrics_that_mean_nothing_are_absent(tmp_path: Path) -> None:
    """Nine rows hold none out: an AUC of nothing is not 0, and NaN would make the artifact unreadable."""
    (tmp_path / "few.tsv").write_bytes(b"".join(piece.text for piece in clicks(9, seed=1)))
    spec = train(tmp_path / "few.tsv", tmp_path / "model", SPEC, Settings(), unwatched)
    assert spec.metrics == {"train_rows": 9, "holdout_rows": 0, "skipped_rows": 0}


@pytest.mark.usefixtures("torch")
def test_a_loss_that_diverges_is_told_and_nothing_is_written(data: Path, tmp_path: Path) -> None:
    """A model of NaN must not replace a good one."""
    with pytest.raises(TrainError, match="lower learning rate"):
        train(data, tmp_path / "model", SPEC, Settings(learning_rate=1e20), unwatched)
    assert not (tmp_path / "model").exists()


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(
    ("text", "message"),
    [(b"", "no rows to train on"), (b"\t" * 38 + b"\n", r"found 39 fields, expected 40 \(with a label\)")],
)
def test_a_file_without_labelled_rows_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    """The test half of the data set has no labels: a likely mistake."""
    (tmp_path / "data.tsv").write_bytes(text)
    with pytest.raises(TrainError, match=message):
        train(tmp_path / "data.tsv", tmp_path / "model", SPEC, Settings(), unwatched)


@pytest.mark.usefixtures("torch")
def test_what_would_fail_in_the_end_fails_at_the_start(data: Path, tmp_path: Path) -> None:
    """Hours of training must not end in `the folder is taken`."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("keep")
    nameless = criteo_spec(name="not a name", rows=2000)
    for spec, folder, message in [(SPEC, "model", "notes.txt"), (nameless, "other", r"\$\.name")]:
        with pytest.raises(ArtifactError, match=message):
            train(tmp_path / "absent.tsv", tmp_path / folder, spec, Settings(), unwatched)
    with pytest.raises(TrainError, match=r"absent.tsv: No such file"):
        train(tmp_path / "absent.tsv", tmp_path / "other", SPEC, Settings(), unwatched)


def test_without_torch_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default installation has no torch; nobody should meet an ImportError."""
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(TrainError, match=r"make setup"):
        train(tmp_path / "data.tsv", tmp_path / "model", SPEC, Settings(), unwatched)


@pytest.mark.usefixtures("torch")
def test_real_rows_train(real_rows: Path, tmp_path: Path) -> None:
    """Synthetic rows have only the oddities that somebody thought of."""
    spec = train(real_rows / "criteo_rows.tsv", tmp_path / "model", SPEC, Settings(epochs=3), unwatched)
    assert spec.metrics["train_rows"] + spec.metrics["holdout_rows"] == 300
    assert spec.metrics["log_loss"] < 1
