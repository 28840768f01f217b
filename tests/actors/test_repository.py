"""Which artifacts an executor loads at start, and what it says when it cannot."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from narsil_stream.actors.repository import Found, Missing, Repository
from narsil_stream.kernels.artifact import WEIGHTS, ArtifactError, write
from narsil_stream.kernels.init import criteo_spec, random_model
from tests.support import NatsServer, narsil, plain_environ


def make(folder: Path, name: str, version: str = "1") -> Path:
    spec = replace(criteo_spec(name, rows=10, dim=4, bottom=(8,), top=(8,)), version=version)
    write(folder, random_model(spec, seed=1))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a in versions 9, 10 and word; b in version 1, in a folder of another name."""
    root = tmp_path / "repository"
    for version in ("9", "10", "word"):
        make(root / "a" / version, "a", version)
    make(root / "whatever", "b")
    (root / "notes.txt").write_text("not an artifact")
    (root / "empty").mkdir()
    return root


def names(found: list[Found]) -> list[tuple[str, str]]:
    return [one.name for one in found]


def test_both_layouts_are_read_and_names_are_those_of_the_description(folder: Path) -> None:
    """Folders are renamed and copied; what is in them knows what it is."""
    listing = Repository(folder=folder).look()
    assert sorted(listing.found) == [("a", "10"), ("a", "9"), ("a", "word"), ("b", "1")]
    assert not listing.damaged


def test_the_newest_version_is_meant_unless_one_is_named(folder: Path) -> None:
    """As for requests: numbers by value, and above words."""
    repository = Repository(folder=folder)
    assert repository.find("a").name == ("a", "10")
    assert repository.find("a", "9").name == ("a", "9")
    for wanted in (("a", "8"), ("c", ""), ("whatever", "")):
        with pytest.raises(Missing, match="a version 10, a version 9"):
            repository.find(*wanted)


def test_what_was_told_must_be_loaded_and_the_rest_may_be(folder: Path, tmp_path: Path) -> None:
    """A damaged artifact that nobody named must not take the others down with it at the next restart."""
    own = make(tmp_path / "own", "own")
    (folder / "whatever" / "model.json").write_text("{")
    repository = Repository([own], folder)
    must, rest = repository.at_start(None)
    assert (names(must), names(rest)) == ([("own", "1")], [("a", "10")])
    must, rest = repository.at_start(("a",))
    assert (names(must), names(rest)) == ([("own", "1"), ("a", "10")], [])
    must, rest = repository.at_start(("*",))
    assert (names(must), names(rest)) == ([("own", "1")], [("a", "10")])
    for named in (("c",), ("whatever",)):
        with pytest.raises(ArtifactError):
            repository.at_start(named)


def test_a_damaged_newer_version_is_not_passed_over_in_silence(folder: Path) -> None:
    """Who loads a model after an upload of version 11 means that one; who has an old broken one does not care."""
    repository = Repository(folder=folder)
    (folder / "a" / "word" / "model.json").write_text("{")
    assert repository.find("a").name == ("a", "10")
    make(folder / "a" / "11", "a", "11")
    (folder / "a" / "11" / "model.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"11/model\.json"):
        repository.find("a")
    assert repository.find("a", "10").name == ("a", "10")


def test_an_artifact_that_is_told_and_in_the_folder_too_is_one(folder: Path) -> None:
    """`--model repository/x --model-repository repository` is an easy thing to write."""
    must, rest = Repository([folder / "whatever"], folder).at_start(None)
    assert (names(must), names(rest)) == ([("b", "1")], [("a", "10")])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--model-control", "explicit", "--load-models", "a,nobody"), "no model 'nobody'"),
        (("--model-control", "explicit", "--load-models", "../a"), "a model's name matches"),
        (("--load-models", "a"), "without explicit control every model is loaded"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "executor"])
def test_a_start_that_cannot_serve_what_it_was_told_says_so(
    folder: Path, tmp_path: Path, nats_server: NatsServer, command: str, options: tuple[str, ...], told: str
) -> None:
    """A typing error must end the start, not show as 404 later."""
    url = nats_server.url
    arguments = (command, "--model-repository", folder, "--nats-url", url, "--data-dir", tmp_path, *options)
    process = narsil(*arguments, env=plain_environ())
    _, said = process.communicate(timeout=60)
    text = " ".join(said.decode().replace("│", " ").split())
    assert process.returncode in (1, 2, 78)
    assert told in text
    assert "Traceback" not in text


def test_a_repository_without_a_model_ends_the_start_by_default(tmp_path: Path, nats_server: NatsServer) -> None:
    """Nothing could ever be served, since nothing can be loaded later."""
    root = tmp_path / "repository"
    make(root / "m", "m")
    (root / "m" / WEIGHTS).write_bytes(b"")
    url = nats_server.url
    process = narsil("executor", "--model-repository", root, "--nats-url", url, env=plain_environ())
    _, said = process.communicate(timeout=60)
    assert process.returncode == 78
    assert b"sha256" in said and b"no model that can be served" in said
