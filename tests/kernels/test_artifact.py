import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from narsil_stream.kernels import artifact
from narsil_stream.kernels.artifact import MODEL, WEIGHTS, Artifact, ArtifactError, layout, read, read_spec, write
from narsil_stream.kernels.init import random_tensors
from narsil_stream.schemas.model import Architecture, DcnV2, DlrmDot, ModelSpec, Pooling, RowType, Table

names = st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True)
widths = st.integers(1, 9)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    dim = draw(widths)
    dtypes: tuple[RowType, ...] = ("FP32", "FP16", "INT8")
    tables = draw(
        st.lists(st.builds(Table, names, widths, st.sampled_from(dtypes)), min_size=1, unique_by=lambda t: t.name)
    )
    bottom = (*draw(st.lists(widths, max_size=3)), dim)
    top = (*draw(st.lists(widths, max_size=3)), 1)
    pooling: Pooling = draw(st.sampled_from(("sum", "mean")))
    architecture: Architecture = DlrmDot(draw(widths), dim, bottom, top, pooling)
    if draw(st.booleans()):
        architecture = DcnV2(
            draw(widths), dim, bottom, top, pooling, cross_layers=draw(st.integers(1, 3)), cross_rank=draw(widths)
        )
    return ModelSpec(draw(names), architecture, tuple(tables), version=draw(names))


def edit_model(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    spec = json.loads((folder / MODEL).read_bytes())
    change(spec)
    (folder / MODEL).write_text(json.dumps(spec))


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change tensors and give the file its true sha256, so that only the change itself can be refused."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    sha = artifact._sha256(folder / WEIGHTS)
    edit_model(folder, lambda spec: spec["files"].update({WEIGHTS: sha}))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=specs())
def test_every_model_that_is_written_reads_back_the_same(tmp_path: Path, spec: ModelSpec) -> None:
    """A lost field or a changed bit would serve another model than the one that was trained."""
    tensors = random_tensors(spec, seed=3)
    written = write(tmp_path / "model", Artifact(spec, tensors), overwrite=True)
    back = read(tmp_path / "model")
    assert back.spec == written == msgspec.structs.replace(spec, files=written.files)
    assert list(back.tensors) == list(layout(spec))
    for name, tensor in tensors.items():
        assert back.tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(back.tensors[name], tensor)


