"""What `narsil broker --init` lets each role do, at a real nats-server: its part, and nothing else."""

import asyncio
import contextlib
import inspect
import json
import stat
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import nats
import pytest
from nats.aio.subscription import Subscription

from narsil_stream.core.broker_init import CONFIG, User, init
from narsil_stream.core.client import BlockingClient
from narsil_stream.core.config import NatsConfig
from narsil_stream.core.permissions import ROLES, as_docs
from narsil_stream.schemas import subjects
from narsil_stream.schemas.internal import Report
from tests.asking import Producer, ask_http, infer_json, json_scores, some_rows
from tests.support import NatsServer, System, invoke, until

DOCS = Path(__file__).parents[2] / "docs" / "security.md"
OTHER = subjects.inbox("UOTHER") + ".0011223344556677"
DONE = f"{subjects.inbox('UOTHER')}.{subjects.DONE}.0011223344556677"
NAMES = {"infer": "ctr", "inbox": "UOTHER", "ask": "b-1", "batcher": "b-1", "executor": "e-1", "describe": "e-1",
         "statistics": "b-1", "repository": "e-1", "admin": "e-1"}  # fmt: skip

DENIED_PUBLISH = {
    "producer": ["ask", "batcher", "executor", "describe", "statistics", "repository", "admin", "BATCHER_BEAT",
                 "EXECUTOR_BEAT", "HELLO", "REPORT", OTHER, DONE, "$SRV.PING", "_INBOX.x"],
    "client": ["batcher", "executor", "statistics", "repository", "admin", "BATCHER_BEAT", "EXECUTOR_BEAT", "REPORT",
               OTHER, DONE, "$SRV.PING"],
    "gateway": ["infer", "batcher", "executor", "BATCHER_BEAT", "EXECUTOR_BEAT", OTHER, DONE, "$SRV.PING"],
    "batcher": ["infer", "ask", "batcher", "statistics", "repository", "admin", "EXECUTOR_BEAT", "$SRV.PING",
                "scores.feed"],
    "executor": ["infer", "ask", "executor", "describe", "statistics", "repository", "admin", "BATCHER_BEAT", OTHER,
                 "$SRV.PING"],
    "admin": ["infer", "ask", "batcher", "executor", "BATCHER_BEAT", "EXECUTOR_BEAT", "REPORT", OTHER, DONE],
    "serve": ["scores.feed", "$SRV.PING"],
}  # fmt: skip
EVERYTHING = [">", "narsil.>", "narsil.v1.>", f"{subjects.ADMIN}.>", "_INBOX.>", "_INBOX.narsil.>", OTHER, DONE]
ACTORS = ["infer", "ask", "batcher", "executor", "statistics", "repository", "admin"]
DENIED_SUBSCRIBE = {
    "producer": [*ACTORS, "describe", "BATCHER_BEAT", "EXECUTOR_BEAT", "HELLO", "REPORT", "$SRV.PING"],
    "client": [*ACTORS, "describe", "EXECUTOR_BEAT", "HELLO", "REPORT", "$SRV.PING"],
    "gateway": [*ACTORS, "describe", "HELLO", "REPORT"],
    "batcher": ["infer", "executor", "repository", "admin", "BATCHER_BEAT", "REPORT"],
    "executor": ["infer", "ask", "batcher", "statistics", "REPORT"],
    "admin": [*ACTORS, "describe", "HELLO", "$SRV.PING"],
    "serve": ["infer"],
}  # fmt: skip


class Broker(NamedTuple):
    server: NatsServer
    users: Mapping[str, User]

    @property
    def url(self) -> str:
        return self.server.url

    def login(self, name: str) -> NatsConfig:
        return NatsConfig(url=self.url, nkey_seed_file=str(self.users[name].seed_file))

    def raw(self, name: str) -> dict[str, Any]:
        """Arguments for nats-py."""
        return {"nkeys_seed": str(self.users[name].seed_file), "inbox_prefix": self.users[name].inbox}

    def violations(self) -> list[str]:
        return [line for line in self.server.log.splitlines() if "iolation" in line]


