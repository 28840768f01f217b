"""`narsil request` against a real system: what is sent, what is printed, what is said when nobody answers."""

import asyncio
import json
import os
import pty
from pathlib import Path

import nats
import numpy as np
import pytest

from narsil_stream.cli import request as command
from narsil_stream.cli.request import pretty
from tests.support import NatsServer, System, expected, invoke, narsil


@pytest.fixture
def example(shared_system: System, tmp_path: Path) -> Path:
    """What `--example` prints, in a file."""
    result = invoke("request", "--nats-url", shared_system.url, "--example")
    assert result.exit_code == 0, result.output
    path = tmp_path / "example.json"
    path.write_text(result.stdout)
    return path


def test_the_example_gets_the_scores_of_the_reference(shared_system: System, criteo_model: Path, example: Path):
    """It is the first request that a new user sends, and the one that documents show."""
    result = invoke("request", "--nats-url", shared_system.url, "--model", "ctr", "--model-version", "1", example)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["model_name"], answer["model_version"]) == ("ctr", "1")
    dense, sparse = (
        np.array(tensor["data"]).reshape(tensor["shape"]) for tensor in json.loads(example.read_text())["inputs"]
    )
    direct = expected(criteo_model, dense.astype(np.float32), sparse.astype(np.int32))
    assert np.allclose(answer["outputs"][0]["data"], direct, rtol=0, atol=1e-6)


@pytest.mark.parametrize("arguments", [("-",), ()])
def test_the_example_can_be_piped_into_a_request(arguments: tuple[str, ...], shared_system: System):
    """One line in the documentation shows both ends; without a model's name where only one is served."""
    request = ("request", "--nats-url", shared_system.url)
    with narsil(*request, "--example") as asked, narsil(*request, *arguments, stdin=asked.stdout) as answered:
        out, said = answered.communicate()
    assert (answered.returncode, said) == (0, b"")
    assert len(json.loads(out)["outputs"][0]["data"]) == 1


def test_an_error_answer_is_printed_and_told_with_the_next_step(shared_system: System, example: Path):
    """Scripts read the answer and the status, people the message."""
    request = json.loads(example.read_text())
    request["inputs"][1]["data"][2] = 10**6
    example.write_text(json.dumps(request))
    result = invoke("request", "--nats-url", shared_system.url, example)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["code"] == "INVALID_ARGUMENT"
    first, second = result.stderr.splitlines()
    assert first.startswith("narsil: INVALID_ARGUMENT: input 'sparse' [0, 2] is 1000000; expected")
    assert "narsil request --example" in second


def test_a_payload_that_is_no_request_gets_an_answer_in_json(shared_system: System, tmp_path: Path):
    """Whatever bytes are sent, the answer can be read."""
    for payload in (b"", b"{", b"\x93\x00"):
        file = tmp_path / "request"
        file.write_bytes(payload)
        result = invoke("request", "--nats-url", shared_system.url, "--model", "ctr", file)
        assert result.exit_code == 1
        assert json.loads(result.stdout)["code"] == "INVALID_ARGUMENT"


def test_an_unknown_model_is_told_with_those_that_are_served(shared_system: System, example: Path):
    """The name is mistyped more often than the model is missing."""
    for arguments in ((example,), ("--example",)):
        result = invoke("request", "--nats-url", shared_system.url, "--model", "ctrr", *arguments)
        assert result.exit_code == 1
        assert "NOT_FOUND" in result.stderr and "served: " in result.stderr and "ctr" in result.stderr
        assert "--model" in result.stderr


def test_without_a_broker_it_says_where_it_looked(monkeypatch: pytest.MonkeyPatch, example: Path):
    """The most common mistake of all."""
    monkeypatch.setattr(command, "CONNECT_S", 0.1)
    result = invoke("request", "--nats-url", "nats://127.0.0.1:1", "--model", "ctr", example)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no NATS server at nats://127.0.0.1:1" in result.stderr and "narsil serve" in result.stderr


def test_a_broker_without_a_batcher_is_told_at_once(nats_server: NatsServer, example: Path):
    """The broker knows that nobody listens: there is nothing to wait for."""
    result = invoke("request", "--nats-url", nats_server.url, "--model", "ctr", "--timeout-ms", "60000", example)
    assert result.exit_code == 1
    assert "UNAVAILABLE: the broker is there, but nobody listens on narsil.v1.infer.ctr" in result.stderr


