"""Logs as lines of text and as JSON."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from narsil_stream.core.config.schema import LogFormat
from narsil_stream.core.logs import setup

LOG = logging.getLogger("narsil_stream.tests.logs")


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Give the root logger back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)


def logged(format: LogFormat, message: str, /, *args: object, **fields: object) -> str:
    """What one call to `info` writes."""
    stream = io.StringIO()
    setup("info", format, "batcher-1", stream)
    LOG.info(message, *args, extra=fields)
    return stream.getvalue()


def test_a_text_line_has_time_level_actor_message_and_fields():
    """People and grep lose the thread if one of them is missing."""
    line = logged("text", "joined %s", "dlrm", rows=4096, why="no room left")
    time, rest = line.split(" ", 1)
    assert time.endswith("Z") and "T" in time
    assert rest == 'INFO    batcher-1 joined dlrm rows=4096 why="no room left"\n'


def test_a_json_line_is_one_object_with_the_same_fields():
    """Collectors parse line by line: a second line would be a broken record."""
    line = logged("json", "two\nlines", rows=1, ratio=0.5, ok=True, nothing=None)
    record = json.loads(line)
    assert line.count("\n") == 1
    assert record.pop("time").endswith("Z")
    assert record == {
        "level": "info",
        "actor": "batcher-1",
        "logger": LOG.name,
        "message": "two\nlines",
        "rows": 1,
        "ratio": 0.5,
        "ok": True,
        "nothing": None,
    }


def test_a_field_cannot_replace_the_fixed_part_of_a_record():
    """A caller's `level=` or `time=` field must not forge a record."""
    assert json.loads(logged("json", "x", level="fake", time="never"))["level"] == "info"


@pytest.mark.parametrize("format", ["text", "json"])
def test_payloads_are_never_logged(format: LogFormat):
    """What users send stays out of the logs, even when somebody passes it by mistake."""
    line = logged(format, "got", body=b"secret", view=memoryview(b"secret"), ids=["secret"], row={"a": "secret"})
    assert "secret" not in line
    assert "bytes" in line


def test_long_text_is_cut():
    """An error that quotes a whole request must not fill the disk."""
    assert len(logged("text", "x", detail="y" * 1_000_000)) < 3000


def test_a_message_cannot_forge_a_second_text_line():
    """A model name or error text from outside could otherwise write log lines of its own."""
    line = logged("text", "bad\n2026 ERROR fake", model="a\x1b[31m\nb")
    assert line.count("\n") == 1
    assert "\x1b" not in line


def test_text_that_is_not_valid_unicode_is_still_logged():
    """A record that cannot be encoded would be lost, and with it the reason for an error."""
    assert "\\ud800" in json.loads(logged("json", "odd \ud800"))["message"]


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_traceback_goes_with_its_record(format: LogFormat):
    """An unknown exception is told to the log and not to the caller, so it must arrive here in full."""
    stream = io.StringIO()
    setup("info", format, "executor-1", stream)
    try:
        raise LookupError("what happened")
    except LookupError:
        LOG.exception("failed")
    assert "Traceback" in stream.getvalue()
    assert "LookupError: what happened" in stream.getvalue()


def test_a_record_may_name_another_actor():
    """Inline, several actors share one process and one setup."""
    assert json.loads(logged("json", "x", actor="gateway-1"))["actor"] == "gateway-1"


def test_what_is_below_the_level_is_not_written():
    """`log_level` would be accepted and ignored."""
    stream = io.StringIO()
    setup("warning", "text", "batcher-1", stream)
    LOG.info("quiet")
    LOG.warning("loud")
    assert "quiet" not in stream.getvalue()
    assert "loud" in stream.getvalue()


def test_setting_up_twice_writes_each_record_once():
    """A supervisor's child that sets up again would log everything twice."""
    first = io.StringIO()
    setup("info", "text", "a", first)
    assert logged("text", "once").count("once") == 1
    assert first.getvalue() == ""
