"""Answers on their way out of a batcher: one by one to plain reply subjects, many in a message to gateways."""

import logging
from collections import defaultdict

from msgspec import Struct

from narsil_stream.core.bus import Bus
from narsil_stream.schemas import codec
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import Answers
from narsil_stream.schemas.wire import InferAnswer

log = logging.getLogger(__name__)


class Caller(Struct, frozen=True, gc=False):
    """Whom to answer. `slot` < 0: on a plain reply subject, in `spelling`; else in the asker's bundle of answers."""

    reply: str
    slot: int
    id: str
    spelling: codec.Spelling = codec.Spelling.MSGPACK


Answered = tuple[int, InferAnswer, bool]


class Answering:
    """Collects the answers of one turn of the event loop; `send` lets them go."""

    def __init__(self, bus: Bus, batcher: str) -> None:
        self._bus = bus
        self._batcher = batcher
        self._waiting: dict[str, list[Answered]] = defaultdict(list)

    def answer(self, caller: Caller, answer: InferAnswer, *, by_deadline: bool = False) -> None:
        """`by_deadline`: see `Answers`."""
        if caller.slot >= 0:
            self._waiting[caller.reply].append((caller.slot, answer, by_deadline))
            return
        headers = None
        if answer.fault:
            headers = {
                "Nats-Service-Error": answer.detail.encode("ascii", "replace").decode(),
                "Nats-Service-Error-Code": str(Fault[answer.fault].http),
            }
        try:
            self._bus.publish(caller.reply, codec.encode_answer(answer, caller.spelling), headers=headers)
        except Refused as refused:
            log.info("an answer was not sent: %s", refused.detail)

    def send(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, defaultdict(list)
            for reply, answered in waiting.items():
                self._send(reply, answered)

    def _send(self, reply: str, answered: list[Answered]) -> None:
        slots, answers, _ = zip(*answered, strict=True)
        by_deadline = tuple([slot for slot, _, so in answered if so])
        try:
            self._bus.send(reply, Answers(self._batcher, slots, answers, by_deadline))
        except Refused as refused:
            if refused.fault is Fault.TOO_LARGE and len(answered) > 1:
                middle = len(answered) // 2
                self._send(reply, answered[:middle])
                self._send(reply, answered[middle:])
            else:
                log.info("%d answers were not sent: %s", len(answered), refused.detail)
