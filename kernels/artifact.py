"""An artifact on disk: a folder of `model.json` (what the model is) and `weights.safetensors` (its numbers).

Nothing in it executes. Every file is hashed before use, every tensor is checked against the description.
"""

import contextlib
import hashlib
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from narsil_stream.schemas.codec import UNDECODABLE
from narsil_stream.schemas.model import DcnV2, ModelSpec, Table

MODEL = "model.json"
WEIGHTS = "weights.safetensors"
MAX_MODEL_BYTES = 8 << 20
"""Of `model.json`: far above 4096 tables, far below what would hurt to read."""

_STEP_VALUES = 1 << 20
"""Values checked for NaN at a time, so that a check of a big table needs little memory."""

_STEP_BYTES = 4 << 20
"""Bytes copied at a time."""

Tensors = Mapping[str, NDArray[Any]]


class ArtifactError(Exception):
    """An artifact that cannot be used or written: says where, what was found, what was expected, what to do next."""

    def __init__(self, where: str, found: str, expected: str, step: str) -> None:
        super().__init__(f"{where}: found {found}, expected {expected}. Next: {step}.")
        self.where = where
        self.found = found
        self.expected = expected
        self.step = step


class Slot(NamedTuple):
    """Type and shape that the description gives to one tensor."""

    dtype: str
    """By the names of safetensors: F32, F16, U8."""
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.values * _DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Artifact(Struct, frozen=True):
    """A model in memory: its description and exactly the tensors that `layout(spec)` names."""

    spec: ModelSpec
    tensors: Tensors


_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "U8": np.dtype("u1")}
_ROWS = {"FP32": "F32", "FP16": "F16", "INT8": "U8"}
_RESTORE = "restore the file from its source, or write the artifact again"


def layout(spec: ModelSpec) -> dict[str, Slot]:
    """Every tensor of a model by name, in model order: bottom MLP, tables, cross network (DCNv2), top MLP."""
    shape = spec.architecture
    slots = _mlp_layout("bottom", spec.n_dense, shape.bottom)
    for table in spec.tables:
        slots |= table_layout(table, shape.dim)
    if isinstance(shape, DcnV2):
        slots |= _cross_layout(shape, spec.top_input)
    return slots | _mlp_layout("top", spec.top_input, shape.top)


def table_layout(table: Table, dim: int) -> dict[str, Slot]:
    """The tensors of one table: its rows and, for INT8 rows, an FP16 (scale, bias) for each row."""
    slots = {f"tables.{table.name}.weight": Slot(_ROWS[table.dtype], (table.rows, dim))}
    if table.dtype == "INT8":
        slots[f"tables.{table.name}.scale_bias"] = Slot("F16", (table.rows, 2))
    return slots


def read(folder: Path) -> Artifact:
    """Check and load a whole artifact. Each tensor is copied once, from the file into memory of its own.

    Raises ArtifactError: a file is missing, unreadable, altered, or changes meanwhile; a tensor is missing, unnamed, of
    another type or shape, or holds NaN or infinity.
    """
    spec = read_spec(folder)
    weights = folder / WEIGHTS
    with _explained(weights):
        before = _stamp(weights)
        check_hashes(folder, spec)
        tensors = _read_tensors(weights, layout(spec))
        if _stamp(weights) != before:
            raise ArtifactError(
                str(weights), "a file that changed while it was read", "a file at rest", "load it again"
            )
    _check_finite(WEIGHTS, tensors)
    return Artifact(spec, tensors)


def read_spec(folder: Path) -> ModelSpec:
    """Read `model.json` alone: quick, whatever the size of the tables; no weight is looked at.

    Raises ArtifactError: no such folder, not JSON, an unknown or missing field, a value out of range.
    """
    path = folder / MODEL
    with _explained(path):
        _need_file(path)
        size = path.stat().st_size
        if size > MAX_MODEL_BYTES:
            raise ArtifactError(
                str(path), f"{size} bytes", f"at most {MAX_MODEL_BYTES}", "check that it is a model.json"
            )
        return _decode_spec(path.read_bytes(), str(path))


