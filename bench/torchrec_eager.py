"""The baseline on a CPU: TorchRec's own DLRM or DLRM_DCN, eager, FP32, as people serve it before they look for more."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec.models.dlrm import DLRM, DLRM_DCN
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.backend import RaggedBatch
from narsil_stream.kernels.torch_family.checkpoint import to_state
from narsil_stream.schemas.model import DcnV2


class TorchRecEager:
    """FP32 rows and layers. Weights are those of the artifact, by the way of a checkpoint."""

    def __init__(self, artifact: Artifact) -> None:
        spec, shape = artifact.spec, artifact.spec.architecture
        self._names = [table.name for table in spec.tables]
        pooling = PoolingType[shape.pooling.upper()]
        configs = [
            EmbeddingBagConfig(
                name=t.name, embedding_dim=shape.dim, num_embeddings=t.rows, feature_names=[t.name], pooling=pooling
            )
            for t in spec.tables
        ]
        parts = (EmbeddingBagCollection(tables=configs, device=torch.device("meta")), spec.n_dense)
        widths = (list(shape.bottom), list(shape.top))
        self._model: Any
        if isinstance(shape, DcnV2):
            self._model = DLRM_DCN(
                *parts, *widths, dcn_num_layers=shape.cross_layers, dcn_low_rank_dim=shape.cross_rank
            )
        else:
            self._model = DLRM(*parts, *widths)
        state = {name: torch.from_numpy(np.ascontiguousarray(t)) for name, t in to_state(artifact).items()}
        self._model.load_state_dict(state, assign=True)
        self._model.eval()

    def state_dict(self) -> Any:
        return self._model.state_dict()

    def run(self, batch: RaggedBatch, scores: NDArray[np.float32]) -> None:
        """The Backend protocol's call, one-hot: from ordinary arrays to scores in an ordinary array."""
        assert batch.lengths is None
        ids = torch.from_numpy(batch.ids).view(batch.rows, -1)
        with torch.inference_mode():
            lengths = torch.ones(ids.numel(), dtype=torch.int32)
            features = KeyedJaggedTensor(self._names, ids.t().reshape(-1), lengths=lengths)
            found = torch.sigmoid(self._model(torch.from_numpy(batch.dense), features))
        scores[:] = found.view(-1).numpy()
