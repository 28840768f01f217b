"""Who may call: tokens, scopes, and the file that says which are let in, while it changes."""

import logging
import os
from pathlib import Path

import pytest

from narsil_stream.core import access, tokens
from narsil_stream.core.access import CHALLENGES, VERBS, Access, Need, TokensFile
from narsil_stream.core.config import AccessConfig, Config, GrpcConfig, HttpConfig
from narsil_stream.core.tokens import Known, Scope
from narsil_stream.schemas.errors import Fault, Refused

DOCS = Path(__file__).parents[2] / "docs" / "security.md"
INFER, ADMIN, BOTH = frozenset[Scope]({"infer"}), frozenset[Scope]({"admin"}), frozenset[Scope]({"infer", "admin"})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.touch(0o600)
    return path


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch):
    """A change counts at once."""
    monkeypatch.setattr(access, "LOOK_EVERY_S", 0.0)


def let_in(file: Path, scopes: frozenset[Scope]) -> str:
    """A new token's header."""
    token = tokens.make()
    with file.open("a") as end:
        end.write(tokens.line(token, scopes, "somebody") + "\n")
    return f"Bearer {token}"


def guarded(file: Path, **config: object) -> Access:
    return Access(Config(access=AccessConfig(tokens_file=str(file)), **config), "http")  # type: ignore[arg-type]


def fault(guard: Access, header: str | None, verb: str) -> Fault | None:
    try:
        guard.check(header, verb)
    except Refused as refused:
        return refused.fault
    return None


@pytest.mark.parametrize("verb", [*VERBS, "RepositoryFormat", "TraceSetting", ""])
def test_a_verb_is_open_to_the_scopes_that_it_needs_and_to_no_other(verb: str, file: Path):
    """A token that may ask for scores must not be able to take the model away; what is not known is for admins."""
    headers = {scopes: let_in(file, scopes) for scopes in (INFER, ADMIN, BOTH)}
    guard = guarded(file)
    need = VERBS.get(verb, Need.ADMIN)
    for scopes, header in headers.items():
        wanted = None if need is Need.NOTHING or scopes & need.value else Fault.PERMISSION_DENIED
        assert fault(guard, header, verb) is wanted
    for header in (None, f"Bearer {tokens.make()}"):
        assert fault(guard, header, verb) is (None if need is Need.NOTHING else Fault.UNAUTHENTICATED)


def test_only_health_and_the_protocol_itself_are_open_to_all():
    """Probes have no token, and the documents are the same everywhere; all else says something about the models."""
    assert {verb for verb, need in VERBS.items() if need is Need.NOTHING} == {"ServerLive", "ServerReady", "Documents"}
    assert {verb for verb, need in VERBS.items() if need is Need.ADMIN} == {
        "RepositoryModelLoad",
        "RepositoryModelUnload",
    }


def test_the_documentation_has_the_verbs_as_they_are():
    """Who hands out a token looks there for what it opens."""
    text = DOCS.read_text()
    for need, said in {"NOTHING": "none", "READ": "infer or admin", "INFER": "infer", "ADMIN": "admin"}.items():
        verbs = [verb for verb, needed in VERBS.items() if needed is Need[need]]
        assert f"| {', '.join(verbs)} | {said} |" in text


def test_the_refusal_says_what_is_needed_and_nothing_of_the_token(file: Path):
    """It ends up in the logs of whoever made the mistake."""
    header = let_in(file, INFER)
    guard = guarded(file)
    cases = {
        (header, "RepositoryModelLoad"): "RepositoryModelLoad needs a token with scope admin",
        (let_in(file, ADMIN), "ModelInfer"): "ModelInfer needs a token with scope infer",
        ("Bearer secret", "ModelInfer"): "this token is not known",
        (None, "ModelInfer"): "expected the header `authorization: Bearer <token>`",
    }
    for (given, verb), told in cases.items():
        with pytest.raises(Refused) as refused:
            guard.check(given, verb)
        assert refused.value.detail == told


def test_the_scheme_is_told_in_any_case_and_with_any_space(file: Path):
    """RFC 9110: schemes are case-insensitive, and proxies rewrite spaces."""
    token = let_in(file, INFER).removeprefix("Bearer ")
    guard = guarded(file)
    for header in (f"bearer {token}", f"BEARER   {token} "):
        assert fault(guard, header, "ModelInfer") is None


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic dTpw", "narsil_x", "Bearer " + "x" * 10_000, "Bearer \udcff", "Bearer é"]
)
def test_whatever_else_a_header_holds_is_refused_as_such(header: str, file: Path):
    """A header is bytes of a stranger's: it must not end in a 500."""
    let_in(file, INFER)
    assert fault(guarded(file), header, "ModelInfer") is Fault.UNAUTHENTICATED


def test_without_tokens_this_machine_may_do_everything_and_others_no_admin_verb():
    """A certificate has no scopes, and a door that is open to all must not hand out the models."""
    here, there = Config(), Config(http=HttpConfig(host="0.0.0.0"), grpc=GrpcConfig(host="10.0.0.1"))
    for door in ("http", "grpc"):
        assert [fault(Access(here, door), None, verb) for verb in VERBS] == [None] * len(VERBS)
        for verb, need in VERBS.items():
            wanted = Fault.PERMISSION_DENIED if need is Need.ADMIN else None
            assert fault(Access(there, door), None, verb) is wanted
    insecure = Config(insecure=True, http=HttpConfig(host="0.0.0.0"))
    assert fault(Access(insecure, "http"), None, "RepositoryModelLoad") is None


