"""What the Open Inference Protocol says of a server and its models, the same over every transport."""

from narsil_stream import __version__
from narsil_stream.core.config import Config
from narsil_stream.core.versions import newness
from narsil_stream.schemas.internal import ModelCard, ModelRef
from narsil_stream.schemas.oip import (
    ConfigParameter,
    DynamicBatching,
    InputConfig,
    InstanceGroup,
    ModelConfig,
    ModelMetadata,
    OutputConfig,
    ServerMetadata,
    TensorMetadata,
)

SERVER = ServerMetadata("narsil-stream", __version__)


def model_metadata(card: ModelCard, served: tuple[ModelRef, ...]) -> ModelMetadata:
    """-1 in a shape is the number of rows, or of ids. `sparse`, or `values` with `lengths`: one of the two is given."""
    spec = card.spec
    bags = (TensorMetadata("values", "INT64", (-1,)), TensorMetadata("lengths", "INT32", (-1, spec.n_sparse)))
    return ModelMetadata(
        spec.name,
        tuple(sorted((ref.version for ref in served if ref.name == spec.name), key=newness)),
        platform(card),
        (
            TensorMetadata("dense", "FP32", (-1, spec.n_dense)),
            TensorMetadata("sparse", "INT64", (-1, spec.n_sparse)),
            *(bags if card.takes_bags else ()),
        ),
        (TensorMetadata("scores", "FP32", (-1,)),),
    )


def model_config(card: ModelCard, config: Config) -> ModelConfig:
    """As Triton's, so that load generators shape their requests by it: they leave out what is optional."""
    spec = card.spec
    on_gpu = card.device not in ("", "cpu")
    bags = (
        InputConfig("values", "TYPE_INT64", (-1,), optional=True, allow_ragged_batch=True),
        InputConfig("lengths", "TYPE_INT32", (spec.n_sparse,), optional=True),
    )
    return ModelConfig(
        spec.name,
        platform(card),
        card.backend,
        config.batch.max_request_rows,
        (
            InputConfig("dense", "TYPE_FP32", (spec.n_dense,)),
            InputConfig("sparse", "TYPE_INT64", (spec.n_sparse,)),
            *(bags if card.takes_bags else ()),
        ),
        (OutputConfig("scores", "TYPE_FP32", ()),),
        (InstanceGroup(f"{spec.name}_0", "KIND_GPU" if on_gpu else "KIND_CPU"),),
        DynamicBatching(config.batch.linger_us),
        parameters={name: ConfigParameter(value) for name, value in _computed_by(card).items()},
    )


def platform(card: ModelCard) -> str:
    return f"narsil_{card.spec.architecture.__struct_config__.tag}"


def _computed_by(card: ModelCard) -> dict[str, str]:
    """What computes the model, and what else that could do."""
    told = {"device": card.device, "precision": card.precision, "digest": card.digest, "lanes": str(card.lanes)}
    if (can := card.capabilities) is not None:
        told |= {
            "backend_protocol": can.protocol,
            "device_kind": can.device_kind,
            "precisions": ",".join(can.precisions),
            "multi_hot": str(can.multi_hot).lower(),
            "uncut_rows": str(can.max_rows),
        }
    return told
