"""What the Open Inference Protocol says of a server and its models, the same over every transport."""

from typing import Any

from narsil_stream import __version__
from narsil_stream.core.versions import newness
from narsil_stream.schemas.internal import ModelCard, ModelRef

SERVER = {"name": "narsil-stream", "version": __version__, "extensions": []}


def model_metadata(card: ModelCard, served: tuple[ModelRef, ...]) -> dict[str, Any]:
    """The answer to `GET v2/models/<model>`. -1 in a shape is the number of rows."""
    spec = card.spec
    return {
        "name": spec.name,
        "versions": sorted((ref.version for ref in served if ref.name == spec.name), key=newness),
        "platform": f"narsil_{spec.architecture.__struct_config__.tag}",
        "inputs": [
            {"name": "dense", "datatype": "FP32", "shape": [-1, spec.n_dense]},
            {"name": "sparse", "datatype": "INT64", "shape": [-1, spec.n_sparse]},
        ],
        "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1]}],
    }