def test_silence_ends_at_the_timeout(nats_server: NatsServer, example: Path):
    """A frozen batcher still listens, for the broker."""

    payload = example.read_bytes()

    async def scene() -> int:
        async with await nats.connect(nats_server.url) as frozen:
            got = await frozen.subscribe("narsil.v1.infer.>")
            await frozen.flush()
            process = narsil("request", "--nats-url", nats_server.url, "--model", "ctr", "--timeout-ms", "50", example)
            message = await got.next_msg(timeout=20)
            assert (message.subject, message.data) == ("narsil.v1.infer.ctr", payload)
            assert message.reply.startswith("_INBOX.")
            out, said = await asyncio.to_thread(process.communicate)
            assert out == b""
            assert b"DEADLINE_EXCEEDED: no answer on narsil.v1.infer.ctr within 0.05 s (--timeout-ms)" in said
            return process.returncode

    assert asyncio.run(scene()) == 1


def test_a_broker_that_wants_a_login_gets_it(monkeypatch: pytest.MonkeyPatch, criteo_model: Path, example: Path):
    """Every command that talks to a broker takes the same options."""
    with NatsServer("--user", "u", "--pass", "secret") as server:
        login = ("--nats-url", server.url, "--nats-user", "u", "--nats-password")
        with System(server.url.replace("nats://", "nats://u:secret@"), criteo_model):
            assert invoke("request", *login, "secret", example).exit_code == 0
        monkeypatch.setattr(command, "CONNECT_S", 0.5)
        in_url = ("--nats-url", server.url.replace("nats://", "nats://u:wrong@"))
        for refused in (invoke("request", *login, "wrong", example), invoke("request", *in_url, example)):
            assert refused.exit_code == 1
            assert "UNAUTHENTICATED" in refused.stderr and "check the login" in refused.stderr
            assert "wrong" not in refused.stderr


def test_a_request_beyond_the_broker_s_limit_is_not_sent(nats_server: NatsServer, tmp_path: Path):
    """The server would cut the connection, and the message would be about that."""
    file = tmp_path / "request"
    file.write_bytes(b" " * (1 << 20))
    result = invoke("request", "--nats-url", nats_server.url, "--model", "ctr", file)
    assert result.exit_code == 1
    assert "TOO_LARGE" in result.stderr and "fewer rows" in result.stderr


def test_usage_that_cannot_work_ends_with_status_2(shared_system: System, example: Path):
    """Before anything is sent."""
    for arguments in (("--model", "a.b", example), ("--model", "*", example), ("--example", example), ("/none",)):
        result = invoke("request", "--nats-url", shared_system.url, *arguments)
        assert (result.exit_code, result.stdout) == (2, ""), arguments


def test_a_terminal_gets_json_for_people(shared_system: System, example: Path):
    """And a pipe the bytes as they came: the two must not be mixed up."""
    ours, theirs = pty.openpty()
    sent = ("request", "--nats-url", shared_system.url, example)
    with narsil(*sent, stdout=theirs) as process:
        process.wait()
        os.close(theirs)
        seen = os.read(ours, 65536).decode()
        os.close(ours)
    assert seen.splitlines()[0] == "{" and '  "model_name": "ctr",' in seen
    assert json.loads(seen)["outputs"][0]["shape"] == [1]
    assert invoke(*sent).stdout.count("\n") == 1


def test_a_terminal_without_a_request_is_told_how_to_get_one(shared_system: System):
    """Waiting for a person to type JSON looks like hanging."""
    ours, theirs = pty.openpty()
    with narsil("request", "--nats-url", shared_system.url, stdin=theirs) as process:
        _, said = process.communicate()
    os.close(theirs)
    os.close(ours)
    assert process.returncode == 2
    assert b"narsil request --example" in said


def test_pretty_json_keeps_lists_of_numbers_on_one_line():
    """Thirteen features on thirteen lines hide the rest; what looks like a list inside a text stays as it is."""
    compact = b'{"shape":[1,2],"data":[0.5,-1e-05],"note":"[1,\\n2]","deep":[[1,2],[3]],"none":[]}'
    shown = pretty(compact)
    assert json.loads(shown) == json.loads(compact)
    assert b'"shape": [1, 2],\n' in shown and b'"data": [0.5, -1e-05],\n' in shown
