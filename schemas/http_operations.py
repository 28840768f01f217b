"""What each path of the HTTP gateway takes and answers: the table that `openapi.py` makes its document of."""

from http import HTTPStatus
from typing import NamedTuple

from msgspec import Struct

from narsil_stream.schemas.errors import Fault
from narsil_stream.schemas.oip import (
    IndexRequest,
    ModelConfig,
    ModelMetadata,
    ModelReady,
    RepositoryAction,
    RepositoryEntry,
    ServerLive,
    ServerMetadata,
    ServerReady,
    StatisticsReport,
)

NOTHING: tuple[str, ...] = ()
READ, INFER, ADMIN = ("admin", "infer"), ("infer",), ("admin",)
"""Scopes of which a token must have one."""

TAGS = {
    "Scores": "Rows in, scores out.",
    "Health": "For load balancers and orchestrators. Open to everybody.",
    "Description": "What is served, and how it is doing.",
    "Model control": "Which models are served. Changes need `model_control = explicit` on the server.",
    "Documents": "This description. Open to everybody.",
    "Not offered": "Extensions of Triton's that answer 501, so that its clients get a clear error.",
}

ALWAYS = (HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
WITH_BODY = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
"""What only HTTP knows. These answers have no `code`."""
COMING = (Fault.INVALID_ARGUMENT, Fault.TOO_LARGE, Fault.OVERLOADED)
"""What reading a body may end in."""


class Operation(NamedTuple):
    """One verb at one or several paths."""

    verb: str
    method: str
    paths: tuple[str, ...]
    tag: str
    summary: str
    said: str = ""
    scopes: tuple[str, ...] = NOTHING
    answer: type[Struct] | None = None
    """Of 200, in JSON; None: `openapi.py` knows."""
    listed: bool = False
    """200 is a list of `answer`."""
    unready: bool = False
    """503 has the form of 200."""
    body: type[Struct] | None = None
    """None: `openapi.py` knows, or there is none."""
    faults: tuple[Fault, ...] = ()
    """Rows of the error table, beside INTERNAL and what tokens are refused with."""

    @property
    def takes_body(self) -> bool:
        return self.body is not None or self.verb == "ModelInfer"

    @property
    def statuses(self) -> tuple[HTTPStatus, ...]:
        """Of what only HTTP knows."""
        return ALWAYS + (WITH_BODY if self.takes_body else ())

    @property
    def refusals(self) -> tuple[Fault, ...]:
        """In the order of the error table."""
        named = {Fault.INTERNAL, *self.faults}
        if self.scopes:
            named |= {Fault.UNAUTHENTICATED, Fault.PERMISSION_DENIED}
        if any("{" in path for path in self.paths):
            named.add(Fault.NOT_FOUND)
        return tuple(fault for fault in Fault if fault in named)


def _of_model(path: str = "") -> tuple[str, ...]:
    """Without and with a version."""
    return f"/v2/models/{{model}}{path}", f"/v2/models/{{model}}/versions/{{version}}{path}"


def _not_offered(verb: str, method: str, *paths: str) -> Operation:
    summary = f"{verb}: not offered"
    return Operation(verb, method, paths, "Not offered", summary, scopes=ADMIN, faults=(Fault.UNIMPLEMENTED,))


CONTROL = (*COMING, Fault.PERMISSION_DENIED, Fault.UNAVAILABLE, Fault.DEADLINE_EXCEEDED)
CONTROLLED = "503 and 504 name the executors that did not come along; asking again is safe."

OPERATIONS = (
    Operation(
        "ModelInfer", "POST", _of_model("/infer"), "Scores", "Score rows",
        "Without a version, the newest one scores. What is more than a batch or a message holds is split, and its "
        "scores are joined in the order of the rows.\n\n"
        "`dense` comes as FP32, FP16 or FP64; ids (`sparse`, or `values` with `lengths`) as INT32 or INT64. "
        "`parameters.timeout` is the time budget in microseconds: what cannot be answered in time is refused at once, "
        "with 429. `parameters.priority` goes from 1, the most urgent, to 255. Who shares what there is is told "
        "apart by the token or, where none is needed, by the header `narsil-tenant` or `parameters.tenant`.\n\n"
        "**Binary tensors** (`application/octet-stream`): the JSON comes first and gives each such tensor "
        "`parameters.binary_data_size` in place of `data`; the raw little-endian bytes follow in the same order, and "
        "the header Inference-Header-Content-Length says how long the JSON is. Scores come back that way where an "
        "output has `parameters.binary_data` true, or the request `parameters.binary_data_output`. Any mix is "
        "possible.\n\n"
        "**msgpack** (`application/msgpack`): arrays with raw little-endian tensors; the answer comes in it too, "
        "scores or error.\n\n"
        "A body of any other content type is read as JSON.",
        INFER,
        faults=(*COMING, Fault.CANCELLED, Fault.UNAVAILABLE, Fault.DEADLINE_EXCEEDED),
    ),
    Operation("ServerLive", "GET", ("/v2/health/live",), "Health", "Is the gateway alive?", answer=ServerLive),
    Operation(
        "ServerReady", "GET", ("/v2/health/ready",), "Health", "Would a request be scored now?",
        "503 while no batcher is heard, and from the moment that the gateway begins to stop.",
        answer=ServerReady, unready=True,
    ),
    Operation(
        "ModelReady", "GET", _of_model("/ready"), "Health", "Would a request to this model be scored now?",
        "503 for a model that nobody serves, too.", READ, ModelReady, unready=True,
    ),
    Operation("ServerMetadata", "GET", ("/v2",), "Description", "Name, version, extensions", "", READ, ServerMetadata),
    Operation(
        "ModelMetadata", "GET", _of_model(), "Description", "Inputs, outputs and versions of a model",
        "Give `sparse`, or `values` with `lengths`: one of the two.", READ, ModelMetadata, faults=(Fault.UNAVAILABLE,),
    ),
    Operation(
        "ModelConfig", "GET", _of_model("/config"), "Description", "Configuration of a model, in Triton's form", "",
        READ, ModelConfig, faults=(Fault.UNAVAILABLE,),
    ),
    Operation(
        "ModelStatistics", "GET", ("/v2/models/stats", *_of_model("/stats")), "Description",
        "Requests, rows and times of models",
        "All batchers together, since each was started. Times are nanoseconds, each with how often it was measured.",
        READ, StatisticsReport, faults=(Fault.UNAVAILABLE,),
    ),
    Operation(
        "Metrics", "GET", ("/metrics",), "Description", "Metrics of this gateway process, for Prometheus",
        "`narsil serve` gives those of all processes together on its metrics port.", READ,
    ),
    Operation(
        "RepositoryIndex", "POST", ("/v2/repository/index",), "Model control", "Models in the repository", "", READ,
        RepositoryEntry, listed=True, body=IndexRequest, faults=(*COMING, Fault.UNAVAILABLE),
    ),
    Operation(
        "RepositoryModelLoad", "POST", ("/v2/repository/models/{model}/load",), "Model control", "Serve a model",
        f"The newest version in the repository, as it is there now. Answered when it is served. {CONTROLLED}",
        ADMIN, body=RepositoryAction, faults=CONTROL,
    ),
    Operation(
        "RepositoryModelUnload", "POST", ("/v2/repository/models/{model}/unload",), "Model control",
        "Stop serving a model", f"All its versions. What was accepted before is answered. {CONTROLLED}",
        ADMIN, body=RepositoryAction, faults=CONTROL,
    ),
    Operation("Documents", "GET", ("/openapi.json",), "Documents", "This description, as OpenAPI 3.1"),
    Operation("Documents", "GET", ("/docs",), "Documents", "This description, as a page"),
    *(
        operation
        for kind in ("System", "Cuda")
        for at in [f"/v2/{kind.lower()}sharedmemory"]
        for operation in (
            _not_offered(f"{kind}SharedMemoryStatus", "GET", f"{at}/status", f"{at}/region/{{region}}/status"),
            _not_offered(f"{kind}SharedMemoryRegister", "POST", f"{at}/region/{{region}}/register"),
            _not_offered(
                f"{kind}SharedMemoryUnregister", "POST", f"{at}/unregister", f"{at}/region/{{region}}/unregister"
            ),
        )
    ),
    *(
        _not_offered(verb, method, path)
        for verb, path in (("TraceSetting", "/v2/trace/setting"), ("LogSettings", "/v2/logging"))
        for method in ("GET", "POST")
    ),
)  # fmt: skip
