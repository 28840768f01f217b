"""The baseline: the same DLRM in torch over FBGEMM's table-batched INT8 embeddings, eager and as CUDA graphs."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.backend import RaggedBatch


class FbgemmDlrm:
    """FP16 MLPs and interaction on CUDA, rows in the artifact's type (INT8 rows keep their FP16 scale and bias).

    Ids are not checked (BoundsCheckMode.NONE, as TorchRec serves): the native side checks its own and is not credited
    for it.
    """

    def __init__(self, artifact: Artifact) -> None:
        import torch

        self._torch: Any = torch
        shape = artifact.spec.architecture
        self._tables = artifact.spec.n_sparse
        self._embedding = _embedding(artifact)
        self._bottom = _mlp(torch, artifact, "bottom", len(shape.bottom))
        self._top = _mlp(torch, artifact, "top", len(shape.top))
        rows, columns = torch.tril_indices(self._tables + 1, self._tables + 1, offset=-1, device="cuda")
        self._pairs = rows * (self._tables + 1) + columns

    def inputs(self, batch: RaggedBatch) -> tuple[Any, Any, Any]:
        """On the device: dense FP16 [B, n_dense]; ids, key-major, and their offsets, INT32."""
        torch = self._torch
        ids = np.ascontiguousarray(batch.ids.reshape(batch.rows, -1).T).reshape(-1)
        offsets = torch.arange(ids.size + 1, dtype=torch.int32, device="cuda")
        return torch.from_numpy(batch.dense).cuda().half(), torch.from_numpy(ids).cuda(), offsets

    def forward(self, dense: Any, ids: Any, offsets: Any) -> Any:
        """Scores [B] FP16."""
        torch = self._torch
        x0 = self._bottom(dense)
        rows = self._embedding(ids, offsets).view(len(dense), self._tables, -1)
        x = torch.cat([x0.unsqueeze(1), rows], dim=1)
        products = torch.bmm(x, x.transpose(1, 2)).view(len(dense), -1).index_select(1, self._pairs)
        return torch.sigmoid(self._top(torch.cat([x0, products], dim=1))).view(-1)

    def scores(self, batch: RaggedBatch) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            scores: NDArray[np.float32] = self.forward(*self.inputs(batch)).float().cpu().numpy()
        return scores

    def eager(self, batches: list[RaggedBatch]) -> Callable[[], float]:
        """A function that scores each batch once, eagerly, inputs already on the device; returns µs a batch."""
        given = [self.inputs(batch) for batch in batches]
        return lambda: self._timed(lambda: [self.forward(*one) for one in given], len(given))

    def graphs(self, batches: list[RaggedBatch]) -> Callable[[], float]:
        """The same by CUDA graphs, one for each batch, so that none needs a copy first."""
        torch = self._torch
        captured = []
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        with torch.inference_mode(), torch.cuda.stream(stream):
            for batch in batches:
                given = self.inputs(batch)
                self.forward(*given)
                stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    out = self.forward(*given)
                captured.append((graph, given, out))
        return lambda: self._timed(lambda: [graph.replay() for graph, _, _ in captured], len(captured))

    def _timed(self, run: Callable[[], object], count: int) -> float:
        torch = self._torch
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.inference_mode():
            torch.cuda.synchronize()
            start.record()
            run()
            stop.record()
            stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e3 / count


def _embedding(artifact: Artifact) -> Any:
    import torch
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    spec = artifact.spec
    embedding = IntNBitTableBatchedEmbeddingBagsCodegen(
        [(t.name, t.rows, spec.architecture.dim, SparseType[t.dtype], EmbeddingLocation.DEVICE) for t in spec.tables],
        pooling_mode=PoolingMode.SUM,
        bounds_check_mode=BoundsCheckMode.NONE,
        output_dtype=SparseType.FP16,
        device=torch.device("cuda"),
    )
    embedding.initialize_weights()
    for table, (rows, scale_bias) in zip(spec.tables, embedding.split_embedding_weights(), strict=True):
        rows.copy_(torch.from_numpy(artifact.tensors[f"tables.{table.name}.weight"].view(np.uint8)))
        if scale_bias is not None:
            scale_bias.copy_(torch.from_numpy(artifact.tensors[f"tables.{table.name}.scale_bias"].view(np.uint8)))
    return embedding


def _mlp(torch: Any, artifact: Artifact, part: str, count: int) -> Any:
    """Linear layers with ReLU between; the bottom's last has one too."""
    layers = []
    for i in range(count):
        weight, bias = (torch.from_numpy(artifact.tensors[f"{part}.{i}.{kind}"]) for kind in ("weight", "bias"))
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight, "bias": bias})
        layers.append(linear)
        if part == "bottom" or i < count - 1:
            layers.append(torch.nn.ReLU())
    return torch.nn.Sequential(*layers).half().cuda()
