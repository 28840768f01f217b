"""docs/from-triton.md says what the code does: a team decides by it whether it can move."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from narsil_stream.core.access import VERBS, Need
from narsil_stream.core.config import Config
from narsil_stream.core.config.settings import settings
from narsil_stream.gateways.grpc_verbs import VERBS as GRPC_VERBS
from narsil_stream.gateways.grpc_verbs import Verbs as GrpcVerbs
from narsil_stream.gateways.http_codec import JSON_BYTES
from narsil_stream.gateways.http_verbs import ROUTES, Verbs
from narsil_stream.schemas.errors import Fault
from narsil_stream.schemas.oip import BatchStatistics, InferStatistics, ModelStatistics
from narsil_stream.schemas.protobuf import SERVICE

PAGE = (Path(__file__).parent.parent / "docs" / "from-triton.md").read_text()
SCOPES = {"none": Need.NOTHING, "infer": Need.INFER, "infer or admin": Need.READ, "admin": Need.ADMIN}
NOT_OFFERED = (GrpcVerbs.no_shared_memory, GrpcVerbs.no_tracing, GrpcVerbs.no_log_settings)


def table(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, without its head."""
    (section,) = re.findall(rf"^## {heading}$(.*?)(?:^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


SUPPORT = table("What is there")


def paths(cell: str) -> Iterator[tuple[str, str]]:
    """Method and path of an HTTP cell; [...] may be left out."""
    if not cell:
        return
    method, _, path = cell.strip("`").partition(" ")
    yield method, re.sub(r"\[.*?\]", "", path)
    if "[" in path:
        yield method, re.sub(r"[][]", "", path)


def test_the_paths_are_those_of_the_gateway():
    """With their methods and verbs, all of them and no other."""
    said = [(method, path, verb) for verb, http, *_ in SUPPORT for method, path in paths(http)]
    assert len(set(said)) == len(said)
    assert set(said) == {(route.method, route.path, route.verb) for route in ROUTES}


def test_the_verbs_over_grpc_are_those_of_the_service():
    """As the descriptor has them that Triton's clients were made from."""
    assert {verb for verb, _, grpc, *_ in SUPPORT if grpc == "yes"} == {method.name for method in SERVICE.methods}
    assert {grpc for _, _, grpc, *_ in SUPPORT} == {"yes", ""}


@pytest.mark.parametrize(("verb", "scope"), sorted({(row[0], row[3]) for row in SUPPORT}))
def test_the_scopes_are_those_that_are_asked_for(verb: str, scope: str):
    """The same over both protocols."""
    assert VERBS.get(verb, Need.ADMIN) is SCOPES[scope]


def test_what_is_not_offered_is_marked_and_nothing_else():
    """Over HTTP and over gRPC."""
    marked = {verb for verb, *_, notes in SUPPORT if notes == "not offered"}
    assert marked == {route.verb for route in ROUTES if route.handler is Verbs.not_offered}
    assert marked == {name for name, verb in GRPC_VERBS.items() if verb in NOT_OFFERED}


def test_the_error_table_is_the_one_that_there_is():
    """Clients decide by it whether to try again."""
    assert table("Errors") == [[f.name, str(f.http), f.grpc, "yes" if f.retry else "no"] for f in Fault]


def test_the_limits_are_the_defaults():
    """With the settings that change them."""
    config = Config()
    for what, default, setting, _ in table("Limits"):
        number = int(re.sub(r"\D", "", default)) << (20 if "MiB" in default else 0)
        if setting == "fixed":
            assert (what, number) == ("JSON in a body", JSON_BYTES)
            continue
        section, _, name = setting.strip("`").partition(".")
        assert getattr(getattr(config, section), name) == number, what


def test_every_setting_that_is_named_exists():
    """A flag that is gone is an error when somebody tries to move."""
    named = set(re.findall(r"`((?:batch|http|grpc|nats|access)\.\w+)`", PAGE))
    assert named and named <= set(settings())
    ours = re.findall(r"`(--[a-z-]+)", "\n".join(row[-1] for row in table("Model control")))
    assert ours and set(ours) <= {setting.flag for setting in settings().values()}


def test_the_fields_of_statistics_are_all_named():
    """People build dashboards on them."""
    named = {name for cell, _ in table("Statistics") for name in re.findall(r"`(\w+)`", cell)}
    fields = {*ModelStatistics.__struct_fields__, *InferStatistics.__struct_fields__}
    assert named == fields - {"name", "version", "inference_stats"}
    assert set(BatchStatistics.__struct_fields__) - {"batch_size"} <= named