@contextlib.contextmanager
def permitted(folder: Path) -> Iterator[Broker]:
    """A broker with a user for each role, and a second producer called mallory."""
    users = init(folder / "nats", NatsConfig(), {role: role for role in ROLES} | {"mallory": "producer"})
    with NatsServer("-c", str(folder / "nats" / CONFIG)) as server:
        yield Broker(server, {user.name: user for user in users})


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with permitted(tmp_path_factory.mktemp("permitted")) as running:
        yield running


def subject(name: str) -> str:
    """A concrete subject: of `schemas.subjects` by its name there, or as it is."""
    what = getattr(subjects, name, name)
    if callable(what):
        return str(what(NAMES[name]))
    return f"{what}.executor.e-1" if what == subjects.ADMIN else str(what)


def denied(broker: Broker, role: str, wanted: str, action: str) -> bool:
    """Whether the server says so of an attempt to publish, or to subscribe, as that role."""

    async def scene() -> bool:
        errors: list[str] = []

        async def on_error(error: Exception) -> None:
            errors.append(str(error))

        connection = await nats.connect(broker.url, error_cb=on_error, allow_reconnect=False, **broker.raw(role))
        try:
            if action == "publish":
                await connection.publish(wanted, b"x")
            else:
                await connection.subscribe(wanted)
            for _ in range(2):  # nats-py writes its first ping past what waits to be sent
                await connection.flush()
            return any("permissions violation" in error for error in errors)
        finally:
            await connection.close()

    return asyncio.run(scene())


@pytest.mark.parametrize("role", ROLES)
def test_a_role_cannot_publish_what_is_not_its_part(role: str, broker: Broker):
    """Who holds one seed could forge scores, take work away or unload models."""
    assert [what for what in DENIED_PUBLISH[role] if not denied(broker, role, subject(what), "publish")] == []


@pytest.mark.parametrize("role", ROLES)
def test_a_role_cannot_listen_to_what_is_not_for_it(role: str, broker: Broker):
    """Requests hold what people clicked on, answers what they are thought to like."""
    tried = [*DENIED_SUBSCRIBE[role], *EVERYTHING]
    assert [what for what in tried if not denied(broker, role, subject(what), "subscribe")] == []


def test_a_batcher_takes_requests_only_as_a_member_of_the_group(broker: Broker):
    """Outside of it, it would see the requests of all others, too."""

    async def subscribe(queue: str) -> None:
        connection = await nats.connect(broker.url, allow_reconnect=False, **broker.raw("batcher"))
        try:
            await connection.subscribe(f"{subjects.INFER}.>", queue=queue)
            for _ in range(2):
                await connection.flush()
        finally:
            await connection.close()

    before = len(broker.violations())
    asyncio.run(subscribe(subjects.QUEUE_GROUP))
    assert len(broker.violations()) == before
    asyncio.run(subscribe("another-group"))
    until(lambda: len(broker.violations()) > before, "the other group is denied")


def test_nobody_is_let_in_without_a_key(broker: Broker):
    """The file would be of no use."""
    with pytest.raises(nats.errors.Error, match=r"(?i)authorization"):
        asyncio.run(nats.connect(broker.url, allow_reconnect=False, error_cb=_quiet))


async def _quiet(error: Exception) -> None:
    """nats-py prints errors otherwise."""


def test_every_subject_is_said_by_somebody_and_heard_by_somebody():
    """A subject that is new in the schemas would work everywhere but where permissions are used."""
    known = {name for name, what in vars(subjects).items() if _is_subject(name, what)}
    for direction in ("publish", "subscribe"):
        allowed = [one for role in ROLES.values() for one in getattr(role.permissions, direction)]
        missing = {
            name for name in known - {"inbox", "INBOX", "DONE"} if not any(covers(a, subject(name)) for a in allowed)
        }
        assert missing == set(), direction


