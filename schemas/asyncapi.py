"""The AsyncAPI 3.0 document of version 1, made from the Structs: `python -m narsil_stream.schemas.asyncapi` prints it.

`asyncapi.json` beside this file is its output; a test compares the two.
"""

import base64
import json
import struct
from typing import Any, NamedTuple, get_args

import msgspec
from msgspec import Struct

from narsil_stream.schemas import codec, subjects
from narsil_stream.schemas.codec import Spelling
from narsil_stream.schemas.describe import Schema, as_json, components, ref
from narsil_stream.schemas.errors import Fault, error_table
from narsil_stream.schemas.internal import (
    Answers,
    Asking,
    BatcherBeat,
    Control,
    Done,
    ExecutorBeat,
    Look,
    ModelCard,
    Report,
    ToBatcher,
    ToExecutor,
    ToRepository,
    Tune,
    Tuned,
)
from narsil_stream.schemas.model import NAME
from narsil_stream.schemas.oip import StatisticsReport
from narsil_stream.schemas.wire import InferAnswer, InferRequest, JsonAnswer, JsonError, JsonRequest, Tensor

JSON = "application/json"
MSGPACK = "application/msgpack"
DESCRIPTION = """Scores of recommender models (DLRM) over NATS.

Publish a request with a reply subject; the scores, or an error, come there. One content has two spellings: JSON, as the
Open Inference Protocol's infer request, and msgpack arrays with raw little-endian tensors. The first byte tells them
apart (0x80 and above: msgpack), and the answer uses the spelling of the question.

A plain request gets at most one answer: if the batcher or the broker that holds it dies, the sender times out and may
ask again. Without a reply subject, or with one below `narsil.` or `$`, a request is dropped and counted. A message must
stay below the server's `max_payload`.

Messages only grow: new members of objects and new items at the end of arrays may come at any time and are to be passed
over by who does not know them. In the schemas, a msgpack array's items have their names as `title`; `format: binary`
is msgpack's bin type, shown as base64 in examples, with the whole message as base64 in `x-encoded`.

`x-error-table` lists the names in `fault` and `code`; a name that is not listed there means INTERNAL.
"""


class Said(NamedTuple):
    """A message of the document."""

    kind: type[Struct] | None
    """None: an empty message."""
    content_type: str
    summary: str
    example: tuple[Any, bytes] | None = None
    """As it is read, and as it travels."""
    headers: Schema | None = None


def _tensor(name: str, datatype: str, shape: tuple[int, ...], code: str, *numbers: float) -> Tensor:
    return Tensor(name, datatype, shape, memoryview(struct.pack(f"<{len(numbers)}{code}", *numbers)))


REQUEST = InferRequest(
    "42",
    (
        _tensor("dense", "FP32", (2, 3), "f", 0.5, 1, 0, 2, -1.5, 0.25),
        _tensor("sparse", "INT32", (2, 2), "i", 17, 3, 0, 5),
    ),
    budget_us=50_000,
)
SCORES = InferAnswer("42", (_tensor("scores", "FP32", (2,), "f", 0.25, 0.875),), "dlrm", "7")
ERROR = InferAnswer(
    "42",
    fault=Fault.INVALID_ARGUMENT.name,
    detail="input 'sparse' [0, 1] is 30; expected an id from 0 to 29 (table 't1')",
)
TUNE = Tune({"batch.linger_us": 200}, ("batch.queue_rows",))
ERROR_HEADERS: Schema = {
    "type": "object",
    "description": "NATS's own service error headers. They come with every error, in either spelling.",
    "properties": {
        "Nats-Service-Error": {"type": "string", "description": "The detail, in ASCII."},
        "Nats-Service-Error-Code": {"enum": [str(fault.http) for fault in Fault]},
    },
}


def _json(value: Any, payload: bytes) -> tuple[Any, bytes]:
    return json.loads(payload), payload


