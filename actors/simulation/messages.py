"""What simulated gateways and batchers say to each other; to executors go the messages of `schemas.internal`.

A request's rows are its number, over and over, and its scores are its rows: somebody else's would show.
"""

from typing import NamedTuple

from narsil_stream.schemas.internal import Batch, BatcherBeat, Cancel, Demand, ExecutorBeat, Grant, Result


class Wish(NamedTuple):
    slot: int
    request: int
    model: str
    rows: int
    priority: int
    budget_us: int
    sent_us: int
    """By the wall clock of the gateway."""
    tenant: str


class Wishes(NamedTuple):
    """Gateway -> batcher, in place of `Bundle`."""

    reply: str
    wishes: tuple[Wish, ...]


class Answer(NamedTuple):
    slot: int
    request: int
    fault: str
    scores: bytes | memoryview
    retry_after_us: int = 0
    by_deadline: bool = False


class Replies(NamedTuple):
    """Batcher -> gateway, in place of `Answers`."""

    batcher: str
    answers: tuple[Answer, ...]


class Computed(NamedTuple):
    """What an executor's device says to the executor. No fault of the bus touches it."""

    batch: Batch
    result: Result


Message = Wishes | Cancel | Replies | Batch | Demand | Result | Grant | ExecutorBeat | BatcherBeat | Computed


def score(request: int, rows: int) -> bytes:
    return request.to_bytes(4, "little") * rows


def requests_in(rows: bytes | memoryview) -> list[int]:
    """The numbers of the requests whose rows these are, in order."""
    return list(dict.fromkeys(int.from_bytes(rows[at : at + 4], "little") for at in range(0, len(rows), 4)))


def told(message: Message) -> str:
    """For people. Empty: heartbeats, of which there are too many."""
    match message:
        case Wishes():
            return "asks " + ", ".join(f"r{wish.request} ({wish.rows} rows)" for wish in message.wishes)
        case Cancel():
            return f"withdraws slots {', '.join(map(str, message.slots))}"
        case Replies():
            return "answers " + ", ".join(f"r{one.request} {one.fault or 'scored'}" for one in message.answers)
        case Batch():
            numbers = " ".join(f"r{number}" for number in requests_in(message.dense))
            slot = f"{message.slot.index}.{message.slot.generation}"
            return f"batch {message.batch} of {message.rows} rows on slot {slot}: {numbers}"
        case Demand():
            back = "".join(f", gives back {slot.index}.{slot.generation}" for slot in message.returned)
            return f"pleads for {message.rows} rows{back}"
        case Result():
            how = message.fault or ("scored" if message.scores.nbytes else "turned away")
            kept = f", slot {message.grant.index}.{message.grant.generation}" if message.grant else ""
            return f"result of batch {message.batch}: {how}{kept}"
        case Grant():
            return f"grants slot {message.slot.index}.{message.slot.generation}"
        case BatcherBeat() | ExecutorBeat() if message.state != "up":
            return f"says that it is {message.state}"
    return ""