def _is_subject(name: str, what: object) -> bool:
    if inspect.isfunction(what):
        return name != "reserved"
    return name.isupper() and name != "QUEUE_GROUP"


def covers(allowed: str, concrete: str) -> bool:
    """NATS's rule for wildcards."""
    pattern, words = allowed.partition(" ")[0].split("."), concrete.split(".")
    if pattern[-1] == ">":
        prefix = pattern[:-1]
        return len(words) >= len(prefix) and all(p in ("*", w) for p, w in zip(prefix, words, strict=False))
    return len(pattern) == len(words) and all(p in ("*", w) for p, w in zip(pattern, words, strict=True))


def test_the_whole_system_works_with_a_key_for_each_part(tmp_path: Path, criteo_model: Path):
    """Permissions that are too narrow show as timeouts, long after a change of the code."""
    rows = some_rows(criteo_model, 3)
    with permitted(tmp_path) as broker:
        seeds = {name: user.seed_file for name, user in broker.users.items()}
        counts = {"executors": 2, "batchers": 2, "gateways": 1}
        with System(broker.url, criteo_model, seeds=seeds, **counts) as system:
            with Producer(broker.url, **broker.raw("producer")) as producer:
                for drained in (False, True):
                    answer = json.loads(producer.ask(subjects.infer("ctr"), infer_json(rows)).data)
                    assert json_scores(answer) == pytest.approx(rows.scores, abs=1e-6)
                    over_http = ask_http(system.http_port, "POST", "/v2/models/ctr/infer", infer_json(rows))
                    assert json_scores(over_http.json) == pytest.approx(rows.scores, abs=1e-6)
                    asked = ask_http(system.http_port, "GET", "/v2/models/stats").json["model_stats"]
                    assert asked[0]["inference_stats"]["success"]["count"] > 0
                    assert ask_http(system.http_port, "POST", "/v2/repository/index").json[0]["state"] == "READY"
                    loaded = ask_http(system.http_port, "POST", "/v2/repository/models/ctr/load")
                    assert (loaded.status, loaded.json["code"]) == (403, "PERMISSION_DENIED")
                    with BlockingClient(broker.login("client")) as client:
                        scores = client.score("ctr", dense=rows.dense, sparse=rows.ids)
                        assert scores == pytest.approx(rows.scores, abs=1e-6)
                        assert client.describe("ctr").spec.name == "ctr"
                    if not drained:
                        for kind in ("batcher", "executor"):
                            system.submit(system.runtimes[kind][0].drain()).result(20)
            with Producer(broker.url, **broker.raw("admin")) as admin:
                until(partial(_all_report, admin, admin.listen(subjects.REPORT), set()), "each part reports")
                for verb in ("PING", "INFO", "STATS"):
                    answers = [json.loads(message.data) for message in admin.ask_all(f"$SRV.{verb}", count=3)]
                    kinds = {answer["name"] for answer in answers}
                    assert kinds == {"narsil-executor", "narsil-batcher", "narsil-gateway"}
        assert broker.violations() == []


def _all_report(admin: Producer, heard: Subscription, kinds: set[str]) -> bool:
    """Takes one more report in."""
    kinds.add(msgspec.msgpack.decode(admin.next(heard).data, type=Report).kind)
    return kinds >= {"executor", "batcher", "gateway"}


def test_one_producer_cannot_read_or_forge_the_answers_of_another(broker: Broker):
    """Both have the same role, but not the same key: inboxes go by the key."""
    inbox = f"{broker.users['producer'].inbox}.0011223344556677"
    assert not denied(broker, "producer", inbox, "subscribe")
    assert denied(broker, "mallory", inbox, "subscribe")
    assert denied(broker, "mallory", f"{broker.users['producer'].inbox}.>", "subscribe")
    assert denied(broker, "mallory", inbox, "publish")


