"""The NATS subjects of version 1. Only `infer` is for the public; the rest is spoken between actors."""

INFER = "narsil.v1.infer"
"""`narsil.v1.infer.<model>` and `narsil.v1.infer.<model>.<version>`: requests. Any NATS client may publish."""

QUEUE_GROUP = "narsil-batchers"
"""All batchers share the public subjects in this queue group."""

BATCHER_BEAT = "narsil.v1.beat.batcher"
EXECUTOR_BEAT = "narsil.v1.beat.executor"
HELLO = "narsil.v1.hello"
"""Whoever starts says hello; batchers and executors answer with a beat, so that nobody waits for the next one."""

REPORT = "narsil.v1.report"
"""Each process reports its state and metrics here; `narsil serve` listens."""

TUNE = "narsil.v1.tune"
"""What changes limits of all that run: each process with batchers or gateways answers. For administrators only."""

TUNED = "narsil.v1.tuned"
"""Request/reply: which changes are in force? Whoever starts asks those that run."""

ADMIN = "narsil.v1.admin"
"""Below it: what changes which models are served. Only gateways and administrators may publish there."""

INBOX = "_INBOX.narsil"
"""Answers come below it, see `inbox`."""
DONE = "done"
"""In the name of an inbox: executors may answer there, see `permissions`."""


def inbox(user: str = "") -> str:
    """Below it come the answers to one user, known by its public nkey: a broker can keep others from listening."""
    return f"{INBOX}.{user}" if user else INBOX


def infer(model: str, version: str = "") -> str:
    return f"{INFER}.{model}.{version}" if version else f"{INFER}.{model}"


def ask(actor: str) -> str:
    """What gateways and clients say to one batcher: bundles of requests, cancels."""
    return f"narsil.v1.ask.{actor}"


def batcher(actor: str) -> str:
    """What executors say to one batcher: results, grants. Apart from `ask`, so that no caller can forge scores."""
    return f"narsil.v1.batcher.{actor}"


def executor(actor: str) -> str:
    """Directed messages to one executor: batches and demands."""
    return f"narsil.v1.executor.{actor}"


def describe(actor: str) -> str:
    """Request/reply: the model descriptions that an actor knows."""
    return f"narsil.v1.describe.{actor}"


def statistics(actor: str) -> str:
    """Request/reply: what a batcher has counted for each model."""
    return f"narsil.v1.statistics.{actor}"


def repository(actor: str) -> str:
    """Directed messages to one executor: what is in its model repository?"""
    return f"narsil.v1.repository.{actor}"


def admin(actor: str) -> str:
    """Directed messages to one executor that change what it serves. Permissions keep everybody else out of `admin`."""
    return f"{ADMIN}.executor.{actor}"


def reserved(reply: str) -> bool:
    """Whether a reply subject is one that a producer must not make a batcher publish to."""
    return reply.startswith(("narsil.", "$")) or reply in ("narsil", "$")
