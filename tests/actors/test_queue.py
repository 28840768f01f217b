"""The waiting room: who comes first, what fits into a batch, and accounts that agree with the content."""

import random

from narsil_stream.actors.queue import Queue, State
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
    (line,) = queue.lines.values()
    assert len(line.entries) < 100
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
    assert queue.work_ahead(1, 8 * step) == 0
    assert queue.work_ahead(2, 3 * step) == 1 + 2
    assert queue.work_ahead(2, 5 * step) == 1 + 2 + 4


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
        assert queue.work_ahead(9, 0) == queue.work
    assert sorted(queue.drain(), key=id) == sorted(inside, key=id)
    assert (queue.rows, queue.bytes, queue.count, queue.lines) == (0, 0, 0, {})
