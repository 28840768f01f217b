"""Heads of HTTP/1.1: why a request cannot be read, where it goes, and how an answer begins."""

import functools
import logging
import time
from email.utils import formatdate
from http import HTTPStatus
from urllib.parse import unquote

import httptools

from narsil_stream.gateways.http1_exchange import Headers
from narsil_stream.gateways.http_body import Problem

log = logging.getLogger(__name__)

REASONS = {status.value: status.phrase for status in HTTPStatus}


def problem(error: httptools.HttpParserError) -> Problem:
    """Why a request cannot be read."""
    if not isinstance(error, httptools.HttpParserCallbackError):
        return Problem(HTTPStatus.BAD_REQUEST, f"not HTTP/1.1: {error}")
    reason = error.__context__  # what a method that the parser calls has raised
    if isinstance(reason, Problem):
        return reason
    log.error("a request's head failed", exc_info=reason)
    return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error")


def too_large(detail: str) -> Problem:
    return Problem(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, detail)


def length_of(headers: dict[str, str]) -> int:
    """Of a body. Raises Problem where only its chunks would say it."""
    if "transfer-encoding" in headers:  # the parser would leave it out
        raise Problem(HTTPStatus.BAD_REQUEST, "a body in chunks behind an upgrade; expected its length, or no upgrade")
    return int(headers.get("content-length", "0"))


def path_of(url: bytes) -> str:
    """Decoded, without a query; the URL may name the host. Raises Problem."""
    try:
        path = url.partition(b"?")[0] if url.startswith((b"/", b"*")) else httptools.parse_url(url).path or b"/"
    except httptools.HttpParserInvalidURLError:
        raise Problem(HTTPStatus.BAD_REQUEST, f"{_text(url[:200])!r} is neither a path nor a URL") from None
    text = _text(path)
    return unquote(text) if "%" in text else text


def _text(raw: bytes) -> str:
    return raw.decode("latin-1")


def head(status: int, headers: Headers, length: int, keep: bool, old: bool) -> bytes:
    """Of an answer, to its end. `length`: of its body, in bytes; `keep`: the connection; `old`: to HTTP/1.0."""
    return b"%bcontent-length: %d\r\n\r\n" % (_lines(status, tuple(headers), keep, old, round(time.time())), length)


@functools.lru_cache(maxsize=64)
def _lines(status: int, headers: tuple[tuple[str, str], ...], keep: bool, old: bool, now: int) -> bytes:
    """All but the length. `now`: Unix time in seconds."""
    lines = [f"HTTP/1.1 {status} {REASONS.get(status, '')}", f"date: {formatdate(now, usegmt=True)}"]
    lines += [f"{name}: {value}" for name, value in headers if name != "connection"]
    if not keep:
        lines.append("connection: close")
    elif old:
        lines.append("connection: keep-alive")
    return "\r\n".join([*lines, ""]).encode("latin-1")
