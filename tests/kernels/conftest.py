"""Small models that the tests of this folder share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from narsil_stream.kernels.artifact import Artifact, write
from narsil_stream.kernels.init import random_model
from narsil_stream.schemas.model import Architecture, DcnV2, DlrmDot, ModelSpec, RowType, Table

Make = Callable[..., ModelSpec]


def small_spec(
    dtype: RowType = "FP32", dim: int = 4, rows: tuple[int, ...] = (7, 1, 30), kind: str = "dlrm-dot"
) -> ModelSpec:
    """Three dense features, one table for each number of rows, odd widths; sums in one kind, means in the other."""
    architecture: Architecture = DlrmDot(dense=3, dim=dim, bottom=(5, dim), top=(6, 1))
    if kind == "dcn-v2":
        architecture = DcnV2(3, dim, (5, dim), (6, 1), "mean", cross_layers=2, cross_rank=3)
    tables = tuple(Table(name=f"t{i}", rows=n, dtype=dtype) for i, n in enumerate(rows))
    return ModelSpec(name="small", architecture=architecture, tables=tables)


@pytest.fixture(name="small_spec")
def _small_spec() -> Make:
    return small_spec


@pytest.fixture(params=["FP32", "FP16", "INT8", "FP32 dcn-v2", "INT8 dcn-v2"])
def model(request: pytest.FixtureRequest) -> Artifact:
    dtype, _, kind = request.param.partition(" ")
    return random_model(small_spec(dtype, kind=kind), seed=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact with INT8 rows, which has every kind of tensor."""
    write(tmp_path / "model", random_model(small_spec("INT8"), seed=1))
    return tmp_path / "model"
