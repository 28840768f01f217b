"""Schemathesis against a real gateway: for whatever it makes of the document, the document says what is answered.

It makes requests that the document allows and requests that it does not, for every operation, and checks each answer.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import Case, DeserializationContext, HookContext, SerializationContext, checks

from narsil_stream.core.config import Config
from narsil_stream.gateways.http_codec import ENCODINGS
from narsil_stream.kernels.artifact import write
from narsil_stream.kernels.init import criteo_spec, random_model
from narsil_stream.schemas import openapi
from narsil_stream.schemas.model import NAME
from tests.support import NatsServer, System

EXAMPLES = 16
"""Of each operation."""
SERVED, CONTROLLED = "dlrm", "other"
CONFIG = schemathesis.Config.from_dict(
    {
        "checks": {"not_a_server_error": {"expected-statuses": ["2xx", "4xx", 501, 503]}},
        "generation": {"mode": "all", "with-security-parameters": False},
    }
)
schema = schemathesis.openapi.from_dict(openapi.document(), config=CONFIG)
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]


@schema.hook
def map_path_parameters(context: HookContext, names: dict[str, Any] | None) -> dict[str, Any]:
    """Names that are none stay; those that could be one become that of a model, or all requests would end in 404."""
    control = context.operation is not None and "/repository/" in context.operation.path
    there = {"model": CONTROLLED if control else SERVED, "version": "1"}
    return {
        name: there.get(name, value) if NAME.fullmatch(str(value)) else value for name, value in (names or {}).items()
    }


@schema.hook
def map_headers(_: HookContext, headers: dict[str, Any] | None) -> dict[str, Any]:
    """Bodies are not compressed here, so no header may say it; one that is not known may stay."""
    return {
        name: value for name, value in (headers or {}).items() if name != "Content-Encoding" or value not in ENCODINGS
    }


@schemathesis.serializer(openapi.MSGPACK)
def packed(_: SerializationContext, value: Any) -> bytes:
    try:
        return msgspec.msgpack.encode(value, enc_hook=lambda binary: binary.data)
    except OverflowError:  # an integer that msgpack has no bytes for
        return msgspec.json.encode(value, enc_hook=lambda binary: binary.data)


@schemathesis.deserializer(openapi.MSGPACK)
def unpacked(_: DeserializationContext, response: schemathesis.Response) -> Any:
    return msgspec.to_builtins(msgspec.msgpack.decode(response.content))


@pytest.fixture(scope="module")
def served(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """The demo model, and another one that may come and go."""
    repository = tmp_path_factory.mktemp("repository")
    write(repository / CONTROLLED, random_model(criteo_spec(CONTROLLED, rows=10, dim=4, bottom=(8,), top=(8,)), 1))
    config = Config(model_control="explicit", model_repository=str(repository))
    with NatsServer() as server, System(server.url, demo_model, config=config, gateways=1) as system:
        yield system


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as opened:
        yield opened


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_is_one_that_the_document_allows(case: Case, served: System, session: requests.Session) -> None:
    """Clients are generated from the document: what it does not say, they do not expect."""
    case.call_and_validate(f"http://127.0.0.1:{served.http_port}", session, checks=CHECKS)
