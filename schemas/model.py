"""`model.json`: what a model is. Read by the compute side (weights), the batcher (validation), gateways (metadata)."""

import re
from typing import Annotated, Literal

from msgspec import Meta, Struct, field

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""Model names and versions: they become NATS subject tokens and folder names."""

RowType = Literal["FP32", "FP16", "INT8"]
Pooling = Literal["sum", "mean"]
Name = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}\Z")]
FileName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,127}\Z")]
"""A plain name inside the artifact's folder: no separator, no leading dot."""
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Width = Annotated[int, Meta(ge=1, le=65_536)]


class Table(Struct, frozen=True, forbid_unknown_fields=True):
    """One embedding table. INT8 rows carry an FP16 scale and bias each: value = q * scale + bias."""

    name: Name
    rows: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    dtype: RowType = "FP32"


class _Mlps(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    """What all architectures share: a bottom MLP, tables, an interaction of both, a top MLP."""

    dense: Annotated[int, Meta(ge=1, le=65_536)]
    """Number of dense features."""
    dim: Width
    """Width of every embedding row and of the bottom MLP's output."""
    bottom: Annotated[tuple[Width, ...], Meta(min_length=1, max_length=32)]
    top: Annotated[tuple[Width, ...], Meta(min_length=1, max_length=32)]
    pooling: Pooling = "sum"
    """What becomes of the rows of a bag. One row stays itself, an empty bag gives zeros."""


class DlrmDot(_Mlps, frozen=True, forbid_unknown_fields=True, tag="dlrm-dot"):
    """DLRM with dot interaction (Naumov et al., arXiv:1906.00091).

    bottom MLP: dense -> bottom[0] -> ... -> bottom[-1] = dim, ReLU after each layer.
    interaction: x = [bottom output, pooled row of each table], F+1 vectors; out = [x[0], x[i]·x[j] for i > j], in the
    order (1,0), (2,0), (2,1), (3,0) ...; top MLP: ReLU between layers, sigmoid after the last, whose width is 1.
    """

    def interaction_width(self, tables: int) -> int:
        return self.dim + (tables + 1) * tables // 2


class DcnV2(_Mlps, frozen=True, forbid_unknown_fields=True, tag="dcn-v2", kw_only=True):
    """DLRM with a low-rank cross network, DCNv2 (Wang et al., arXiv:2008.13535): MLPerf's DLRM-v2.

    bottom and top MLP as in dlrm-dot.
    interaction: x_0 = bottom output and pooled row of each table, one after another, width (F+1) dim; then
    x_{l+1} = x_0 * (W_l (V_l x_l) + b_l) + x_l for each cross layer, * element by element, V_l [cross_rank, width],
    W_l [width, cross_rank]; out = the last x. The same as torchrec.models.dlrm.DLRM_DCN.
    """

    cross_layers: Annotated[int, Meta(ge=1, le=32)]
    cross_rank: Width

    def interaction_width(self, tables: int) -> int:
        return self.dim * (tables + 1)


Architecture = DlrmDot | DcnV2


CRITEO_SHAPE = (13, 26)
"""Dense features and tables of a model that reads Criteo rows."""


class Preprocessing(Struct, frozen=True, forbid_unknown_fields=True):
    """How a raw click row becomes the model's inputs: integers log(max(x, 0) + 1), categories hex value mod rows."""

    kind: Literal["criteo"] = "criteo"


class ModelSpec(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The whole of `model.json`.

    `files` maps each file of the artifact's folder to its sha256 (hex). `metrics` is informative (AUC, log loss ...).
    """

    name: Name
    architecture: Architecture
    tables: Annotated[tuple[Table, ...], Meta(min_length=1, max_length=4096)]
    files: dict[FileName, Sha256] = field(default_factory=dict)
    version: Name = "1"
    format: Literal[1] = 1
    preprocessing: Preprocessing | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.architecture.bottom[-1] != self.architecture.dim:
            raise ValueError(
                f"architecture.bottom must end in dim={self.architecture.dim}, got {self.architecture.bottom[-1]}"
            )
        if self.architecture.top[-1] != 1:
            raise ValueError(f"architecture.top must end in 1, got {self.architecture.top[-1]}")
        names = [table.name for table in self.tables]
        if len(set(names)) != len(names):
            raise ValueError("tables must have different names")
        if self.preprocessing and (self.n_dense, self.n_sparse) != CRITEO_SHAPE:
            raise ValueError(
                f"preprocessing criteo needs 13 dense features and 26 tables, got {self.n_dense} and {self.n_sparse}"
            )

    @property
    def n_dense(self) -> int:
        return self.architecture.dense

    @property
    def n_sparse(self) -> int:
        return len(self.tables)

    @property
    def top_input(self) -> int:
        """Width of the interaction's output."""
        return self.architecture.interaction_width(self.n_sparse)
