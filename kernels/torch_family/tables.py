"""Embedding tables in FBGEMM's table-batched inference operator."""

from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.torch_family.packing import Packing

_OUTPUT = {
    torch.float32: SparseType.FP32,
    torch.bfloat16: SparseType.BF16,
    torch.float16: SparseType.FP16,
}


class Tables:
    """All tables of a model, rows in the artifact's type. `pack` has checked the ids: nothing is checked here."""

    def __init__(self, artifact: Artifact, packing: Packing, dtype: Any, device: str) -> None:
        """`dtype`: of the pooled rows."""
        spec = artifact.spec
        self._shape = (-1, packing.vectors, spec.architecture.dim)
        place = EmbeddingLocation.DEVICE if device == "cuda" else EmbeddingLocation.HOST
        dim, total = spec.architecture.dim, sum(table.rows for table in spec.tables)
        kinds = [(t.name, t.rows, dim, SparseType[t.dtype], place) for t in spec.tables]
        maps = [0, *range(spec.n_sparse), *[0] * (packing.vectors - 1 - spec.n_sparse)]
        if packing.joined:
            kinds, maps = [("all", total, *kinds[0][2:])], [0]
        self._lookup = IntNBitTableBatchedEmbeddingBagsCodegen(
            kinds,
            feature_table_map=maps,
            pooling_mode=PoolingMode[spec.architecture.pooling.upper()],
            bounds_check_mode=BoundsCheckMode.NONE,
            output_dtype=_OUTPUT[dtype],
            device=torch.device(device),
        )
        self._lookup.initialize_weights()
        if device == "cpu":  # NumPy asks for huge pages: a row of a large table is then a cache miss, no walk of pages
            self._lookup.weights_host = torch.from_numpy(np.empty(self._lookup.host_size, np.uint8))
        self._fill(artifact, joined=packing.joined)

    def __call__(self, values: Any, offsets: Any) -> Any:
        """x [rows, vectors, dim]: bags pooled, zeros for empty ones. values [N], offsets [rows * vectors + 1] INT32."""
        return self._lookup(values, offsets).view(self._shape)

    def _fill(self, artifact: Artifact, *, joined: bool) -> None:
        stored = self._lookup.split_embedding_weights()
        start = 0
        for i, table in enumerate(artifact.spec.tables):
            rows, scale_bias = stored[0 if joined else i]
            part = slice(start, start + table.rows)
            rows[part].copy_(_bytes(artifact, f"tables.{table.name}.weight"))
            if scale_bias is not None:
                scale_bias[part].copy_(_bytes(artifact, f"tables.{table.name}.scale_bias"))
            start += table.rows if joined else 0


def _bytes(artifact: Artifact, name: str) -> Any:
    return torch.from_numpy(artifact.tensors[name].view(np.uint8))
