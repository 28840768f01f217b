"""Statistics and the model repository, as Triton's client asks for them over gRPC."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc as triton
from msgspec.structs import replace
from tritonclient.utils import InferenceServerException

from narsil_stream.core.config import Config
from narsil_stream.kernels.artifact import write
from narsil_stream.kernels.init import criteo_spec, random_model
from narsil_stream.schemas.protobuf import message_class
from tests.asking import some_rows
from tests.gateways.calling import GrpcCaller, close, triton_client, triton_inputs
from tests.support import NatsServer, System


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    for name, version in (("first", "1"), ("second", "1"), ("second", "2")):
        spec = replace(criteo_spec(name, rows=100, dim=4, bottom=(8,), top=(8,)), version=version)
        write(folder / f"{name}-{version}", random_model(spec, seed=len(name) + int(version)))
    return folder


Start = Callable[..., System]


@pytest.fixture
def start(nats_server: NatsServer, repository: Path) -> Iterator[Start]:
    """Starts a system that serves the repository, with a gRPC gateway."""
    with ExitStack() as stack:

        def begin(**settings: str) -> System:
            config = Config(model_repository=str(repository), **settings)
            return stack.enter_context(System(nats_server.url, config=config, grpc_gateways=1))

        yield begin


def refused(ask: Any, *arguments: Any, **named: Any) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as raised:
        ask(*arguments, **named)
    return raised.value.status().removeprefix("StatusCode."), raised.value.message()


def index(client: triton.InferenceServerClient) -> dict[tuple[str, str], str]:
    return {(one.name, one.version): one.state for one in client.get_model_repository_index().models}


def test_a_model_is_loaded_scored_and_unloaded(start: Start, repository: Path) -> None:
    """The extension's whole point: when the call returns, the model is there, or gone."""
    system = start(model_control="explicit", load_models="first")
    rows = some_rows(repository / "second-2", 3)
    with triton_client(system.grpc_port) as client:
        assert index(client)[("first", "1")] == "READY"
        assert index(client)[("second", "2")] != "READY"
        assert not client.is_model_ready("second")
        client.load_model("second")
        assert client.is_model_ready("second") and index(client)[("second", "2")] == "READY"
        answer = client.infer("second", triton_inputs(rows))
        assert (answer.get_response().model_version, close(answer.as_numpy("scores"), rows)) == ("2", True)
        client.unload_model("second", unload_dependents=True)
        assert not client.is_model_ready("second") and client.is_model_ready("first")
        assert refused(client.infer, "second", triton_inputs(rows))[0] == "NOT_FOUND"


def test_the_index_of_what_is_ready_is_shorter(start: Start) -> None:
    """Whoever asks for it wants no models that cannot be asked."""
    system = start(model_control="explicit", load_models="first")
    with GrpcCaller(system.grpc_port) as call:
        answer = call("RepositoryIndex", message_class("RepositoryIndexRequest")(ready=True))
    models = message_class("RepositoryIndexResponse").FromString(answer.body).models
    assert [(one.name, one.version, one.state) for one in models] == [("first", "1", "READY")]


def test_models_are_not_controlled_unless_that_is_allowed(start: Start) -> None:
    """As in Triton, whose default it is too: whoever may ask for scores must not be able to take them away."""
    system = start()
    with triton_client(system.grpc_port) as client:
        for verb in (client.load_model, client.unload_model):
            status, message = refused(verb, "first")
            assert status == "PERMISSION_DENIED"
            assert "model_control" in message
        assert client.is_model_ready("first")


def test_what_a_load_cannot_do_is_refused_by_name(start: Start) -> None:
    """A parameter that is dropped silently looks as if it had worked."""
    system = start(model_control="explicit", load_models="first")
    with triton_client(system.grpc_port) as client:
        status, message = refused(client.load_model, "second", config="{}")
        assert (status, "'config'" in message) == ("INVALID_ARGUMENT", True)
        assert refused(client.load_model, "nobody")[0] == "NOT_FOUND"
    with GrpcCaller(system.grpc_port) as call:
        request = message_class("RepositoryModelLoadRequest")
        assert call("RepositoryModelLoad", request()).code is grpc.StatusCode.INVALID_ARGUMENT
        other = call("RepositoryModelLoad", request(repository_name="elsewhere", model_name="second"))
        assert (other.code, "repository_name" in other.detail) == (grpc.StatusCode.UNIMPLEMENTED, True)
        named = message_class("RepositoryIndexRequest")(repository_name="elsewhere")
        assert call("RepositoryIndex", named).code is grpc.StatusCode.UNIMPLEMENTED


def test_statistics_count_what_was_asked(start: Start, repository: Path) -> None:
    """Load generators subtract them before and after."""
    system = start()
    rows = some_rows(repository / "first-1", 5)
    with triton_client(system.grpc_port) as client:
        for _ in range(3):
            client.infer("first", triton_inputs(rows))
        (counted,) = client.get_inference_statistics("first").model_stats
        assert (counted.name, counted.version, counted.inference_count) == ("first", "1", 15)
        assert counted.inference_stats.success.count == 3 and counted.inference_stats.success.ns > 0
        assert 1 <= counted.execution_count <= 3 and counted.last_inference > 0
        assert sum(batch.batch_size * batch.compute_infer.count for batch in counted.batch_stats) == 15
        everything = client.get_inference_statistics(as_json=True)["model_stats"]
        assert {one["name"] for one in everything} == {"first", "second"}
        assert refused(client.get_inference_statistics, "nobody")[0] == "NOT_FOUND"