def test_limits_are_changed_by_administrators_alone(broker: Broker):
    """A gateway that was broken into must not open the queues of all the others."""
    assert not denied(broker, "admin", subjects.TUNE, "publish")
    for role in ("gateway", "batcher", "executor", "serve", "client", "producer"):
        assert denied(broker, role, subjects.TUNE, "publish")


def test_an_executor_answers_where_it_was_asked_and_nowhere_else(broker: Broker):
    """It may answer whoever wants its description, but not send scores past the batcher."""

    async def scene() -> tuple[bytes, list[str]]:
        errors: list[str] = []

        async def on_error(error: Exception) -> None:
            errors.append(str(error))

        executor = await nats.connect(broker.url, error_cb=on_error, **broker.raw("executor"))
        asking = await nats.connect(broker.url, **broker.raw("batcher"))
        asked = await executor.subscribe(subjects.describe("e-1"))
        await executor.flush()
        question = asyncio.create_task(asking.request(subjects.describe("e-1"), timeout=10))
        message = await asked.next_msg(10)
        await message.respond(b"cards")
        answer = (await question).data
        await executor.publish(message.reply, b"again")
        for _ in range(2):
            await executor.flush()
        await executor.close()
        await asking.close()
        return answer, errors

    answer, errors = asyncio.run(scene())
    assert answer == b"cards"
    assert len(errors) == 1 and "permissions violation for publish" in errors[0]


def test_seeds_and_configuration_are_for_their_owner_alone(tmp_path: Path):
    """Whoever reads a seed is that part of the system."""
    users = init(tmp_path / "nats", NatsConfig(), {"gateway": "gateway"})
    files = list((tmp_path / "nats").iterdir())
    assert {path.name for path in files} == {CONFIG, "gateway.nk"}
    assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [0o600, 0o600]
    assert stat.S_IMODE((tmp_path / "nats").stat().st_mode) == 0o700
    assert users[0].seed_file.read_text().strip() not in (tmp_path / "nats" / CONFIG).read_text()


def test_init_says_what_to_do_next_and_overwrites_nothing(tmp_path: Path):
    """A second run would lock every part out; a seed on the terminal ends up in its history."""
    folder = tmp_path / "na ts"
    done = invoke("broker", "--init", folder, "--user", "billing=producer", "--nats-port", "4333")
    assert done.exit_code == 0, done.output
    for words in ("narsil broker --from", "executor.nk' narsil executor", "--inbox-prefix _INBOX.narsil.U", ":4333"):
        assert words in done.output
    before = {path: path.read_text() for path in folder.iterdir()}
    assert "billing.nk" in {path.name for path in before}
    assert not any(text.strip() in done.output for text in before.values())
    again = invoke("broker", "--init", folder)
    assert again.exit_code == 1 and "is there already" in again.output
    assert {path: path.read_text() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--init", "new", "--user", "bob=boss"), "role 'boss' is none of gateway, batcher"),
        (("--init", "new", "--user", "../bob=producer"), "expected a name that matches"),
        (("--init", "new", "--user", "gateway=producer"), "there is a user gateway already"),
        (("--init", "new", "--nats-port", "0"), "needs a port that is named"),
        (("--user", "bob=producer"), "--user goes with --init"),
        (("--init", "new", "--from", "new"), "give one of them"),
        (("--from", "new"), "there is no new/nats-server.conf: `narsil broker --init new` writes one"),
    ],
)
def test_what_init_cannot_do_is_told(
    options: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each is a slip of the hand, and none may leave a half-made folder."""
    monkeypatch.chdir(tmp_path)
    done = invoke("broker", *options)
    assert done.exit_code != 0 and told in done.output
    assert list(tmp_path.iterdir()) == []


def test_the_documentation_has_the_permissions_as_they_are():
    """Who is asked whether a role is safe to hand out looks there."""
    assert as_docs() in DOCS.read_text(), "python -m narsil_stream.core.permissions prints the table for it"