def check_hashes(folder: Path, spec: ModelSpec) -> None:
    """Compare the sha256 of each file that the description names. Raises ArtifactError for the first that differs."""
    if WEIGHTS not in spec.files:
        raise ArtifactError(
            str(folder / MODEL),
            f"no sha256 of {WEIGHTS} in `files`",
            "one for each file",
            "write the artifact again with `narsil model` or kernels.artifact.write",
        )
    for name, expected in spec.files.items():
        _need_file(folder / name)
        found = _sha256(folder / name)
        if found != expected:
            raise ArtifactError(str(folder / name), f"sha256 {found}", expected, _RESTORE)


def write(folder: Path, artifact: Artifact, *, overwrite: bool = False) -> ModelSpec:
    """Write an artifact whole or not at all, and return its description with the sha256 of each file filled in.

    With `overwrite` an artifact that stands there steps aside and is removed after the new one has its place; a folder
    that holds anything else is never touched. Raises ArtifactError: the target is taken, cannot be written, or the
    tensors do not fit the description.
    """
    spec = check_spec(artifact.spec)
    _check_tensors(artifact)
    folder = folder.absolute()
    with _explained(folder), _beside(folder) as fresh:
        need_free(folder, overwrite)
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        save_file({name: np.ascontiguousarray(t) for name, t in artifact.tensors.items()}, fresh / WEIGHTS)
        spec = msgspec.structs.replace(spec, files={WEIGHTS: _sha256(fresh / WEIGHTS)})
        (fresh / MODEL).write_bytes(msgspec.json.format(msgspec.json.encode(spec), indent=2) + b"\n")
        (fresh / WEIGHTS).chmod((fresh / MODEL).stat().st_mode)  # safetensors makes files for their owner alone
        _sync(fresh / WEIGHTS, fresh / MODEL, fresh)
        _swap(fresh, folder)
        _sync(folder.parent)
    return spec


def check_spec(spec: ModelSpec) -> ModelSpec:
    """The description as a reader will decode it. Constructors of Structs do not check names and ranges: decoding does.

    Raises ArtifactError for what could not be read back.
    """
    return _decode_spec(msgspec.json.encode(spec), MODEL)


def need_free(folder: Path, overwrite: bool) -> None:
    """Raise the ArtifactError that `write` would raise for this target: to ask before hours of work, not after."""
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir() or folder.is_symlink():
        raise ArtifactError(str(folder), "a file or a link", "a free name or a folder", "choose another name")
    if strangers := sorted(entry.name for entry in folder.iterdir() if entry.name not in (MODEL, WEIGHTS)):
        raise ArtifactError(
            str(folder), f"a folder that holds {strangers[0]}", f"only {MODEL} and {WEIGHTS}", "choose another name"
        )
    if not overwrite and any(folder.iterdir()):
        raise ArtifactError(
            str(folder), "an artifact", "a free name", "choose another name, or overwrite it on purpose (--overwrite)"
        )


def _mlp_layout(part: str, inputs: int, outputs: tuple[int, ...]) -> dict[str, Slot]:
    slots: dict[str, Slot] = {}
    for i, (wide, out) in enumerate(zip((inputs, *outputs[:-1]), outputs, strict=True)):
        slots[f"{part}.{i}.weight"] = Slot("F32", (out, wide))
        slots[f"{part}.{i}.bias"] = Slot("F32", (out,))
    return slots


def _cross_layout(shape: DcnV2, width: int) -> dict[str, Slot]:
    """Of each cross layer: v [rank, width], w [width, rank], bias [width]."""
    slots: dict[str, Slot] = {}
    for i in range(shape.cross_layers):
        slots[f"cross.{i}.v"] = Slot("F32", (shape.cross_rank, width))
        slots[f"cross.{i}.w"] = Slot("F32", (width, shape.cross_rank))
        slots[f"cross.{i}.bias"] = Slot("F32", (width,))
    return slots


