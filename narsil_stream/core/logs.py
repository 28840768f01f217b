"""Structured logs on stderr: one line a record, as text for people or as JSON for collectors.

Modules log with the standard library: `log.info("joined", extra={"model": name, "rows": 4096})`. What `extra` holds
becomes fields of the line; the standard library refuses its own names there ("name", "args", "module" ...).
Payloads are never logged: of bytes, arrays and containers only the type is written.
"""

import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

import msgspec

from narsil_stream.core.config.schema import LogFormat, LogLevel

STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "actor"}
LONGEST = 2000
"""Characters of one text that a line keeps."""

Field = str | int | float | bool | None


def setup(level: LogLevel, format: LogFormat, actor: str, stream: TextIO | None = None) -> None:
    """Send all logs of this process to stderr (or `stream`). Called again, it replaces what it set up before.

    `actor` names who speaks, e.g. "batcher-1"; where actors share a process, `extra={"actor": ...}` overrides it.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(actor) if format == "json" else TextFormatter(actor))
    handler.name = __name__
    root = logging.getLogger()
    root.handlers = [other for other in root.handlers if other.name != __name__] + [handler]
    root.setLevel(level.upper())


class _Formatter(logging.Formatter):
    def __init__(self, actor: str) -> None:
        super().__init__()
        self.actor = actor

    def fields(self, record: logging.LogRecord) -> dict[str, Field]:
        """What the caller gave with `extra`, and the traceback if there is one."""
        fields = {name: _plain(value) for name, value in vars(record).items() if name not in STANDARD}
        if record.exc_info:
            fields["exception"] = _valid(self.formatException(record.exc_info))
        return fields

    def speaker(self, record: logging.LogRecord) -> str:
        return str(getattr(record, "actor", self.actor))


class TextFormatter(_Formatter):
    """`2026-01-31T12:00:00.123Z INFO    batcher-1 joined model=dlrm rows=4096`, a traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        fields = self.fields(record)
        trace = fields.pop("exception", None)
        pairs = [f"{name}={_quoted(value)}" for name, value in fields.items()]
        message = _one_line(_bounded(record.getMessage()))
        head = f"{_time(record)} {record.levelname:<7} {self.speaker(record)}"
        line = " ".join([head, message, *pairs])
        return f"{line}\n{trace}" if trace else line


class JsonFormatter(_Formatter):
    """One object a line: time, level, actor, logger, message, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        fixed = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "actor": self.speaker(record),
            "logger": record.name,
            "message": _bounded(record.getMessage()),
        }
        return msgspec.json.encode(fixed | self.fields(record) | fixed).decode()


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03}Z"


def _plain(value: object) -> Field:
    """`value` as a field. Whatever may be a payload is named by its type only."""
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else str(value)
    if isinstance(value, str | BaseException):
        return _bounded(str(value))
    return f"<{type(value).__name__}>"


def _bounded(text: str) -> str:
    return _valid(text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters)")


def _valid(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _one_line(text: str) -> str:
    """So that no caller's text can look like a line of ours, or steer a terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _quoted(value: Field) -> str:
    """A word as it is; what has spaces, quotes or control characters as a JSON string."""
    if not isinstance(value, str):
        return str(value)
    plain = value.isprintable() and value and not any(char in value for char in ' ="')
    return value if plain else _one_line(msgspec.json.encode(value).decode())
