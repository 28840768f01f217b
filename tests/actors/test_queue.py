"""The waiting room: who comes first, what fits into a batch, and accounts that agree with the content."""

import random

from narsil_stream.actors.queue import Queue, State
from narsil_stream.actors.tenants import BEYOND, MOST, Tenants
from tests.actors.puppets import ticket


def filled(*tickets):
    queue = Queue()
    for one in tickets:
        queue.push(one)
    return queue


def test_the_earliest_deadline_comes_first():
    """Requests with time to spare would push others past theirs."""
    late, early = ticket(deadline_us=900), ticket(deadline_us=100)
    assert filled(late, early).cut(10, 1_000) == [early, late]


def test_equal_deadlines_leave_in_the_order_of_arrival():
    """Under equal budgets nobody may be overtaken forever."""
    tickets = [ticket(deadline_us=500) for _ in range(5)]
    assert filled(*tickets).cut(10, 1_000) == tickets


def test_a_more_urgent_priority_goes_before_any_deadline():
    """Priority would be a hint instead of a promise."""
    urgent, soon = ticket(priority=1, deadline_us=900), ticket(priority=2, deadline_us=100)
    queue = filled(soon, urgent)
    assert queue.head() is urgent
    assert queue.cut(1, 1_000) == [urgent]
    assert queue.head() is soon


def test_a_batch_ends_before_the_ticket_that_exceeds_its_rows():
    """A batch above max_rows does not fit the executor's buffers."""
    a, b, c = (ticket(rows=3, deadline_us=at) for at in (1, 2, 3))
    queue = filled(a, b, c)
    assert queue.cut(6, 1_000) == [a, b]
    assert queue.cut(6, 1_000) == [c]


def test_a_batch_ends_before_the_ticket_that_exceeds_its_bytes():
    """The broker cuts the whole connection of who sends too large a message."""
    a, b = ticket(size=600), ticket(size=600)
    assert filled(a, b).cut(10, 1_000) == [a]


def test_a_batch_does_not_pass_over_the_ticket_that_does_not_fit():
    """Small requests that slip past a large one would starve it."""
    a, large, small = ticket(rows=2, deadline_us=1), ticket(rows=8, deadline_us=2), ticket(rows=1, deadline_us=3)
    queue = filled(a, large, small)
    assert queue.cut(8, 1_000) == [a]
    assert queue.cut(8, 1_000) == [large]


def test_a_batch_goes_on_with_the_next_priority():
    """Otherwise every priority costs a forward pass of its own."""
    first, second = ticket(priority=1), ticket(priority=2)
    assert filled(second, first).cut(10, 1_000) == [first, second]


def test_without_coalescing_a_batch_is_one_request():
    """Mode `worker`."""
    tickets = [ticket(), ticket()]
    queue = filled(*tickets)
    assert [queue.cut(10, 1_000, coalesce=False) for _ in range(3)] == [tickets[:1], tickets[1:], []]


def test_what_is_cut_is_in_flight():
    """A cancel of it must not be taken out of the waiting rows a second time."""
    (one,) = filled(ticket()).cut(10, 1_000)
    assert one.state is State.IN_FLIGHT


def test_expired_tickets_leave_from_every_priority():
    """A busy urgent class would hide that others have long run out of time."""
    a, b, c = ticket(priority=1, deadline_us=10), ticket(priority=2, deadline_us=5), ticket(priority=2, deadline_us=99)
    queue = filled(a, b, c)
    assert set(queue.expired(10)) == {a, b}
    assert (queue.count, queue.head()) == (1, c)


def test_cancelled_tickets_do_not_pile_up_behind_a_waiting_one():
    """Clients that vanish by the thousand would fill the memory that the byte bound seems to protect."""
    queue = filled(ticket(deadline_us=1))
    for _ in range(1_000):
        gone = ticket(deadline_us=2)
        queue.push(gone)
        queue.cancel(gone)
    (lane,) = queue.lines[128].lanes.values()
    assert len(lane.entries) < 100
    assert queue.count == 1


def test_work_ahead_are_those_of_more_urgent_priorities_and_earlier_deadlines():
    """The predicted wait decides on refusal: who comes later does not count."""
    step = 1 << 12
    queue = filled(
        ticket(rows=1, priority=1, deadline_us=9 * step),
        ticket(rows=2, priority=2, deadline_us=1 * step),
        ticket(rows=4, priority=2, deadline_us=5 * step),
        ticket(rows=8, priority=3, deadline_us=1 * step),
    )
    assert queue.work_ahead(ticket(priority=1, deadline_us=8 * step)) == 0
    assert queue.work_ahead(ticket(priority=2, deadline_us=3 * step)) == 1 + 2
    assert queue.work_ahead(ticket(priority=2, deadline_us=5 * step)) == 1 + 2 + 4


