"""Embedding tables in device memory: one arena for all rows."""

from typing import Any, NamedTuple

import numpy as np

from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.native.layout import round_up
from narsil_stream.kernels.native.memory import Memory
from narsil_stream.kernels.reference import Rows, lookup

_BYTES = {"FP32": 4, "FP16": 2, "INT8": 1}
_TYPES: dict[int, type[np.generic]] = {4: np.float32, 2: np.float16, 1: np.uint8}


class DeviceTables(NamedTuple):
    """All tables of a model as `rows.cuh` reads them. CuPy arrays."""

    rows: Any
    """[sum of rows, dim rounded up to 16] in FP32, FP16 or UINT8."""
    scale_bias: Any
    """[sum of rows, 2] FP16 for UINT8 rows, else one unused pair."""
    base: Any
    """[tables] INT64: where each table starts, in rows."""
    count: Any
    """[tables] INT32: rows of each table."""
    row_bytes: int
    """Of one element."""

    @property
    def pointers(self) -> tuple[int, int, int, int]:
        return self.rows.data.ptr, self.scale_bias.data.ptr, self.base.data.ptr, self.count.data.ptr


def upload(artifact: Artifact, memory: Memory) -> DeviceTables:
    """Rows keep their type; a model whose tables differ in type gets FP32 rows, decoded here, for all."""
    spec = artifact.spec
    kinds = {table.dtype for table in spec.tables}
    row_bytes = _BYTES[kinds.pop()] if len(kinds) == 1 else 4
    dim, total = spec.architecture.dim, sum(table.rows for table in spec.tables)
    rows = memory.zeros((total, round_up(dim, 16)), _TYPES[row_bytes])
    scale_bias = memory.zeros((total if row_bytes == 1 else 1, 2), np.float16)
    starts = np.cumsum([0] + [table.rows for table in spec.tables]).astype(np.int64)
    for table, start in zip(spec.tables, starts[:-1].tolist(), strict=True):
        part = slice(start, start + table.rows)
        stored = Rows(
            artifact.tensors[f"tables.{table.name}.weight"], artifact.tensors.get(f"tables.{table.name}.scale_bias")
        )
        if stored.weight.itemsize == row_bytes:
            memory.write(rows[part], stored.weight)
            if stored.scale_bias is not None:
                memory.write(scale_bias[part], stored.scale_bias)
        else:
            memory.write(rows[part], lookup(stored, np.arange(table.rows, dtype=np.int32)))
    count = np.array([table.rows for table in spec.tables], np.int32)
    return DeviceTables(rows, scale_bias, memory.upload(starts[:-1]), memory.upload(count), row_bytes)
