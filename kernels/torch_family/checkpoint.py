"""Checkpoints of TorchRec's DLRM and DLRM_DCN: state dicts, into artifacts and back.

    sparse_arch.embedding_bag_collection.embedding_bags.<table>.weight [rows, dim]
    dense_arch.model._mlp.<i>._linear.weight|bias           the bottom MLP
    inter_arch.crossnet.V_kernels|W_kernels|bias.<i>        the cross network of DLRM_DCN
    over_arch.model.0._mlp.<i>._linear.weight|bias          the top MLP but for its last layer
    over_arch.model.1.weight|bias                           its last layer

Whatever stands before these (`module.`, `model.`) is left out. TorchRec orders the products of a dot interaction
(0,1), (0,2) ... (1,2) ..., we (1,0), (2,0), (2,1) ...: the first top layer's columns are permuted, nothing is rounded.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from narsil_stream.kernels.artifact import Artifact, ArtifactError, check_spec, layout
from narsil_stream.kernels.reference import Rows, lookup
from narsil_stream.schemas.model import (
    CRITEO_SHAPE,
    Architecture,
    DcnV2,
    DlrmDot,
    ModelSpec,
    Pooling,
    Preprocessing,
    RowType,
    Table,
)

Floats = NDArray[Any]
State = Mapping[str, Floats]
Watch = Callable[[float], None]
"""Told how much is done, 0 to 1."""

_TABLES = "sparse_arch.embedding_bag_collection.embedding_bags."
_FIRST = "dense_arch.model._mlp.0._linear.weight"
_BUFFERS = ("inter_arch.triu_indices",)
"""Older versions of TorchRec saved these; they say nothing."""
_KNOWN: dict[np.dtype[Any], RowType] = {np.dtype(np.float32): "FP32", np.dtype(np.float16): "FP16"}


def read_checkpoint(path: Path) -> dict[str, Floats]:
    """All tensors of a file by name, in its order: .safetensors, or what torch.save made of a state dict.

    torch loads with weights_only=True: nothing in the file executes. Raises ArtifactError, OSError.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    torch = _torch(path)
    if not path.is_file():
        raise ArtifactError(str(path), "nothing", "a checkpoint file", "check the path")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many classes, pickle's among them
        found = "what torch does not load without running code from it, or cannot read"
        step = "save model.state_dict() with torch.save, or a .safetensors file, not the model itself"
        raise ArtifactError(str(path), f"{found} ({type(error).__name__})", "a state dict", step) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise ArtifactError(str(path), f"a {type(found).__name__}", "a state dict", "save model.state_dict()")
    return {str(name): _plain(torch, str(name), tensor) for name, tensor in found.items()}


def write_checkpoint(path: Path, state: State) -> None:
    """By the name's end: .safetensors, or for torch.load."""
    if path.suffix == ".safetensors":
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in state.items()}, path)
        return
    torch = _torch(path)
    torch.save({name: torch.from_numpy(np.ascontiguousarray(tensor)) for name, tensor in state.items()}, path)


def to_artifact(
    state: State,
    name: str,
    version: str = "1",
    *,
    pooling: Pooling = "sum",
    tables: Sequence[str] = (),
    watch: Watch = lambda done: None,
) -> Artifact:
    """A model from a state dict. Tables keep FP32 or FP16 rows, layers become FP32.

    `pooling` and `tables`, their order in the EmbeddingBagCollection, are not in a state dict: by default sum, and the
    order of its keys. Raises ArtifactError with the key, its shape and what was expected.
    """
    state = _without_prefix(state)
    spec = _describe(state, name, version, pooling, tables)
    tensors: dict[str, Floats] = {}
    keys = _keys(spec)
    slots = layout(spec)
    for key in sorted(state.keys() - set(keys.values())):
        raise ArtifactError(f"key {key}", _shape(state[key]), "no such key in a DLRM", "import a DLRM or DLRM_DCN")
    for i, (ours, theirs) in enumerate(keys.items()):
        found, expected = _need(state, theirs), slots[ours].shape
        if found.shape != expected:
            raise ArtifactError(f"key {theirs}", _shape(found), f"shape {list(expected)}", "check what was saved")
        keep = ours.startswith("tables.")
        tensors[ours] = np.ascontiguousarray(found if keep else found.astype(np.float32))
        watch((i + 1) / len(keys))
    if isinstance(spec.architecture, DlrmDot):
        first = tensors["top.0.weight"]
        tensors["top.0.weight"] = permuted = np.empty_like(first)
        permuted[:, _their_columns(spec)] = first
    return Artifact(spec, tensors)


def to_state(artifact: Artifact, watch: Watch = lambda done: None) -> dict[str, Floats]:
    """The state dict of TorchRec's model, all FP32: INT8 and FP16 rows are decoded. Raises ArtifactError."""
    spec, tensors = artifact.spec, artifact.tensors
    if len(spec.architecture.top) < 2:
        raise ArtifactError("architecture.top", "one layer", "two or more, as TorchRec has", "train another top MLP")
    keys = _keys(spec)
    state: dict[str, Floats] = {}
    for i, (ours, theirs) in enumerate(keys.items()):
        tensor = tensors[ours]
        if ours.startswith("tables."):
            stored = Rows(tensor, tensors.get(ours.removesuffix("weight") + "scale_bias"))
            tensor = lookup(stored, np.arange(len(tensor), dtype=np.int32))
        elif ours == "top.0.weight" and isinstance(spec.architecture, DlrmDot):
            tensor = tensor[:, _their_columns(spec)]
        state[theirs] = tensor
        watch((i + 1) / len(keys))
    return state