def _messages() -> dict[str, Said]:
    public = {
        "requestJson": Said(
            JsonRequest, JSON, "Score rows", _json(REQUEST, codec.encode_request(REQUEST, Spelling.JSON))
        ),
        "requestMsgpack": Said(
            InferRequest, MSGPACK, "Score rows", (REQUEST, codec.encode_request(REQUEST, Spelling.MSGPACK))
        ),
        "scoresJson": Said(JsonAnswer, JSON, "Scores", _json(SCORES, codec.encode_answer(SCORES, Spelling.JSON))),
        "errorJson": Said(
            JsonError, JSON, "An error", _json(ERROR, codec.encode_answer(ERROR, Spelling.JSON)), ERROR_HEADERS
        ),
        "answerMsgpack": Said(
            InferAnswer,
            MSGPACK,
            "Scores, or an error",
            (SCORES, codec.encode_answer(SCORES, Spelling.MSGPACK)),
            ERROR_HEADERS,
        ),
    }
    directed = (*get_args(Asking), *get_args(ToBatcher), *get_args(ToExecutor), *get_args(ToRepository))
    kinds = (*directed, Answers, Done, BatcherBeat, ExecutorBeat, Report)
    internal = {_name(kind): Said(kind, MSGPACK, f"{kind.__name__}, between actors") for kind in kinds}
    return (
        public
        | internal
        | {
            "tune": Said(Tune, JSON, "Change live settings, or look at them", _json(TUNE, msgspec.json.encode(TUNE))),
            "tuned": Said(Tuned, JSON, "What is in force in one process"),
            "modelCards": Said(ModelCard, JSON, "A list of the models that an actor knows"),
            "statistics": Said(StatisticsReport, JSON, "What a batcher has counted for each version of a model"),
            "empty": Said(None, "application/octet-stream", "Nothing but the subject"),
        }
    )


def _name(kind: type[Struct]) -> str:
    return kind.__name__[0].lower() + kind.__name__[1:]


def _message(name: str, said: Said) -> Schema:
    payload = {"const": ""} if said.kind is None else ref(said.kind)
    if said.kind is ModelCard:
        payload = {"type": "array", "items": payload}
    message: Schema = {"name": name, "summary": said.summary, "contentType": said.content_type, "payload": payload}
    if said.headers is not None:
        message["headers"] = said.headers
    if said.example is not None:
        value, payload_bytes = said.example
        message["examples"] = [{"name": "example", "payload": as_json(value)}]
        if said.content_type == MSGPACK:
            message["x-encoded"] = base64.b64encode(payload_bytes).decode()
    return message


PARAMETERS = {
    "model": {"description": f"Name of a served model: {NAME.pattern}", "examples": ["dlrm"]},
    "version": {"description": f"Version of the model: {NAME.pattern}", "examples": ["7"]},
    "actor": {"description": "Name of the actor that listens."},
    "process": {"description": "Chosen at random by who asks, behind the public nkey of a login that has one."},
}


def _channel(address: str | None, description: str, *messages: str) -> Schema:
    channel: Schema = {
        "address": address,
        "description": description,
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
    }
    named = {name: PARAMETERS[name] for name in PARAMETERS if address and f"{{{name}}}" in address}
    return channel | ({"parameters": named} if named else {})


