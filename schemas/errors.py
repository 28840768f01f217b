"""The closed set of errors and what each means on every protocol. Where another document differs, this table wins."""

import enum
from typing import Any, NamedTuple


class Meaning(NamedTuple):
    """One row of the table. `http` is also the NATS service error code."""

    http: int
    grpc: str
    retry: bool
    """Whether the same request may succeed later, so that a client should try again."""


class Fault(enum.Enum):
    """What can go wrong with a request. The names travel on the wire: never rename one."""

    INVALID_ARGUMENT = Meaning(400, "INVALID_ARGUMENT", False)
    UNAUTHENTICATED = Meaning(401, "UNAUTHENTICATED", False)
    PERMISSION_DENIED = Meaning(403, "PERMISSION_DENIED", False)
    NOT_FOUND = Meaning(404, "NOT_FOUND", False)
    TOO_LARGE = Meaning(413, "OUT_OF_RANGE", False)
    OVERLOADED = Meaning(429, "RESOURCE_EXHAUSTED", True)
    CANCELLED = Meaning(499, "CANCELLED", False)
    INTERNAL = Meaning(500, "INTERNAL", False)
    UNIMPLEMENTED = Meaning(501, "UNIMPLEMENTED", False)
    UNAVAILABLE = Meaning(503, "UNAVAILABLE", True)
    DEADLINE_EXCEEDED = Meaning(504, "DEADLINE_EXCEEDED", False)

    @property
    def http(self) -> int:
        return self.value.http

    @property
    def grpc(self) -> str:
        return self.value.grpc

    @property
    def retry(self) -> bool:
        return self.value.retry


def error_table() -> dict[str, dict[str, Any]]:
    """For published documents: each fault's HTTP and NATS service error code, gRPC code, and whether to try again."""
    return {fault.name: fault.value._asdict() for fault in Fault}


DETAIL_CHARS = 500


class Refused(Exception):
    """A request that gets an error for an answer. The only exception that crosses the house's inner borders.

    `detail` is written for the caller: what was wrong, where, and what was expected. It never names internals. What it
    quotes of the caller's is cut and made printable here, since details end up in message headers and logs.
    `retry_after_us` is a hint in microseconds, 0 when there is none. `by_deadline`: it is more, with a deadline so much
    later there would have been room.
    """

    def __init__(self, fault: Fault, detail: str, retry_after_us: int = 0, *, by_deadline: bool = False) -> None:
        if not detail.isprintable():
            detail = detail.encode("unicode_escape").decode()
        if len(detail) > DETAIL_CHARS:
            detail = f"{detail[:DETAIL_CHARS]}..."
        super().__init__(f"{fault.name}: {detail}")
        self.fault = fault
        self.detail = detail
        self.retry_after_us = retry_after_us
        self.by_deadline = by_deadline


def invalid(detail: str) -> Refused:
    return Refused(Fault.INVALID_ARGUMENT, detail)


def named(name: str) -> Fault:
    """The fault of that wire name; INTERNAL for one that this version does not know."""
    return Fault.__members__.get(name, Fault.INTERNAL)
