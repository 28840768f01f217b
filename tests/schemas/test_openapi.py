"""The published description of the HTTP gateway is well-formed, and says what the code does."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from narsil_stream.core.access import VERBS, Need
from narsil_stream.gateways.http_verbs import ROUTES
from narsil_stream.schemas import codec, openapi
from narsil_stream.schemas.codec import Spelling
from narsil_stream.schemas.errors import Fault
from narsil_stream.schemas.http_operations import OPERATIONS
from narsil_stream.schemas.json_tensor import CODES
from narsil_stream.schemas.openapi import HttpTensor, document
from tests.schemas.walking import walk

DOCUMENT = document()
COMMITTED = Path(openapi.__file__).with_name("openapi.json")


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path and what is said of them."""
    for path, item in DOCUMENT["paths"].items():
        for method, said in item.items():
            yield method.upper(), path, said


def test_the_committed_document_is_the_generated_one():
    """The gateway gives out the file; a path that changed without it would mislead every client made from it."""
    regenerate = "python -m narsil_stream.schemas.openapi > schemas/openapi.json"
    assert json.loads(COMMITTED.read_text(encoding="utf-8")) == DOCUMENT, f"regenerate it: {regenerate}"


def test_it_is_valid_openapi_3_1():
    """Generators of clients refuse what is not."""
    assert [error.message for error in OpenAPIV31SpecValidator(DOCUMENT).iter_errors()] == []


def test_every_route_of_the_gateway_is_described_and_nothing_else():
    """What is missing is not found; what is too much is a promise."""
    described = {(method, path) for method, path, _ in operations()}
    assert described == {(route.method, route.path) for route in ROUTES}
    of_routes = {(route.method, route.path, route.verb) for route in ROUTES}
    assert of_routes == {(one.method, path, one.verb) for one in OPERATIONS for path in one.paths}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: f"{one.method} {one.paths[0]}")
def test_the_scopes_that_are_named_are_those_that_are_asked_for(operation: Any):
    """A team gives its services the tokens that the document asks for."""
    need = VERBS.get(operation.verb, Need.ADMIN)
    assert set(operation.scopes) == set(need.value)
    for path in operation.paths:
        security = DOCUMENT["paths"][path][operation.method.lower()]["security"]
        assert [scope for one in security for scope in one.get("bearer", [])] == list(operation.scopes)
        assert ("401" in DOCUMENT["paths"][path][operation.method.lower()]["responses"]) == bool(operation.scopes)


def test_every_reference_leads_somewhere_and_every_component_is_used():
    """Viewers stop at the first that does not; what nothing refers to is a leftover, or something forgotten."""
    references = {node["$ref"] for node in walk(DOCUMENT) if isinstance(node.get("$ref"), str)}
    parts = DOCUMENT["components"]
    there = {f"#/components/{kind}/{name}" for kind in parts if kind != "securitySchemes" for name in parts[kind]}
    assert references <= there
    # A row of the error table that no operation may end in is described all the same: `x-error-table` names it.
    assert there - references <= {f"#/components/responses/{fault.name}" for fault in Fault}


def test_operations_have_names_of_their_own():
    """They become the names of functions."""
    names = [said["operationId"] for _, _, said in operations()]
    assert len(set(names)) == len(names) and all(name.isidentifier() for name in names)


def test_the_example_of_a_request_is_one_request_in_three_spellings():
    """They are what people copy first."""
    content = DOCUMENT["paths"]["/v2/models/{model}/infer"]["post"]["requestBody"]["content"]
    in_json = codec.decode_request(json.dumps(content[openapi.JSON]["example"]).encode())
    packed = codec.decode_request(base64.b64decode(content[openapi.MSGPACK]["x-encoded"]))
    assert packed == openapi.REQUEST
    assert [codec.array(tensor).tolist() for tensor in in_json.inputs] == [
        codec.array(tensor).tolist() for tensor in packed.inputs
    ]
    binary = base64.b64decode(content[openapi.BINARY]["x-encoded"])
    assert binary[content[openapi.BINARY]["x-json-length"] :] == b"".join(tensor.data for tensor in packed.inputs)


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name)
def test_the_example_of_an_error_is_that_error(fault: Fault):
    """Its code, its status, and whether it says when to try again."""
    said = DOCUMENT["components"]["responses"][fault.name]
    example = said["content"][openapi.JSON]["example"]
    assert example["code"] == fault.name
    assert ("retry_after_us" in example) == ("retry-after" in said.get("headers", {})) == fault.retry


def test_answers_in_msgpack_can_be_decoded():
    """They are described item by item; the example shows the bytes."""
    responses = DOCUMENT["paths"]["/v2/models/{model}/infer"]["post"]["responses"]
    assert codec.decode_answer(base64.b64decode(responses["200"]["content"][openapi.MSGPACK]["x-encoded"])).outputs
    packed = DOCUMENT["components"]["responses"]["ModelInfer.OVERLOADED"]["content"][openapi.MSGPACK]["x-encoded"]
    answer = codec.decode_answer(base64.b64decode(packed))
    assert (answer.fault, codec.spelling_of(base64.b64decode(packed))) == ("OVERLOADED", Spelling.MSGPACK)


def test_the_datatypes_that_are_named_are_those_that_are_read():
    """The list is written by hand, since types cannot be made of a table."""
    (literal,) = [field.type for field in msgspec.inspect.type_info(HttpTensor).fields if field.name == "datatype"]
    assert set(literal.values) == set(CODES)
