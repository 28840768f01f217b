"""The batcher's policy: asking for slots, and what executors that go do to its queue. Times are µs."""

from narsil_stream.actors.flights import DEMAND_EVERY_US
from narsil_stream.schemas.errors import Fault
from narsil_stream.schemas.internal import Slot
from tests.actors.puppets import LEASE_US, MODEL, S0, S1, Batcher, one_executor, ticket, two_executors


def test_an_executor_that_leaves_gets_nothing_new():
    """It would turn everything away, or never come to its end."""
    batcher = two_executors()
    (one,) = batcher.offer(ticket())
    batcher.hear("e1", S0, state="leaving")
    (sent,) = batcher.decide()
    assert (sent.executor, sent.tickets) == ("e2", [one])
    batcher.offer(ticket())
    assert batcher.decide() == []
    assert [plea.executor for plea in batcher.pleas] == ["e2"]


def test_an_executor_that_leaves_still_answers_what_it_has():
    """A rolling restart would fail requests, or compute them twice."""
    batcher = one_executor(S0)
    (one,) = batcher.offer(ticket())
    (sent,) = batcher.decide()
    batcher.hear("e1", busy=[S0], state="leaving")
    batcher.decide()
    assert batcher.drops == []
    assert batcher.answer(sent) == [one]


def test_waiting_work_asks_for_a_slot_and_keeps_asking():
    """Other batchers hold the slots: nobody moves one without being asked, and the question may be lost."""
    batcher = one_executor()
    batcher.hear("e1")
    batcher.offer(ticket(rows=3, deadline_us=300_000))
    batcher.decide()
    ((name, demand),) = [(plea.executor, plea.demand) for plea in batcher.pleas]
    assert (name, demand.batcher, demand.rows, demand.slack_us) == ("e1", "b", 3, 300_000)
    batcher.decide()
    assert batcher.pleas == [], "not on every turn"
    assert batcher.policy.wake_us(0) == DEMAND_EVERY_US
    batcher.decide(DEMAND_EVERY_US)
    assert len(batcher.pleas) == 1


def test_work_waits_for_an_executor_that_has_just_given_a_slot():
    """Its heartbeat comes right behind the slot, and says what it serves: to refuse the work now would be hasty."""
    batcher = one_executor(S0)
    batcher.offer(*(ticket() for _ in range(9)))
    (sent,) = batcher.decide()
    batcher.policy.grant("e2", S0, batcher.now)
    batcher.hear("e1", state="gone")
    batcher.decide()
    assert batcher.dropped() == []
    batcher.hear("e2", S0, S1)
    again, rest = batcher.decide()
    assert (again.tickets, rest.rows) == (sent.tickets, 1)


def test_work_does_not_wait_for_that_heartbeat_for_ever():
    """The executor may have died in between."""
    batcher = one_executor()
    batcher.hear("e1", total=1)
    batcher.offer(ticket())
    batcher.policy.grant("e2", S0, batcher.now)
    batcher.hear("e1", state="gone")
    batcher.decide()
    assert batcher.policy.wake_us(batcher.now) == LEASE_US
    batcher.decide(LEASE_US)
    assert [fault for _, fault in batcher.dropped()] == ["UNAVAILABLE"]


def test_work_that_nobody_has_heard_of_asks_at_once():
    """The last question was answered with a slot, which is used up: to wait for the next one's time is to idle."""
    batcher = Batcher()
    batcher.hear("e1", total=1)
    batcher.offer(ticket())
    batcher.decide()
    batcher.policy.grant("e1", S0, batcher.now)
    (sent,) = batcher.decide()
    batcher.answer(sent)
    batcher.now += DEMAND_EVERY_US // 10
    batcher.offer(ticket(rows=2))
    batcher.decide()
    assert [plea.demand.rows for plea in batcher.pleas] == [2]


def test_a_slot_for_work_that_has_gone_elsewhere_is_let_go():
    """Its executor believes that it is wanted here, and others wait for it."""
    batcher = two_executors()
    batcher.offer(*(ticket(rows=8) for _ in range(3)))
    first, second = batcher.decide()
    assert first.demand.rows, "it is told that work waits"
    batcher.answer(second, grant=Slot(0, 1))
    (third,) = batcher.decide()
    assert third.executor == second.executor
    batcher.answer(first, grant=Slot(0, 1))
    batcher.decide()
    assert [(plea.executor, plea.demand.rows) for plea in batcher.pleas] == [(first.executor, 0)]
    batcher.decide()
    assert batcher.pleas == [], "once"


def test_a_second_try_asks_for_a_slot_too():
    """Nothing waits in the queue, so nobody would ask, and the batch expires beside idle slots of others."""
    batcher = one_executor(S0)
    batcher.offer(ticket(rows=3))
    batcher.decide()
    batcher.hear("e2")
    batcher.hear("e1", state="gone")
    batcher.decide()
    assert [(plea.executor, plea.demand.rows) for plea in batcher.pleas] == [("e2", 3)]


def test_a_batch_tells_what_waits_behind_it():
    """The executor would give the slot away, and a question would have to follow each batch."""
    batcher = one_executor(S0)
    batcher.offer(*(ticket(rows=4) for _ in range(3)))
    (sent,) = batcher.decide()
    assert (sent.rows, sent.demand.rows) == (8, 4)


def test_who_has_all_slots_does_not_ask():
    """There is nothing left to give; under load every turn would send messages for nothing."""
    batcher = one_executor(S0, S1)
    batcher.offer(*(ticket(rows=8) for _ in range(3)))
    batcher.decide()
    assert batcher.pleas == []


def test_a_model_on_its_way_out_computes_what_waits_and_takes_no_more():
    """An unload under load would lose the queue, or never end."""
    batcher = one_executor(S0)
    batcher.offer(*(ticket(rows=8) for _ in range(2)))
    (first,) = batcher.decide()
    batcher.hear("e1", busy=(S0,), models=(), retiring=(MODEL,))
    assert batcher.refuses(ticket()).fault is Fault.UNAVAILABLE
    assert batcher.policy.finishing() == [MODEL]
    batcher.answer(first, grant=S1)
    (second,) = batcher.decide()
    assert not batcher.drops
    assert batcher.policy.finishing() == [MODEL]
    batcher.answer(second)
    assert batcher.policy.finishing() == []


def test_a_model_that_another_executor_offers_is_not_on_its_way_out():
    """Each executor would wait for the other one before it frees the memory."""
    batcher = one_executor(S0)
    batcher.offer(ticket())
    batcher.hear("e1", models=(), retiring=(MODEL,))
    batcher.hear("e2")
    batcher.offer(ticket())
    assert batcher.policy.finishing() == []


def test_new_weights_of_one_version_have_a_queue_of_their_own():
    """What was checked against the old ones must not reach the new ones."""
    new = MODEL._replace(digest="new")
    batcher = one_executor()
    batcher.hear("e1", models=(new,), retiring=(MODEL,))
    batcher.offer(ticket(model=new))
    assert batcher.refuses(ticket(model=MODEL)).fault is Fault.UNAVAILABLE
    batcher.hear("e1", S0, models=(new,), retiring=(MODEL,))
    (sent,) = batcher.decide()
    assert sent.model == new
