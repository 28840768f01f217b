"""Refusing where the request comes in what batchers would refuse anyway: the requester's half of overload. Pure; µs.

Two rules. What was said: a batcher that refuses a request for its deadline says how much later that would have to be.
Until then it holds for whoever would ask this batcher for no less and is due no earlier, so these are told the same
here.
Google's adaptive throttling, by what became of the last half second: of requests like this one, a part of
(requests - K * accepts - FEW) / (requests + 1) is refused here. A request counts once its fate is known, so slow
answers throttle nobody.
"""

from collections.abc import Callable
from math import ceil
from typing import NamedTuple

from narsil_stream.schemas.errors import Fault, Refused

K = 1.5
"""So many requests for each that is accepted get through: the ones beyond find out when the overload is over."""
FEW = 10
"""Refusals that throttle nobody yet: of so few nothing follows, and to send them costs little."""
STEP_US = 50_000
KEPT = 0.8
"""Of the counts in each step: after half a second a tenth of them is left."""
LASTS_US = 1_000_000
"""Without a refusal by a batcher for so long nothing is refused here."""
MOST_FLOWS = 1_024
LEAST_US = 1_000
"""Nobody is told to come back sooner."""
HOLDS_US = 50_000
"""So long at most what a batcher said is taken for true: an executor may come, and others may leave."""


class Kind(NamedTuple):
    """Requests that batchers treat alike."""

    model: str
    version: str
    tenant: str
    priority: int
    budget: int
    """Its number of bits: who has more time is refused less."""


class Asked(NamedTuple):
    """What a request asks for."""

    deadline_us: int
    nbytes: int


class Said(NamedTuple):
    """A batcher's refusal, and for whom it holds."""

    asked: Asked
    reach_us: int
    """The earliest deadline that could have been met."""
    until_us: int
    """When nobody knows any more."""

    def wait_us(self, asked: Asked) -> int:
        """How much later its deadline would have to be; not above 0: it may have room."""
        if asked.deadline_us < self.asked.deadline_us or asked.nbytes < self.asked.nbytes:
            return 0
        return self.reach_us - asked.deadline_us


MOST_SAID = 64
"""Batchers whose word is kept."""


class Flow:
    """What became of one kind of requests lately."""

    __slots__ = ("_again_us", "_carry", "_few", "_said", "_since_us", "_told_us", "accepts", "requests")

    def __init__(self, now_us: int, few: int = FEW) -> None:
        self._few = few
        self.requests = 0.0
        self.accepts = 0.0
        self._since_us = now_us
        self._told_us = now_us - LASTS_US
        """When a batcher refused last."""
        self._again_us = 0
        """When it said to come back."""
        self._carry = 0.0
        """Refusals that are due: spread evenly, where chance would bunch them."""
        self._said: dict[str, Said] = {}
        """By batcher."""

    def accepted(self, now_us: int) -> None:
        self._roll(now_us)
        self.requests += 1
        self.accepts += 1

    def refused(self, retry_after_us: int, now_us: int) -> None:
        """By a batcher, for whatever reason."""
        self._roll(now_us)
        self.requests += 1
        self._told_us = now_us
        self._again_us = now_us + retry_after_us

    def said(self, batcher: str, asked: Asked, retry_after_us: int, now_us: int) -> None:
        """A batcher refused a request for its deadline, and for nothing else."""
        said, reach_us = self._said.get(batcher), asked.deadline_us + retry_after_us
        if said and now_us < said.until_us and reach_us <= said.reach_us and asked.nbytes >= said.asked.nbytes:
            return
        if len(self._said) >= MOST_SAID:
            self._said.clear()
        self._said[batcher] = Said(asked, reach_us, now_us + min(retry_after_us, HOLDS_US))

    def check_said(self, asked: Asked, choose: Callable[[], str], now_us: int) -> None:
        """Raises OVERLOADED for what its batcher, the one that `choose` names, would refuse by what it said. It is
        neither asked nor counted: it costs no batcher anything."""
        if not self._said:
            return
        self._said = {batcher: said for batcher, said in self._said.items() if now_us < said.until_us}
        if self._said and (said := self._said.get(choose())) and (wait_us := said.wait_us(asked)) > 0:
            detail = "a moment ago there was no room for as much, nor is there now"
            raise Refused(Fault.OVERLOADED, detail, max(wait_us, LEAST_US))

    def check(self, now_us: int) -> None:
        """Raises OVERLOADED for a share of the requests when batchers refuse most of them."""
        if not self.throttles(now_us):
            return
        self._roll(now_us)
        self._carry += max(0.0, self.requests - K * self.accepts - self._few) / (self.requests + 1)
        if self._carry >= 1:
            self._carry -= 1
            self.requests += 1
            wait_us = max(self._again_us - now_us, LEAST_US)
            raise Refused(Fault.OVERLOADED, "most requests like this one are refused at the moment", wait_us)

    def throttles(self, now_us: int) -> bool:
        return now_us - self._told_us < LASTS_US and self.requests > K * self.accepts + self._few

    def idle(self, now_us: int) -> bool:
        return now_us - self._since_us > LASTS_US

    def _roll(self, now_us: int) -> None:
        if now_us - self._since_us >= STEP_US:
            steps = ceil((now_us - self._since_us) / STEP_US)
            self._since_us += steps * STEP_US
            kept = KEPT**steps
            self.requests *= kept
            self.accepts *= kept


class Throttle:
    """The flows of one requester."""

    def __init__(self, few: int = FEW) -> None:
        self._few = few
        self._flows: dict[Kind, Flow] = {}

    def flow(self, kind: Kind, now_us: int) -> Flow:
        flow = self._flows.get(kind)
        if flow is None:
            if len(self._flows) >= MOST_FLOWS:
                self._flows = {of: known for of, known in self._flows.items() if not known.idle(now_us)}
            if len(self._flows) >= MOST_FLOWS:
                self._flows.clear()
            flow = self._flows[kind] = Flow(now_us, self._few)
        return flow


def kind(model: str, version: str, tenant: str, priority: int, budget_us: int) -> Kind:
    return Kind(model, version, tenant, priority, budget_us.bit_length())
