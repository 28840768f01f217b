"""What a model's metadata and configuration say of what computes it."""

from msgspec.structs import replace

from narsil_stream.core.config import Config
from narsil_stream.gateways.metadata import model_config, model_metadata
from narsil_stream.kernels.init import criteo_spec
from narsil_stream.schemas.compute import Capabilities
from narsil_stream.schemas.internal import ModelCard

CAN = Capabilities("1.0", "cuda", ("fp16", "fp32"), multi_hot=True, max_rows=4096)
CARD = ModelCard("0123", criteo_spec("m"), "native", "NVIDIA H100", "fp16", 3, CAN)


def told(card: ModelCard) -> dict[str, str]:
    return {name: one.string_value for name, one in model_config(card, Config()).parameters.items()}


def test_the_configuration_says_what_computes_and_what_it_could() -> None:
    """Clients size their requests by it, operators see whether a setting has arrived."""
    assert told(CARD) == {
        "device": "NVIDIA H100",
        "precision": "fp16",
        "digest": "0123",
        "lanes": "3",
        "backend_protocol": "1.0",
        "device_kind": "cuda",
        "precisions": "fp16,fp32",
        "multi_hot": "true",
        "uncut_rows": "4096",
    }


def test_a_card_of_an_older_executor_is_enough() -> None:
    """Parts of a system are replaced one after the other."""
    old = ModelCard("0123", criteo_spec("m"), "native", "NVIDIA H100", "fp16")
    assert told(old)["lanes"] == "1"
    assert [tensor.name for tensor in model_metadata(old, ()).inputs] == ["dense", "sparse", "values", "lengths"]


def test_inputs_that_a_backend_does_not_take_are_not_listed() -> None:
    """Load generators send every input that they are told of."""
    one_hot = replace(CARD, capabilities=replace(CAN, multi_hot=False))
    assert [tensor.name for tensor in model_metadata(one_hot, ()).inputs] == ["dense", "sparse"]
    assert [tensor.name for tensor in model_config(one_hot, Config()).input] == ["dense", "sparse"]