def test_the_accounts_agree_with_the_content_whatever_happens():
    """Rows that stay counted would fill the queue for good."""
    rng = random.Random(7)
    queue, inside = Queue(), []
    for now in range(3_000):
        match rng.randrange(6):
            case 0 | 1 | 2:
                one = ticket(rng.randint(1, 9), now + rng.randrange(50_000), rng.randint(1, 3), rng.randrange(99))
                queue.push(one)
                inside.append(one)
            case 3 if inside:
                queue.cancel(inside.pop(rng.randrange(len(inside))))
            case 4:
                for one in queue.cut(rng.randint(1, 40), 500):
                    inside.remove(one)
            case 5:
                for one in queue.expired(now * 20):
                    inside.remove(one)
        assert queue.count == len(inside)
        assert queue.rows == sum(one.rows for one in inside)
        assert queue.bytes == sum(one.bytes for one in inside)
        assert queue.head() is min(inside, key=lambda t: (t.priority, t.deadline_us, t.id), default=None)
        assert queue.earliest_deadline() == min((one.deadline_us for one in inside), default=None)
        assert queue.work_ahead(ticket(priority=9)) == queue.work
    assert sorted(queue.drain(), key=id) == sorted(inside, key=id)
    assert (queue.rows, queue.bytes, queue.count, queue.lines) == (0, 0, 0, {})


# Tenants


def test_tenants_take_turns_by_rows():
    """One that asks ten times as often would get ten times as much."""
    queue = filled(*(ticket(tenant="greedy", deadline_us=at) for at in range(90)))
    for at in range(10):
        queue.push(ticket(tenant="modest", deadline_us=1_000 + at))
    cut = queue.cut(20, 1_000)
    assert [sum(one.tenant == name for one in cut) for name in ("greedy", "modest")] == [10, 10]


def test_weights_say_how_much_a_tenant_gets():
    """Shares that are bought differ."""
    queue = Queue(Tenants({"gold": 3.0}))
    for at in range(80):
        queue.push(ticket(tenant="gold", deadline_us=500 + at))
        queue.push(ticket(tenant="plain", deadline_us=at))
    cut = queue.cut(40, 1_000)
    assert [sum(one.tenant == name for one in cut) for name in ("gold", "plain")] == [30, 10]


def test_a_tenant_alone_has_everything():
    """Shares are for when there is not enough."""
    assert len(filled(*(ticket(tenant="a") for _ in range(20))).cut(20, 1_000)) == 20


def test_nobody_saves_up_turns_while_away():
    """Who comes back would shut the others out for as long as it was gone."""
    queue = filled(*(ticket(tenant="a", deadline_us=at) for at in range(100)), ticket(tenant="b", deadline_us=0))
    queue.cut(60, 1_000)
    for at in range(50):
        queue.push(ticket(tenant="b", deadline_us=1_000 + at))
    cut = queue.cut(20, 1_000)
    assert [sum(one.tenant == name for one in cut) for name in "ab"] == [10, 10]


def test_a_large_request_counts_as_many_rows_as_it_has():
    """Turns by requests would let who sends large ones have nearly all."""
    queue = Queue()
    for at in range(50):
        queue.push(ticket(rows=8, tenant="large", deadline_us=at))
        queue.push(ticket(rows=1, tenant="small", deadline_us=at))
    served = {"large": 0, "small": 0}
    for _ in range(10):
        for one in queue.cut(9, 1_000):
            served[one.tenant] += one.rows
    assert abs(served["large"] - served["small"]) <= 8


def test_inside_a_tenant_the_earliest_deadline_goes_first():
    """Fairness between tenants is no reason to miss a deadline."""
    late, early, other = ticket(tenant="a", deadline_us=9), ticket(tenant="a", deadline_us=1), ticket(tenant="b")
    assert filled(late, other, early).cut(10, 1_000) == [early, other, late]


def test_the_rows_ahead_of_a_modest_tenant_are_few():
    """It would be refused for a backlog that is not before it."""
    queue = filled(*(ticket(rows=5, tenant="greedy", deadline_us=at) for at in range(100)))
    assert queue.work_ahead(ticket(rows=3, tenant="modest")) == 3
    assert queue.work_ahead(ticket(rows=3, tenant="greedy")) == 500


def test_the_tenants_that_are_told_apart_are_bounded():
    """Names come from outside: they must not fill the memory. Who has nothing waiting makes room."""
    tenants = Tenants({})
    for at in range(MOST):
        tenants.add(tenants.known_as(str(at)), 1, 1)
    assert tenants.known_as("one more") == BEYOND
    tenants.remove("7", 1, 1)
    assert tenants.known_as("one more") == "one more"
    assert len(tenants.waiting) <= MOST + 1


# Ageing


def test_work_has_aged_once_half_of_its_budget_is_gone():
    """Sooner would make classes meaningless, later would leave no time to serve it."""
    low = ticket(priority=5, arrived_us=1_000, deadline_us=3_000)
    queue = filled(ticket(priority=1), low)
    assert queue.aged(1, 1_999) is None
    assert queue.aged(1, 2_000) is low
    assert queue.aged(5, 2_000) is None, "it is not less urgent than itself"


def test_aged_work_goes_before_more_urgent_work():
    """That is what it is for."""
    urgent, low = ticket(priority=1), ticket(priority=5, deadline_us=10)
    queue = filled(urgent, low)
    assert queue.cut(1, 1_000, aged=iter([low])) == [low]
    assert queue.cut(1, 1_000) == [urgent]
