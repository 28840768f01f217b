"""A client that is written from the OpenAPI document, its examples first, gets what the document says."""

import base64
import json
import struct
from typing import Any

import jsonschema
import pytest

from narsil_stream.schemas import codec, openapi
from narsil_stream.schemas.openapi import BINARY, JSON, MSGPACK, SCORE
from tests.asking import HttpAnswer, ask_http, json_scores
from tests.support import System

NEAR = pytest.approx([SCORE], abs=1e-6)
"""Another processor may round the last bit otherwise."""
EVERYWHERE = {"model": "dlrm", "version": "1", "region": "region0"}


@pytest.fixture(scope="module")
def port(demo_system: System) -> int:
    return demo_system.http_port


@pytest.fixture(scope="module")
def document(port: int) -> Any:
    return ask_http(port, "GET", "/openapi.json").json


def filled(path: str) -> str:
    return path.format_map(EVERYWHERE)


def test_the_gateway_gives_out_the_document_that_it_was_tested_with(document: Any) -> None:
    """Another one would be worse than none."""
    assert document == openapi.document()


@pytest.mark.parametrize("path", openapi.document()["paths"])
def test_every_operation_answers_its_example_as_the_document_says(port: int, document: Any, path: str) -> None:
    """Status, content type and schema."""
    for method, said in document["paths"][path].items():
        content = said.get("requestBody", {}).get("content", {})
        body = content[JSON]["example"] if JSON in content else None
        answer = ask_http(port, method.upper(), filled(path), body, **({"content-type": JSON} if body else {}))
        check(document, said, answer)
        expected = "Not offered" in said["tags"] or path.endswith("load")
        assert (answer.status == 200) != expected, answer


def check(document: Any, operation: Any, answer: HttpAnswer) -> None:
    """Whether the document allows this answer."""
    assert str(answer.status) in operation["responses"], answer
    said = operation["responses"][str(answer.status)]
    if "$ref" in said:
        said = document["components"]["responses"][said["$ref"].rpartition("/")[2]]
    kind = answer.headers["content-type"].partition(";")[0]
    assert kind in said["content"], answer
    if kind == JSON:
        whole = said["content"][JSON]["schema"] | {"components": document["components"]}
        jsonschema.Draft202012Validator(whole).validate(answer.json)


def infer(port: int, document: Any, kind: str) -> HttpAnswer:
    path = "/v2/models/{model}/infer"
    said = document["paths"][path]["post"]["requestBody"]["content"][kind]
    body = base64.b64decode(said["x-encoded"]) if "x-encoded" in said else json.dumps(said["example"]).encode()
    headers = {"content-type": kind}
    if length := said.get("x-json-length"):
        headers["inference-header-content-length"] = str(length)
    return ask_http(port, "POST", filled(path), body, **headers)


def test_the_examples_get_the_score_that_the_document_shows(port: int, document: Any) -> None:
    """In each of the three spellings: JSON, binary tensors, msgpack."""
    path = document["paths"]["/v2/models/{model}/infer"]["post"]
    shown = path["responses"]["200"]["content"][JSON]["example"]["outputs"][0]["data"]
    assert shown == [SCORE]
    in_json = infer(port, document, JSON)
    assert (json_scores(in_json.json), in_json.json["id"]) == (NEAR, "42")
    binary = infer(port, document, BINARY)
    length = int(binary.headers["inference-header-content-length"])
    assert list(struct.unpack("<f", binary.body[length:])) == NEAR
    packed = codec.decode_answer(infer(port, document, MSGPACK).body)
    assert (packed.id, packed.model, packed.version) == ("42", "dlrm", "1")
    assert codec.array(packed.outputs[0]).tolist() == NEAR