@pytest.mark.parametrize("step", [1, 100, 1_000])
def test_tensors_read_in_pieces_are_whole(folder: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Pieces let others of the process work meanwhile; one that is lost or doubled would be wrong scores."""
    whole = read(folder).tensors
    monkeypatch.setattr(artifact, "_STEP_BYTES", step)
    pieces = read(folder).tensors
    assert all(np.array_equal(pieces[name], tensor) for name, tensor in whole.items())


def test_the_description_alone_is_readable_without_the_weights(folder: Path) -> None:
    """Metadata of a large model must not cost its load time."""
    (folder / WEIGHTS).unlink()
    assert read_spec(folder).name == "small"


def test_layout_gives_what_the_file_holds(folder: Path) -> None:
    """Sizes that `inspect` prints come from the layout."""
    stored = {name: (t.nbytes, t.shape, t.size) for name, t in load_file(folder / WEIGHTS).items()}
    assert stored == {name: (s.nbytes, s.shape, s.values) for name, s in layout(read_spec(folder)).items()}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_bit_anywhere_in_the_weights_is_noticed(folder: Path, data: st.DataObject) -> None:
    """Bit rot and half-finished copies must not become wrong scores."""
    good = (folder / WEIGHTS).read_bytes()
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / WEIGHTS).write_bytes(bad)
    with pytest.raises(ArtifactError, match=rf"{WEIGHTS}: found sha256 [0-9a-f]{{64}}, expected [0-9a-f]{{64}}"):
        read(folder)
    (folder / WEIGHTS).write_bytes(good)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=300), keep=st.integers(0, 300))
def test_no_weights_file_however_odd_gives_more_than_an_artifact_error(folder: Path, junk: bytes, keep: int) -> None:
    """A registry may hand over anything, with a sha256 that fits."""
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep] + junk)
    sha = artifact._sha256(folder / WEIGHTS)
    edit_model(folder, lambda spec: spec["files"].update({WEIGHTS: sha}))
    with pytest.raises(ArtifactError):
        read(folder)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.one_of(st.binary(max_size=300), st.from_type(dict).map(lambda d: json.dumps(d, default=str).encode())))
def test_no_description_however_odd_gives_more_than_an_artifact_error(folder: Path, junk: bytes) -> None:
    """A registry may hand over anything."""
    (folder / MODEL).write_bytes(junk)
    with pytest.raises(ArtifactError, match=MODEL):
        read(folder)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_weights_file_is_refused(folder: Path, kept: int) -> None:
    """An interrupted download is the most common damage of all."""
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:kept])
    with pytest.raises(ArtifactError, match="sha256"):
        read(folder)


def with_nan(tensors: dict[str, Any]) -> None:
    tensors["top.0.weight"][2, 3] = np.nan


def with_infinite_scale(tensors: dict[str, Any]) -> None:
    tensors["tables.t2.scale_bias"][4, 0] = -np.inf


WEIGHT_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda t: t.pop("bottom.1.bias"), r"tensor bottom.1.bias: found no such tensor, expected F32 \[4\]"),
    "extra": (lambda t: t.update(x=np.zeros(2, np.int64)), r"tensor x: found a tensor I64 \[2\], expected none"),
    "shape": (
        lambda t: t.update({"tables.t1.weight": np.zeros((2, 4), np.uint8)}),
        r"tensor tables.t1.weight: found U8 \[2, 4\], expected U8 \[1, 4\]",
    ),
    "transposed": (
        lambda t: t.update({"bottom.0.weight": np.zeros((3, 5), np.float32)}),
        r"tensor bottom.0.weight: found F32 \[3, 5\], expected F32 \[5, 3\]",
    ),
    "type": (
        lambda t: t.update({"top.1.bias": np.zeros(1)}),
        r"tensor top.1.bias: found F64 \[1\], expected F32 \[1\]",
    ),
    "nan": (with_nan, r"tensor top.0.weight: found nan at \[2, 3\], expected finite numbers"),
    "infinity": (with_infinite_scale, r"tensor tables.t2.scale_bias: found -inf at \[4, 0\], expected finite numbers"),
}


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_weights_that_do_not_fit_the_description_are_refused_by_name(folder: Path, fault: str) -> None:
    """Without the tensor's name, what was found and what was expected, nobody can repair an artifact."""
    change, message = WEIGHT_FAULTS[fault]
    edit_weights(folder, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        read(folder)
    assert "Next: " in str(caught.value)


def test_a_nan_past_the_first_block_of_a_big_tensor_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check goes through big tables in blocks: the last one counts too."""
    monkeypatch.setattr(artifact, "_STEP_VALUES", 3)
    edit_weights(folder, with_nan)
    with pytest.raises(ArtifactError, match=r"found nan at \[2, 3\]"):
        read(folder)


MODEL_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no sha256": (lambda s: s.pop("files"), f"no sha256 of {WEIGHTS}"),
    "wrong sha256": (lambda s: s["files"].update({WEIGHTS: "0" * 64}), "expected 0000"),
    "short sha256": (lambda s: s["files"].update({WEIGHTS: "0" * 63}), "unfit description"),
    "path out": (lambda s: s["files"].update({"../secret": "0" * 64}), "unfit description"),
    "absolute path": (lambda s: s["files"].update({"/etc/passwd": "0" * 64}), "unfit description"),
    "hidden name": (lambda s: s["files"].update({"..": "0" * 64}), "unfit description"),
    "name with newline": (lambda s: s["files"].update({"a\n": "0" * 64}), "unfit description"),
    "absent file": (lambda s: s["files"].update({"more.bin": "0" * 64}), "more.bin: found nothing"),
    "unknown field": (lambda s: s.update(code="import os"), "unknown field `code`"),
    "format of the future": (lambda s: s.update(format=2), "unfit description"),
    "other architecture": (lambda s: s["architecture"].update(kind="mlp"), "unfit description"),
    "architecture without a kind": (lambda s: s["architecture"].pop("kind"), "missing required field `kind`"),
    "cross network without a rank": (
        lambda s: s["architecture"].update(kind="dcn-v2", cross_layers=3),
        "missing required field `cross_rank`",
    ),
    "cross network in a dot model": (lambda s: s["architecture"].update(cross_rank=3), "unknown field `cross_rank`"),
    "pooling": (lambda s: s["architecture"].update(pooling="max"), "Invalid enum value 'max'"),
    "name that leaves its subject": (lambda s: s.update(name="a.b"), "unfit description"),
    "name with a line end": (lambda s: s.update(name="a\n"), "unfit description"),
    "dim": (lambda s: s["architecture"].update(dim=5), "must end in dim=5, got 4"),
    "two tables of one name": (lambda s: s["tables"][0].update(name="t1"), "different names"),
    "criteo shape": (lambda s: s.update(preprocessing={"kind": "criteo"}), "got 3 and 3"),
    "row count": (lambda s: s["tables"][0].update(rows=0), r"tables\[0\]|tables\[...\]"),
}


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_a_description_with_a_fault_is_refused_with_its_place(folder: Path, fault: str) -> None:
    """`model.json` is edited by hand sooner or later."""
    change, message = MODEL_FAULTS[fault]
    edit_model(folder, change)
    with pytest.raises(ArtifactError, match=message):
        read(folder)


STORED: dict[str, tuple[str, Architecture]] = {
    "dlrm-dot": (
        '{"kind": "dlrm-dot", "dense": 3, "dim": 4, "bottom": [5, 4], "top": [6, 1], "pooling": "sum"}',
        DlrmDot(dense=3, dim=4, bottom=(5, 4), top=(6, 1), pooling="sum"),
    ),
    "dcn-v2": (
        '{"kind": "dcn-v2", "dense": 3, "dim": 4, "bottom": [5, 4], "top": [6, 1], "pooling": "mean", '
        '"cross_layers": 2, "cross_rank": 7}',
        DcnV2(dense=3, dim=4, bottom=(5, 4), top=(6, 1), pooling="mean", cross_layers=2, cross_rank=7),
    ),
}


@pytest.mark.parametrize("kind", STORED)
def test_a_description_of_an_earlier_release_means_what_it_meant(folder: Path, kind: str) -> None:
    """Artifacts outlive releases."""
    text, architecture = STORED[kind]
    tables = '[{"name": "C1", "rows": 9, "dtype": "INT8"}]'
    (folder / MODEL).write_text(f'{{"name": "ctr", "architecture": {text}, "tables": {tables}, "files": {{}}}}')
    assert read_spec(folder) == ModelSpec("ctr", architecture, (Table("C1", 9, "INT8"),))


def test_a_table_larger_than_memory_is_refused_before_it_takes_any(folder: Path) -> None:
    """Only a file that really holds the rows may cost their memory."""
    edit_model(folder, lambda s: s["tables"][2].update(rows=2**31 - 1))
    with pytest.raises(ArtifactError, match=r"found U8 \[30, 4\], expected U8 \[2147483647, 4\]"):
        read(folder)


def test_an_oversized_description_is_not_read_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A huge file under that name must not fill the memory."""
    monkeypatch.setattr(artifact, "MAX_MODEL_BYTES", 10)
    with pytest.raises(ArtifactError, match="at most 10"):
        read_spec(folder)


def test_a_missing_folder_says_how_to_make_one(tmp_path: Path) -> None:
    """The first mistake of a new user is a wrong path."""
    with pytest.raises(ArtifactError, match=r"no-such/model.json: found nothing.*narsil model init"):
        read(tmp_path / "no-such")


def test_a_folder_in_a_files_place_is_refused(folder: Path) -> None:
    """Opening a folder or a pipe as a file would hang or fail without a name."""
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    with pytest.raises(ArtifactError, match="something that is not a file"):
        read(folder)


def test_weights_replaced_while_they_are_read_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A swap between the hash and the load would use bytes that nobody checked."""
    hashes = artifact.check_hashes

    def swap_after_check(path: Path, spec: ModelSpec) -> None:
        hashes(path, spec)
        edit_weights(path, lambda tensors: tensors["top.1.bias"].fill(9))

    monkeypatch.setattr(artifact, "check_hashes", swap_after_check)
    with pytest.raises(ArtifactError, match="changed while it was read"):
        read(folder)


def test_writing_over_an_artifact_needs_to_be_asked_for(folder: Path, model: Artifact) -> None:
    """A slip of the hand must not cost a trained model."""
    before = (folder / WEIGHTS).read_bytes()
    with pytest.raises(ArtifactError, match="--overwrite"):
        write(folder, model)
    assert (folder / WEIGHTS).read_bytes() == before
    write(folder, model, overwrite=True)
    assert read(folder).spec.tables == model.spec.tables


def test_a_folder_that_holds_other_things_is_never_replaced(tmp_path: Path, model: Artifact) -> None:
    """`--overwrite` with the wrong folder must not delete a home."""
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"a folder that holds thesis.txt"):
        write(tmp_path, model, overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


def test_a_failed_write_leaves_neither_a_half_artifact_nor_rubbish(
    folder: Path, model: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk in the middle of a write must leave the old model in service."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, "save_file", full_disk)
    with pytest.raises(ArtifactError, match="No space left on device"):
        write(folder, model, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_tensors_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path, model: Artifact) -> None:
    """What cannot be loaded must not be stored."""
    tensors = {name: t for name, t in model.tensors.items() if name != "top.0.bias"}
    with pytest.raises(ArtifactError, match=r"top.0.bias: found no such tensor"):
        write(tmp_path / "model", Artifact(model.spec, tensors))
    assert list(tmp_path.iterdir()) == []


def test_metrics_that_json_cannot_hold_are_refused_on_writing(tmp_path: Path, model: Artifact) -> None:
    """NaN becomes null in JSON: the artifact would never load again."""
    spec = msgspec.structs.replace(model.spec, metrics={"auc": float("nan")})
    with pytest.raises(ArtifactError, match="metrics"):
        write(tmp_path / "model", Artifact(spec, model.tensors))


def test_an_artifact_is_readable_for_others_as_the_umask_says(tmp_path: Path, model: Artifact) -> None:
    """The server often runs as another user than the trainer."""
    old = os.umask(0o022)
    try:
        write(tmp_path / "model", model)
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model", *(tmp_path / "model").iterdir())}
    assert modes == {"model": 0o755, MODEL: 0o644, WEIGHTS: 0o644}
