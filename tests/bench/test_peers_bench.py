"""The bench beside other servers: who cannot be had is named, and what they serve is our engine."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from narsil_stream.bench import environments, peers, shell
from narsil_stream.bench.environments import NotInstalled
from narsil_stream.bench.peer_servers.engine import Engine, Order, Settings
from narsil_stream.bench.questions import WAYS, asked
from narsil_stream.cli import cli


def test_an_engine_answers_each_request_of_a_batch_with_its_own_scores() -> None:
    """Peers are given whole batches: rows of one request must not come back to another."""
    with shell.workplace("shell") as (_, model, backend):
        engine = Engine(Order(0, str(model), "noop", 100, Settings(64, 1)))
        questions = [asked(WAYS["http"], backend, rows, 2)[1] for rows in (3, 1, 7)]
        answers = engine.score([one.question.body for one in questions])
        for one, answer in zip(questions, answers, strict=True):
            np.testing.assert_array_equal(np.frombuffer(answer, np.float32), one.scores)
        (alone,) = engine.score([questions[0].question.body])
        assert alone == answers[0]


def test_an_environment_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    """pip's last line is what people search for."""
    said: list[str] = []
    with pytest.raises(NotInstalled, match="no-such-package"):
        environments.python(tmp_path / "env", (str(tmp_path / "no-such-package"),), said.append)
    assert "installing" in said[0]


def test_a_peer_that_cannot_be_had_is_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty place in a table looks as if nobody had thought of it."""
    lost = peers.PEERS["mosec"]._replace(packages=(str(tmp_path / "no-such-package"),))
    monkeypatch.setitem(peers.PEERS, "mosec", lost)
    pick = ["--peers", "mosec", "--kinds", "shell", "--rows", "10", "--connections", "4", "--data-dir", str(tmp_path)]
    done = CliRunner().invoke(cli, ["bench", "peers", "--quick", *pick])
    assert done.exit_code == 0, done.output
    assert "- absent: `shell/mosec`: NotInstalled: " in done.output
    assert "no-such-package" in done.output


def test_peers_and_kinds_that_there_are_not_are_refused() -> None:
    """A typing error must not cost an hour."""
    done = CliRunner().invoke(cli, ["bench", "peers", "--peers", "mosec,nobody"])
    assert done.exit_code == 2
    assert "'nobody' is none of mosec" in done.output
