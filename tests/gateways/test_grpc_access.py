"""Who may call over gRPC: tokens and TLS at the real gateway, with Triton's client."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc as triton
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from msgspec.structs import replace

from narsil_stream.core import tokens
from narsil_stream.core.config import AccessConfig, Config
from narsil_stream.gateways.grpc_verbs import VERBS
from tests.asking import some_rows
from tests.gateways.calling import GrpcCaller, close, infer_message, triton_inputs
from tests.support import NatsServer, System

TOKENS: dict[str, tokens.Scope] = {"reader": "infer", "boss": "admin"}


@pytest.fixture(scope="module")
def guarded(criteo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A gateway that wants a token."""
    file = tmp_path_factory.mktemp("tokens") / "tokens"
    file.write_text("".join(f"{tokens.line(name, frozenset({scope}))}\n" for name, scope in TOKENS.items()))
    file.chmod(0o600)
    config = replace(Config(), access=AccessConfig(tokens_file=str(file)))
    with NatsServer() as server, System(server.url, criteo_model, config=config, grpc_gateways=1) as running:
        yield running


def bearer(token: str) -> Any:
    return (("authorization", f"Bearer {token}"),) if token else ()


@pytest.mark.parametrize(
    ("token", "code"),
    [("", "UNAUTHENTICATED"), ("stranger", "UNAUTHENTICATED"), ("reader", "OK"), ("boss", "PERMISSION_DENIED")],
)
def test_scores_need_a_token_with_the_scope_infer(guarded: System, criteo_model: Path, token: str, code: str) -> None:
    """Without a check here, the tokens at the HTTP door would be worth nothing; the stream is a way in too."""
    rows = some_rows(criteo_model, 2)
    with GrpcCaller(guarded.grpc_port) as call:
        assert call("ModelInfer", infer_message(rows), metadata=bearer(token)).code.name == code
        stream = call.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        asked = stream(iter([infer_message(rows).SerializeToString()]), metadata=bearer(token), timeout=20)
        with contextlib.suppress(grpc.RpcError):
            assert len(list(asked)) == 1
        assert asked.code().name == code


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_no_verb_but_liveness_and_readiness_is_open_to_strangers(guarded: System, verb: str) -> None:
    """A verb that is added later must not be the hole."""
    open_to_all = verb in ("ServerLive", "ServerReady")
    with GrpcCaller(guarded.grpc_port) as call:
        assert (call(verb, b"").code is grpc.StatusCode.OK) == open_to_all
        if not open_to_all:
            assert call(verb, b"").code is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("verb", ["RepositoryModelLoad", "RepositoryModelUnload", "LogSettings"])
def test_control_needs_the_scope_admin(guarded: System, verb: str) -> None:
    """Who may ask for scores must not be able to take a model away."""
    with GrpcCaller(guarded.grpc_port) as call:
        assert call(verb, b"", metadata=bearer("reader")).code is grpc.StatusCode.PERMISSION_DENIED
        allowed = call(verb, b"", metadata=bearer("boss")).code
    assert allowed in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)


def test_probes_need_no_token(guarded: System) -> None:
    """Kubernetes has none."""
    with grpc.insecure_channel(f"127.0.0.1:{guarded.grpc_port}") as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_tritons_client_gets_scores_over_tls(nats_server: NatsServer, criteo_model: Path, tmp_path: Path) -> None:
    """The settings reach the port; plain text does not get in."""
    authority = trustme.CA()
    server = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    server.private_key_pem.write_to_path(tmp_path / "key.pem")
    server.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    access = AccessConfig(tls_cert=str(tmp_path / "cert.pem"), tls_key=str(tmp_path / "key.pem"))
    config = replace(Config(), access=access)
    rows = some_rows(criteo_model, 3)
    with System(nats_server.url, criteo_model, config=config, grpc_gateways=1) as system:
        url = f"localhost:{system.grpc_port}"
        with triton.InferenceServerClient(url, ssl=True, root_certificates=str(tmp_path / "ca.pem")) as client:
            assert close(client.infer("ctr", triton_inputs(rows)).as_numpy("scores"), rows)
        with GrpcCaller(system.grpc_port) as plain:
            assert plain("ServerLive", b"", timeout=5.0).code is grpc.StatusCode.UNAVAILABLE