def _decode_spec(data: bytes, where: str) -> ModelSpec:
    try:
        return msgspec.json.decode(data, type=ModelSpec)
    except UNDECODABLE as error:
        raise ArtifactError(
            where, f"an unfit description ({error})", "a model description of format 1", _RESTORE
        ) from error


def _read_tensors(path: Path, expected: Mapping[str, Slot]) -> dict[str, NDArray[Any]]:
    """Look at all names, types and shapes before the first tensor takes memory."""
    try:
        with safe_open(path, framework="np") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            _check_slots(path.name, {n: Slot(s.get_dtype(), tuple(s.get_shape())) for n, s in found.items()}, expected)
            return {name: _copied(found[name], slot) for name, slot in expected.items()}
    except SafetensorError as error:
        raise ArtifactError(str(path), f"an unreadable file ({error})", "a safetensors file", _RESTORE) from error


def _copied(tensor: Any, slot: Slot) -> NDArray[Any]:
    """In pieces: the library holds the interpreter while it copies, and an executor that loads has others to serve."""
    out = np.empty(slot.shape, _DTYPES[slot.dtype])
    count = slot.shape[0]
    step = max(1, _STEP_BYTES * count // slot.nbytes)
    for start in range(0, count, step):
        end = min(start + step, count)
        out[start:end] = tensor[start:end]
    return out


def _check_slots(file: str, found: Mapping[str, Slot], expected: Mapping[str, Slot]) -> None:
    for name in sorted(expected.keys() - found.keys()):
        _unfit(file, name, "no such tensor", str(expected[name]))
    for name in sorted(found.keys() - expected.keys()):
        _unfit(file, name, f"a tensor {found[name]}", f"none of this name: {MODEL} has no place for it")
    for name, slot in expected.items():
        if found[name] != slot:
            _unfit(file, name, str(found[name]), str(slot))


def _unfit(file: str, tensor: str, found: str, expected: str) -> NoReturn:
    raise ArtifactError(f"{file}, tensor {tensor}", found, expected, f"correct {MODEL} or write the artifact again")


def _check_finite(file: str, tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        for start in range(0, flat.size if tensor.dtype.kind == "f" else 0, _STEP_VALUES):
            finite = np.isfinite(flat[start : start + _STEP_VALUES])
            if not finite.all():
                at = start + int(finite.argmin())
                place = [int(i) for i in np.unravel_index(at, tensor.shape)]
                _unfit(file, name, f"{flat[at]} at {place}", "finite numbers")


def _check_tensors(artifact: Artifact) -> None:
    names = {dtype: name for name, dtype in _DTYPES.items()}
    found = {n: Slot(names.get(t.dtype, str(t.dtype)), t.shape) for n, t in artifact.tensors.items()}
    _check_slots(WEIGHTS, found, layout(artifact.spec))
    _check_finite(WEIGHTS, artifact.tensors)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        found = error.strerror or str(error)
        raise ArtifactError(
            str(error.filename or path), found, "a readable, writable place", "check its permissions and space"
        ) from error


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A name for a temporary folder on the same file system; whatever stands there in the end is removed."""
    path = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.tmp"
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _swap(fresh: Path, folder: Path) -> None:
    """Put `fresh` in the place of `folder`. A rename cannot replace a full folder: that one steps aside first."""
    if not folder.exists():
        fresh.rename(folder)
        return
    with _beside(folder) as old:
        folder.rename(old)
        try:
            fresh.rename(folder)
        except OSError:
            old.rename(folder)
            raise


def _sync(*paths: Path) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path) -> tuple[int, int, int]:
    _need_file(path)
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _need_file(path: Path) -> None:
    if not path.is_file():
        found = "something that is not a file" if path.exists() else "nothing"
        raise ArtifactError(
            str(path), found, "a file of the artifact", "check the path; `narsil model init` makes an artifact to try"
        )
