"""The error table is part of the wire: its rows are counted here one by one."""

import pytest

from narsil_stream.schemas.errors import DETAIL_CHARS, Fault, Refused, invalid, named

TABLE = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "TOO_LARGE": 413,
    "OVERLOADED": 429,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
RETRY = {"OVERLOADED", "UNAVAILABLE"}
GRPC_CODES = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
]
"""The names of google.rpc.Code, 0 to 16."""

each_fault = pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name)


def test_the_table_has_exactly_these_rows():
    """A renamed or renumbered row breaks clients that were right until then."""
    assert {name: fault.http for name, fault in Fault.__members__.items()} == TABLE


def test_no_two_rows_mean_the_same():
    """An enum makes an alias of a row that equals another, and one of the two names vanishes."""
    assert len(set(Fault)) == len(Fault.__members__)
    assert len({fault.http for fault in Fault}) == len(TABLE)


@each_fault
def test_only_passing_conditions_are_worth_a_retry(fault: Fault):
    """A client that retries what cannot succeed makes an overload out of a mistake."""
    assert fault.retry is (fault.name in RETRY)


@each_fault
def test_each_row_has_a_real_grpc_code(fault: Fault):
    """The gRPC gateway looks the name up; a wrong one would surface at the first such error."""
    assert fault.grpc in GRPC_CODES
    assert fault.grpc != "OK"
    if fault.name in GRPC_CODES:
        assert fault.grpc == fault.name


def test_pressure_is_resource_exhausted_in_grpc():
    """What Triton's clients and load generators back off from."""
    assert Fault.OVERLOADED.grpc == "RESOURCE_EXHAUSTED"


@each_fault
def test_a_fault_is_found_by_its_wire_name(fault: Fault):
    """The name is all that travels."""
    assert named(fault.name) is fault


@pytest.mark.parametrize("name", ["", "FROM_THE_FUTURE", "overloaded"])
def test_an_unknown_name_is_internal(name: str):
    """A newer server's fault is an error that one should not retry, not a crash."""
    assert named(name) is Fault.INTERNAL


def test_a_refusal_says_what_it_is():
    """Whoever reads a log or a traceback sees the fault and its detail."""
    refused = Refused(Fault.OVERLOADED, "later", 5)
    assert str(refused) == "OVERLOADED: later"
    assert (refused.fault, refused.detail, refused.retry_after_us) == (Fault.OVERLOADED, "later", 5)


def test_what_is_quoted_from_a_request_cannot_break_out_of_a_header():
    """Details travel in NATS and HTTP headers: a line feed in a tensor's name would start another header."""
    assert invalid("input 'x\r\nEvil: 1' is wrong").detail == r"input 'x\r\nEvil: 1' is wrong"
    assert invalid("Größe \x1b[31m").detail.isprintable()


def test_what_is_quoted_from_a_request_is_cut():
    """A name of a megabyte must not make an answer of a megabyte."""
    assert len(invalid("n" * 1_000_000).detail) == DETAIL_CHARS + len("...")
    assert invalid("n" * DETAIL_CHARS).detail == "n" * DETAIL_CHARS
