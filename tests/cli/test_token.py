"""`narsil token`: printed once, kept as a digest."""

import stat
from pathlib import Path

import pytest

from narsil_stream.core import tokens
from narsil_stream.core.access import Access
from narsil_stream.core.config import AccessConfig, Config
from tests.support import invoke


def test_a_token_is_printed_once_and_let_in_by_the_file(tmp_path: Path):
    """The two halves are made for each other, and the file alone opens nothing."""
    file = tmp_path / "tokens"
    first = invoke("token", "--file", file, "--name", "ci").stdout.strip()
    second = invoke("token", "--file", file, "--scope", "admin", "--scope", "infer").stdout.strip()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert first not in file.read_text() and second not in file.read_text()
    assert "infer # ci\n" in file.read_text()
    guard = Access(Config(access=AccessConfig(tokens_file=str(file))), "http")
    guard.check(f"Bearer {first}", "ModelInfer")
    guard.check(f"Bearer {second}", "RepositoryModelLoad")


def test_without_a_file_the_line_is_told_apart_from_the_token():
    """`TOKEN=$(narsil token)` must hold the token alone."""
    done = invoke("token", "--scope", "admin")
    token = done.stdout.strip()
    assert tokens.line(token, frozenset({"admin"})) in done.stderr


def test_a_last_line_without_an_end_is_not_run_into(tmp_path: Path):
    """Editors leave such files behind; both tokens would be lost."""
    file = tmp_path / "tokens"
    file.write_text(tokens.line("one", frozenset({"infer"}), "one"))
    invoke("token", "--file", file)
    assert len(tokens.parse(file.read_bytes())) == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--scope", "boss"), "Invalid value for '--scope'"),
        (("--name", "a\nb"), "one line"),
        (("--file", "absent/tokens"), "No such file"),
        (("--file", "other"), "other is no file of tokens: line 1"),
    ],
)
def test_what_cannot_be_done_is_told_and_no_token_printed(
    options: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A token that no file knows is worse than none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").write_text("something else\n")
    done = invoke("token", *options)
    assert done.exit_code != 0 and told in done.output and "narsil_" not in done.stdout
    assert (tmp_path / "other").read_text() == "something else\n"