def _describe(state: State, name: str, version: str, pooling: Pooling, order: Sequence[str]) -> ModelSpec:
    found = [key[len(_TABLES) : -len(".weight")] for key in state if key.startswith(_TABLES)]
    if not found:
        raise ArtifactError(f"key {_TABLES}<table>.weight", "no such key", "at least one table", "import a DLRM")
    if order and sorted(order) != sorted(found):
        raise ArtifactError(
            "the order of tables", ", ".join(order), f"each of {', '.join(found)} once", "name them all"
        )
    bottom, top = _widths(state, "dense_arch.model._mlp"), _widths(state, "over_arch.model.0._mlp")
    dense = _need(state, _FIRST).shape[1]
    tables = tuple(_table(state, table) for table in order or found)
    layers = (dense, bottom[-1], bottom, (*top, 1), pooling)
    cross = sum(key.startswith("inter_arch.crossnet.V_kernels.") for key in state)
    architecture: Architecture = DlrmDot(*layers)
    if cross:
        rank = _need(state, "inter_arch.crossnet.V_kernels.0").shape[0]
        architecture = DcnV2(*layers, cross_layers=cross, cross_rank=rank)
    spec = ModelSpec(name=name, architecture=architecture, tables=tables, version=version)
    if (spec.n_dense, spec.n_sparse) == CRITEO_SHAPE:
        spec = replace(spec, preprocessing=Preprocessing())
    return check_spec(spec)


def _keys(spec: ModelSpec) -> dict[str, str]:
    """Ours -> TorchRec's, for every tensor but scales."""
    shape = spec.architecture
    keys: dict[str, str] = {}
    last = len(shape.top) - 1
    for kind in ("weight", "bias"):
        keys |= {f"bottom.{i}.{kind}": f"dense_arch.model._mlp.{i}._linear.{kind}" for i in range(len(shape.bottom))}
        keys |= {f"top.{i}.{kind}": f"over_arch.model.0._mlp.{i}._linear.{kind}" for i in range(last)}
        keys[f"top.{last}.{kind}"] = f"over_arch.model.1.{kind}"
    keys |= {f"tables.{table.name}.weight": f"{_TABLES}{table.name}.weight" for table in spec.tables}
    if isinstance(shape, DcnV2):
        names = {"v": "V_kernels", "w": "W_kernels", "bias": "bias"}
        for ours, theirs in names.items():
            keys |= {f"cross.{i}.{ours}": f"inter_arch.crossnet.{theirs}.{i}" for i in range(shape.cross_layers)}
    return keys


def _their_columns(spec: ModelSpec) -> NDArray[np.intp]:
    """Column c of TorchRec's first top layer is our column out[c]."""
    dim = spec.architecture.dim
    low, high = np.triu_indices(spec.n_sparse + 1, k=1)
    return np.concatenate([np.arange(dim), dim + high * (high - 1) // 2 + low])


def _without_prefix(state: State) -> dict[str, Floats]:
    wrapped = [key.removesuffix(_FIRST) for key in state if key.endswith(_FIRST)]
    prefix = wrapped[0] if len(wrapped) == 1 else ""
    named = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return {key: tensor for key, tensor in named.items() if key not in _BUFFERS}


def _widths(state: State, part: str) -> tuple[int, ...]:
    """Outputs of each layer of an MLP."""
    count = sum(bool(re.fullmatch(rf"{re.escape(part)}\.\d+\._linear\.weight", key)) for key in state)
    return tuple(_need(state, f"{part}.{i}._linear.weight").shape[0] for i in range(max(count, 1)))


def _table(state: State, name: str) -> Table:
    key = f"{_TABLES}{name}.weight"
    rows = _need(state, key)
    if rows.dtype not in _KNOWN or rows.ndim != 2:
        raise ArtifactError(f"key {key}", _shape(rows), "FP32 or FP16 [rows, dim]", "convert it before saving")
    return Table(name=name, rows=rows.shape[0], dtype=_KNOWN[rows.dtype])


def _need(state: State, key: str) -> Floats:
    if key not in state:
        raise ArtifactError(
            f"key {key}", "no such key", "a state dict of TorchRec's DLRM or DLRM_DCN", "check the file"
        )
    if state[key].ndim == 0 or state[key].dtype not in _KNOWN:
        raise ArtifactError(f"key {key}", _shape(state[key]), "FP32 or FP16 numbers", "convert it before saving")
    return state[key]


def _shape(tensor: Floats) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _read_safetensors(path: Path) -> dict[str, Floats]:
    """Such a file is sorted by type and name: tables are put in the order of the numbers in their names."""
    try:
        with safe_open(path, framework="np") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, TypeError, FileNotFoundError) as error:
        raise ArtifactError(str(path), f"an unreadable file ({error})", "a safetensors file", "check it") from error

    def natural(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]

    return {name: found[name] for name in sorted(found, key=natural)}


def _plain(torch: Any, name: str, tensor: Any) -> Floats:
    """As NumPy's. BF16, which NumPy lacks, becomes FP32, which holds every BF16 number."""
    if tensor.is_sparse or tensor.is_quantized:
        raise ArtifactError(f"key {name}", "a sparse or quantized tensor", "plain numbers", "convert it before saving")
    plain: Floats = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
    return plain


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        step = "install torch (docs/kernels.md), or use a .safetensors file"
        raise ArtifactError(str(path), "no torch on this machine", "torch, which reads and writes it", step) from error
    return torch