def test_with_tokens_this_machine_needs_one_as_well(file: Path):
    """A proxy on the same machine brings strangers in from a loopback address."""
    let_in(file, INFER)
    assert fault(guarded(file, insecure=True), None, "ModelInfer") is Fault.UNAUTHENTICATED


def test_a_changed_file_counts_without_a_restart(file: Path):
    """A token that leaked must be dead before the next deployment."""
    old = let_in(file, INFER)
    guard = guarded(file)
    assert fault(guard, old, "ModelInfer") is None
    file.write_text("")
    new = let_in(file, INFER)
    assert (fault(guard, old, "ModelInfer"), fault(guard, new, "ModelInfer")) == (Fault.UNAUTHENTICATED, None)
    file.write_text("# nobody\n")
    assert fault(guard, new, "ModelInfer") is Fault.UNAUTHENTICATED


def test_a_change_that_leaves_time_and_size_alone_counts(file: Path):
    """Two writes within the clock's grain, or a tool that keeps times."""
    old = let_in(file, INFER)
    guard = guarded(file)
    before = file.stat()
    file.write_text("")
    new = let_in(file, INFER)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert (fault(guard, old, "ModelInfer"), fault(guard, new, "ModelInfer")) == (Fault.UNAUTHENTICATED, None)


def test_a_file_is_read_once_a_second_at_most(file: Path, monkeypatch: pytest.MonkeyPatch):
    """Reading it for each of thousands of requests would cost more than the requests."""
    monkeypatch.setattr(access, "LOOK_EVERY_S", 60.0)
    header = let_in(file, INFER)
    guard = guarded(file)
    file.unlink()
    assert fault(guard, header, "ModelInfer") is None


@pytest.mark.parametrize("broken", [b"narsil_plain infer\n", b"\xff\xfe", None])
def test_a_broken_new_file_keeps_the_tokens_and_says_why_once(
    broken: bytes | None, file: Path, caplog: pytest.LogCaptureFixture
):
    """A slip of an editor must not lock everybody out, nor fill the disk with logs."""
    header = let_in(file, INFER)
    guard, good = guarded(file), file.read_bytes()
    if broken is None:
        file.unlink()
    else:
        file.write_bytes(broken)
    for _ in range(3):
        assert fault(guard, header, "ModelInfer") is None
    (said,) = caplog.records
    assert said.levelno == logging.ERROR and "the tokens of before stay" in said.getMessage()
    assert str(file) in said.getMessage() and "narsil_plain" not in said.getMessage()
    file.write_bytes(good)
    new = let_in(file, INFER)
    assert [fault(guard, one, "ModelInfer") for one in (header, new)] == [None, None]


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, False), (0o644, True), (0o660, True)])
def test_a_file_that_others_may_read_or_change_is_warned_of(
    mode: int, warned: bool, file: Path, caplog: pytest.LogCaptureFixture
):
    """Who may write it may let himself in."""
    file.chmod(mode)
    TokensFile(file)
    assert bool(caplog.records) is warned


@pytest.mark.parametrize("scopes", [INFER, ADMIN, BOTH])
def test_a_line_is_read_as_it_was_written(scopes: frozenset[Scope]):
    """What `narsil token` prints is what gateways read."""
    token = tokens.make()
    line = tokens.line(token, scopes, "ci, nightly # 2")
    assert token not in line and token.startswith("narsil_") and len(token) == 50
    known = tokens.parse(f"# comment\n\n  {line}  \r\n".encode())
    assert known == {tokens.digest(token): Known(scopes, "ci, nightly # 2")}


@pytest.mark.parametrize(
    "bad",
    [
        "narsil_abc infer",
        "sha256:abc infer",
        f"sha256:{'a' * 64}",
        f"sha256:{'a' * 64} boss",
        f"sha256:{'a' * 64} infer,infer",
        f"sha256:{'a' * 64} infer admin",
        f"sha256:{'A' * 64} infer",
        f"sha256:{'a' * 64} infer\nsha256:{'a' * 64} admin",
    ],
)
def test_a_line_that_says_something_else_is_refused_by_its_number(bad: str):
    """The line may be a token itself: it is not shown."""
    with pytest.raises(ValueError, match=r"^line [23]: ") as refused:
        tokens.parse(f"# first\n{bad}\n".encode())
    assert "narsil_abc" not in str(refused.value) and "aaaa" not in str(refused.value)


def test_a_name_with_a_line_break_is_refused():
    """It would be a line of its own, which lets in whoever chose the name."""
    with pytest.raises(ValueError, match="one line"):
        tokens.line("t", INFER, f"x\nsha256:{'a' * 64} admin")


def test_http_says_how_to_log_in():
    """RFC 9110 asks for www-authenticate beside each 401."""
    assert CHALLENGES[Fault.UNAUTHENTICATED] == "Bearer"
