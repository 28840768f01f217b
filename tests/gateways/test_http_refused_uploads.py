"""A request that is refused before its body has come: the caller, who is still sending, gets to know why."""

import http.client
import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from narsil_stream.core.config import Config
from tests.certificates import Files
from tests.support import PATIENCE_S, NatsServer, System

BODY = bytes(300_000)


@pytest.fixture(scope="module")
def port(shared_system: System) -> int:
    return shared_system.http_port


def test_the_connection_lives_on(port: int) -> None:
    """It would be closed on a caller who is still sending, and who then sees a broken pipe and no answer."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as wire:
        wire.sendall(b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(BODY))
        for at in range(0, len(BODY), 100_000):
            wire.sendall(BODY[at : at + 100_000])
        answer = http.client.HTTPResponse(wire)
        answer.begin()
        assert (answer.status, set(json.loads(answer.read()))) == (404, {"error"})
        wire.sendall(b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        second = http.client.HTTPResponse(wire)
        second.begin()
        assert second.status == 200


def test_curl_shows_the_answer_over_http2(nats_server: NatsServer, criteo_model: Path, tmp_path: Path) -> None:
    """After an answer that overtook the body the stream is reset, which is all that curl then shows: now and then."""
    if shutil.which("curl") and b"HTTP2" not in subprocess.run(["curl", "--version"], capture_output=True).stdout:
        pytest.skip("curl is built without HTTP/2")
    config = Config(access=Files(tmp_path).settings(mutual=False))
    with System(nats_server.url, criteo_model, config=config, gateways=1) as system:
        url = f"https://127.0.0.1:{system.http_port}/nowhere"
        for size in (10, 100_000) * 20:
            assert "no such path" in curl(url, size, "--http2", "--cacert", str(tmp_path / "ca.pem"))


def test_who_asks_before_sending_is_told_at_once(port: int) -> None:
    """A body of gigabytes need not come at all."""
    assert "no such path" in curl(f"http://127.0.0.1:{port}/nowhere", len(BODY), "-H", "expect: 100-continue")


def curl(url: str, size: int, *options: str) -> str:
    """What is shown of a request."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = ["curl", "-sS", *options, url, "--data-binary", "@-"]
    done = subprocess.run(command, input=BODY[:size], capture_output=True, timeout=PATIENCE_S)
    return (done.stdout + done.stderr).decode()
