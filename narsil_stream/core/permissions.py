"""What each part of the system may say and hear at the broker, in NATS's terms. Made from `schemas.subjects`."""

from typing import NamedTuple

from nats.micro.service import ServiceVerb

from narsil_stream.core.service import PREFIX, controls
from narsil_stream.schemas import subjects

ANY = "*"


class Permissions(NamedTuple):
    """Allow lists of subjects; what is in none of them is denied. "subject group": only as a member of that group."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    responses: bool = False
    """It may answer each message that comes with a reply subject, once."""
    inbox: bool = True
    """It may listen below its own inbox, `subjects.inbox(public nkey)`."""

    def __or__(self, other: "Permissions") -> "Permissions":
        return Permissions(
            _union(self.publish, other.publish),
            _union(self.subscribe, other.subscribe),
            self.responses or other.responses,
            self.inbox or other.inbox,
        )


def _union(*lists: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(subject for one in lists for subject in one))


def _service(kind: str) -> tuple[str, ...]:
    """Where an actor of that kind hears NATS's service API."""
    return tuple(subject for verb in ServiceVerb for subject in controls(verb, kind, ANY))


PRODUCER = Permissions((f"{subjects.INFER}.>",), ())
CLIENT = PRODUCER | Permissions(
    (subjects.ask(ANY), subjects.describe(ANY), subjects.HELLO),
    (subjects.BATCHER_BEAT,),
)
GATEWAY = Permissions(
    (
        subjects.ask(ANY),
        subjects.describe(ANY),
        subjects.statistics(ANY),
        subjects.repository(ANY),
        subjects.admin(ANY),
        subjects.HELLO,
        subjects.REPORT,
        subjects.TUNED,
    ),
    (subjects.BATCHER_BEAT, subjects.EXECUTOR_BEAT, subjects.TUNE, subjects.TUNED, *_service("gateway")),
    responses=True,
)
BATCHER = Permissions(
    (
        subjects.executor(ANY),
        subjects.describe(ANY),
        subjects.BATCHER_BEAT,
        subjects.HELLO,
        subjects.REPORT,
        subjects.TUNED,
        f"{subjects.INBOX}.>",  # instead of `responses`: the server would remember the reply subject of each request
    ),
    (
        f"{subjects.INFER}.> {subjects.QUEUE_GROUP}",
        subjects.ask(ANY),
        subjects.batcher(ANY),
        subjects.describe(ANY),
        subjects.statistics(ANY),
        subjects.EXECUTOR_BEAT,
        subjects.HELLO,
        subjects.TUNE,
        subjects.TUNED,
        *_service("batcher"),
    ),
)
EXECUTOR = Permissions(
    (
        subjects.batcher(ANY),
        subjects.EXECUTOR_BEAT,
        subjects.HELLO,
        subjects.REPORT,
        f"{subjects.inbox(ANY)}.{subjects.DONE}.{ANY}",  # a load takes longer than the server remembers a reply subject
    ),
    (
        subjects.executor(ANY),
        subjects.describe(ANY),
        subjects.repository(ANY),
        subjects.admin(ANY),
        subjects.BATCHER_BEAT,
        subjects.EXECUTOR_BEAT,  # a newcomer serves what the others serve
        subjects.HELLO,
        *_service("executor"),
    ),
    responses=True,
    inbox=False,
)
SERVE = GATEWAY | BATCHER | EXECUTOR | CLIENT | Permissions((), (subjects.REPORT,))
ADMIN = Permissions(
    (
        subjects.admin(ANY),
        subjects.TUNE,
        subjects.repository(ANY),
        subjects.statistics(ANY),
        subjects.describe(ANY),
        f"{PREFIX}.>",
        subjects.HELLO,
    ),
    (subjects.BATCHER_BEAT, subjects.EXECUTOR_BEAT, subjects.REPORT),
)


class Role(NamedTuple):
    """One kind of user of the broker."""

    permissions: Permissions
    what: str


ROLES = {
    "gateway": Role(GATEWAY, "HTTP and gRPC gateways: `narsil gateway`"),
    "batcher": Role(BATCHER, "`narsil batcher`"),
    "executor": Role(EXECUTOR, "`narsil executor`"),
    "serve": Role(
        SERVE,
        "all of these, their supervisor and a client: `narsil serve`, `narsil gateway --mode inline`, "
        "`narsil executor --with-batcher`",
    ),
    "producer": Role(PRODUCER, "any NATS client that publishes requests"),
    "client": Role(CLIENT, "Python's `Client`, `narsil score` and `narsil request`: they speak to batchers directly"),
    "admin": Role(ADMIN, "people and tools that watch the actors (`nats micro`) or change which models are served"),
}


def as_docs() -> str:
    """The table of the documentation."""
    rows = ["| role | for | publishes | listens to |", "|---|---|---|---|"]
    for name, (permissions, what) in ROLES.items():
        publish = [f"`{subject}`" for subject in permissions.publish]
        if permissions.responses:
            publish.append("one answer to each message with a reply subject")
        heard = [f"`{subject}`" for subject in permissions.subscribe if not subject.startswith(PREFIX)]
        if len(heard) < len(permissions.subscribe):
            heard.append(f"its part of `{PREFIX}.>`")
        if permissions.inbox:
            heard.append(f"`{subjects.inbox('<its nkey>')}.>`")
        rows.append(f"| {name} | {what} | {', '.join(publish)} | {', '.join(heard)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(as_docs(), end="")