def _channels() -> dict[str, Schema]:
    requests = ("requestJson", "requestMsgpack")
    return {
        "infer": _channel(subjects.infer("{model}"), "Requests to the newest version of a model.", *requests),
        "inferVersion": _channel(
            subjects.infer("{model}", "{version}"), "Requests to one version of a model.", *requests
        ),
        "reply": _channel(
            None, "The reply subject of a request, whatever it is: an inbox, or a feed that others read.",
            "scoresJson", "errorJson", "answerMsgpack",
        ),
        "ask": _channel(
            subjects.ask("{actor}"), "Internal. What callers say to a batcher.", *map(_name, get_args(Asking))
        ),
        "batcher": _channel(
            subjects.batcher("{actor}"), "Internal. What executors say to a batcher.", *map(_name, get_args(ToBatcher))
        ),
        "executor": _channel(
            subjects.executor("{actor}"), "Internal. Directed to one executor.", *map(_name, get_args(ToExecutor))
        ),
        "answers": _channel(
            f"{subjects.INBOX}.{{process}}", "Internal. Answers to one gateway or client, bundled.", _name(Answers)
        ),
        "repository": _channel(
            subjects.repository("{actor}"), "Internal. Asks one executor what is in its model repository.", _name(Look)
        ),
        "admin": _channel(
            subjects.admin("{actor}"), "Internal, for administrators. Changes what one executor serves.", _name(Control)
        ),
        "done": _channel(f"{subjects.INBOX}.{{process}}", "Internal. An executor's answers to a gateway.", _name(Done)),
        "tune": _channel(
            subjects.TUNE, "For administrators. Changes live settings of all batchers and gateways.",
            "tune",
        ),
        "look": _channel(subjects.TUNED, "Internal. Which changes are in force? Any process may answer.", "empty"),
        "tuned": _channel(None, "The reply subject of `tune`, and of `look`.", "tuned"),
        "batcherBeat": _channel(subjects.BATCHER_BEAT, "Internal. Batchers that are alive.", _name(BatcherBeat)),
        "executorBeat": _channel(subjects.EXECUTOR_BEAT, "Internal. Executors that are alive.", _name(ExecutorBeat)),
        "hello": _channel(subjects.HELLO, "Internal. Who starts asks all others for a beat.", "empty"),
        "describe": _channel(subjects.describe("{actor}"), "Internal. Which models an actor knows.", "empty"),
        "described": _channel(None, "Internal. The reply subject of `describe`.", "modelCards"),
        "statistics": _channel(subjects.statistics("{actor}"), "Internal. What a batcher has counted.", "empty"),
        "counted": _channel(None, "Internal. The reply subject of `statistics`.", "statistics"),
        "report": _channel(subjects.REPORT, "Internal. State and metrics of each process.", _name(Report)),
    }  # fmt: skip


def _operation(action: str, channel: str, summary: str, reply: str = "", queue: str = "") -> Schema:
    operation: Schema = {"action": action, "channel": {"$ref": f"#/channels/{channel}"}, "summary": summary}
    operation["tags"] = [{"name": "public" if queue else "internal"}]
    if queue:
        operation["bindings"] = {"nats": {"queue": queue, "bindingVersion": "0.1.0"}}
    if reply:
        operation["reply"] = {"channel": {"$ref": f"#/channels/{reply}"}}
    return operation


def _operations() -> dict[str, Schema]:
    group = subjects.QUEUE_GROUP
    return {
        "infer": _operation("receive", "infer", "Batchers score a request.", "reply", group),
        "inferVersion": _operation("receive", "inferVersion", "Batchers score a request.", "reply", group),
        "ask": _operation("receive", "ask", "A batcher takes requests, and hears of callers who left."),
        "toBatcher": _operation("receive", "batcher", "A batcher takes results and slots."),
        "toExecutor": _operation("receive", "executor", "An executor takes batches and demand."),
        "answer": _operation("send", "answers", "A batcher answers what a gateway or client asked."),
        "batcherBeat": _operation("send", "batcherBeat", "A batcher says that it is alive."),
        "executorBeat": _operation("send", "executorBeat", "An executor says that it is alive."),
        "hello": _operation("send", "hello", "An actor has started."),
        "describe": _operation("receive", "describe", "An actor describes its models.", "described"),
        "look": _operation("receive", "repository", "An executor says what is in its model repository."),
        "control": _operation("receive", "admin", "An executor loads or unloads a model."),
        "done": _operation("send", "done", "An executor has done what it was asked for."),
        "tune": _operation("receive", "tune", "Batchers and gateways change live settings, and say so.", "tuned"),
        "tuned": _operation("receive", "look", "A batcher or gateway says what is in force.", "tuned"),
        "statistics": _operation("receive", "statistics", "A batcher says what it has counted.", "counted"),
        "report": _operation("send", "report", "A process reports to `narsil serve`."),
    }


def document() -> dict[str, Any]:
    messages = _messages()
    kinds = [said.kind for said in messages.values() if said.kind is not None]
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "narsil-stream", "version": "1", "description": DESCRIPTION},
        "defaultContentType": JSON,
        "servers": {
            "local": {
                "host": "127.0.0.1:4222",
                "protocol": "nats",
                "description": "The broker of `narsil serve`, by default.",
            }
        },
        "channels": _channels(),
        "operations": _operations(),
        "components": {
            "messages": {name: _message(name, said) for name, said in messages.items()},
            "schemas": components(*kinds),
        },
        "x-error-table": error_table(),
    }


if __name__ == "__main__":
    print(json.dumps(document(), indent=2, ensure_ascii=False))
