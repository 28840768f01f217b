"""The published description of the wire says what the code does."""

import base64
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from narsil_stream.schemas import asyncapi, codec, subjects
from narsil_stream.schemas.asyncapi import JSON, MSGPACK, document
from narsil_stream.schemas.describe import as_json, components
from narsil_stream.schemas.errors import Fault
from narsil_stream.schemas.internal import Batch, Demand, Result, Tune
from narsil_stream.schemas.wire import InferRequest
from tests.schemas.walking import walk

DOCUMENT = document()
MESSAGES = DOCUMENT["components"]["messages"]
SCHEMAS = DOCUMENT["components"]["schemas"]
COMMITTED = Path(asyncapi.__file__).with_name("asyncapi.json")


def titles(schema: dict[str, Any]) -> list[str]:
    return [item["title"] for item in schema["items"]]


def test_the_committed_document_is_the_generated_one():
    """A foreign client is written from the file; a Struct that changed without it would mislead its author."""
    regenerate = "python -m narsil_stream.schemas.asyncapi > schemas/asyncapi.json"
    assert json.loads(COMMITTED.read_text(encoding="utf-8")) == DOCUMENT, f"regenerate it: {regenerate}"


def test_every_reference_leads_somewhere():
    """Generators and viewers stop at the first that does not."""
    references = {node["$ref"] for node in walk(DOCUMENT) if "$ref" in node}
    assert references
    for reference in references:
        node: Any = DOCUMENT
        for key in reference.removeprefix("#/").split("/"):
            node = node[key]


def test_every_message_is_carried_by_a_channel_and_every_schema_is_used():
    """What nothing refers to is a leftover, or something forgotten."""
    references = {node["$ref"].rpartition("/")[2] for node in walk(DOCUMENT) if "$ref" in node}
    assert set(MESSAGES) | set(SCHEMAS) <= references


@pytest.mark.parametrize("name", [name for name, message in MESSAGES.items() if "examples" in message])
def test_examples_can_be_decoded(name: str):
    """They are what people copy first."""
    message = MESSAGES[name]
    (example,) = message["examples"]
    if name == "tune":
        assert msgspec.json.decode(json.dumps(example["payload"]), type=Tune) == asyncapi.TUNE
        return
    decode = codec.decode_request if name.startswith("request") else codec.decode_answer
    if message["contentType"] == JSON:
        decoded = decode(json.dumps(example["payload"]).encode())
    else:
        decoded = decode(base64.b64decode(message["x-encoded"]))
        assert as_json(decoded) == example["payload"]
    expected = {"request": asyncapi.REQUEST, "error": asyncapi.ERROR}
    assert decoded == expected.get(name.removesuffix("Json").removesuffix("Msgpack"), asyncapi.SCORES)


def test_both_spellings_of_request_and_answer_are_described():
    """The house speaks msgpack, a shell speaks JSON; a client may choose."""
    public = DOCUMENT["channels"]["infer"]["messages"] | DOCUMENT["channels"]["reply"]["messages"]
    assert {name: MESSAGES[name]["contentType"] for name in public} == {
        "requestJson": JSON, "requestMsgpack": MSGPACK, "scoresJson": JSON, "errorJson": JSON, "answerMsgpack": MSGPACK,
    }  # fmt: skip


def test_the_public_operations_name_subject_and_queue_group():
    """A second pipeline on the same broker must join this group, or each request is scored twice."""
    for name, address in {
        "infer": "narsil.v1.infer.{model}",
        "inferVersion": "narsil.v1.infer.{model}.{version}",
    }.items():
        operation = DOCUMENT["operations"][name]
        assert operation["bindings"]["nats"]["queue"] == subjects.QUEUE_GROUP
        assert DOCUMENT["channels"][operation["channel"]["$ref"].rpartition("/")[2]]["address"] == address


def test_the_error_table_is_all_there():
    """Clients decide by it whether to try again."""
    assert DOCUMENT["x-error-table"] == {
        fault.name: {"http": fault.http, "grpc": fault.grpc, "retry": fault.retry} for fault in Fault
    }


def test_msgpack_messages_are_described_as_arrays_item_by_item():
    """Positions are all that a foreign encoder has: each is named, and the tag comes first."""
    described = components(InferRequest, Batch)
    assert titles(described["InferRequest"]) == list(InferRequest.__struct_fields__)
    assert titles(described["Batch"]) == ["tag", *Batch.__struct_fields__]
    assert described["Batch"]["items"][0]["const"] == 5


@pytest.mark.parametrize("kind", [InferRequest, Batch, Demand, Result])
def test_as_many_items_are_required_as_the_decoder_requires(kind: type[msgspec.Struct]):
    """Too few and our decoder refuses what the document allows."""
    schema = components(kind)[kind.__name__]
    config = kind.__struct_config__
    required = len(kind.__struct_fields__) - len(kind.__struct_defaults__)
    assert schema["minItems"] == required + (config.tag is not None)
    assert schema["additionalItems"] is True


def test_units_and_limits_reach_the_document():
    """`budget_us` without its unit and its range is a guess."""
    (budget,) = (item for item in SCHEMAS["InferRequest"]["items"] if item["title"] == "budget_us")
    assert "microseconds" in budget["description"]
    assert (budget["minimum"], budget["maximum"], budget["default"]) == (0, 2**53, 0)


def test_raw_bytes_are_not_called_base64():
    """In msgpack they are bytes; a client that sent base64 would be refused."""
    (data,) = (item for item in SCHEMAS["Tensor"]["items"] if item["title"] == "data")
    assert data["format"] == "binary"
    assert "contentEncoding" not in json.dumps(DOCUMENT)
