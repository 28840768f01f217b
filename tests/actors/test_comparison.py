"""Our policy against those that others use, in small; docs/scheduling.md has the large one."""

from narsil_stream.actors.simulation.comparison import FIXED, FLEET, TRITON, Effort, Job, compare, measure, size
from narsil_stream.actors.simulation.load import Arrival, Device, Stretch, arrivals, play
from narsil_stream.actors.simulation.rivals import FixedTimeout, Preferred

SMALL = Effort(requests=1_500, least_us=1_500_000, loads=(1.0, 2.0), rivals=(*FIXED[30:], *TRITON[:15]))
PATIENT_US = 1_000_000


def ask(number: int, at_us: int = 0, rows: int = 10, budget_us: int = PATIENT_US) -> Arrival:
    return Arrival(number, at_us, rows, budget_us)


def test_at_full_load_and_in_overload_ours_answers_at_least_as_much_in_time():
    """If a time-out and a size did better, all of this would be for nothing."""
    seen: list[int] = []
    found = compare(SMALL, lambda done, _: seen.append(done), jobs=1)
    assert seen[-1] == size(SMALL)
    goodput = {(p.policy, p.load): p.goodput for p in found.points if p.device == "straight"}
    for load in SMALL.loads:
        for ours in ("ours", "adaptive"):
            assert goodput[ours, load] >= max(goodput["fixed", load], goodput["triton", load])
    for point in found.points:
        if point.policy == "ours" and point.device == "straight":
            assert point.missed <= 0.003, "of what was admitted"


def test_no_collapse_at_five_times_the_capacity():
    """Refusing has to stay cheap and right when nearly everybody is refused."""
    runs = [measure(Job("ours", (), load, "straight", 1, 0, 1_500_000, 3)) for load in (1.5, 5.0)]
    assert runs[1].goodput >= 0.95 * runs[0].goodput
    assert all(run.missed <= 0.003 for run in runs)


def test_consolidation_saves_executor_time_at_medium_load_and_misses_nothing():
    """That is what it is for; where it saves nothing it must cost nothing."""
    for load, saved in ((0.2, 0.3), (1.0, -0.02)):
        all_of_them, few = (
            measure(Job(policy, (), load, "straight", FLEET, 2_500, 0, 3)) for policy in ("ours", "consolidated")
        )
        assert few.executors_busy <= (1 - saved) * all_of_them.executors_busy
        assert few.goodput >= 0.99 * all_of_them.goodput
        assert few.missed <= 0.003


def test_the_same_seed_gives_the_same_figures():
    """Who repeats the command has to find what the page says."""
    job = Job("adaptive", (), 0.9, "straight", 1, 500, 0, 5)
    assert measure(job) == measure(job)


# The rivals are what they are said to be


def test_a_fixed_time_out_waits_for_it_or_for_a_full_batch():
    """A caricature of it would be easy to beat."""
    rival = FixedTimeout(30, 1_000, 3)
    assert rival.offer(ask(0)) and rival.offer(ask(1))
    assert rival.cut(999) == ([], [], 1_000)
    batch, _, _ = rival.cut(1_000)
    assert [one.number for one in batch] == [0, 1]
    assert all(rival.offer(ask(number, 2_000)) for number in (2, 3, 4))
    assert not rival.offer(ask(5, 2_000)), "its queue is full"
    assert len(rival.cut(2_000)[0]) == 3, "a full batch does not wait"


def test_preferred_sizes_leave_at_once_and_others_after_the_delay():
    """As Triton's documentation says: the largest preferred size, else what waits once the delay is over."""
    rival = Preferred((20, 40), 1_000, 100)
    for number in range(3):
        rival.offer(ask(number))
    assert [one.number for one in rival.cut(0)[0]] == [0, 1]
    assert rival.cut(0) == ([], [], 1_000)
    rival.offer(ask(3, 500))
    assert [one.number for one in rival.cut(500)[0]] == [2, 3]
    rival.offer(ask(4, 600, rows=7))
    assert rival.cut(1_000) == ([], [], 1_600)
    assert [one.number for one in rival.cut(1_600)[0]] == [4]


def test_without_a_delay_triton_sends_what_waits():
    """Its default: never wait when an instance is free."""
    rival = Preferred((), 0, 100)
    rival.offer(ask(0, rows=7))
    assert [one.number for one in rival.cut(0)[0]] == [0]


def test_rivals_reject_what_has_timed_out_when_they_form_a_batch():
    """With `allow_timeout_override` and REJECT, a budget is a time-out; without it they would compute for nobody."""
    for rival in (FixedTimeout(100, 0, 10), Preferred((), 0, 10)):
        rival.offer(ask(0, budget_us=500))
        rival.offer(ask(1))
        batch, expired, _ = rival.cut(500)
        assert ([one.number for one in batch], [one.number for one in expired]) == ([1], [0])


def test_every_request_of_a_run_ends_once():
    """Goodput is counted from the ends."""
    came = arrivals(2, [Stretch(1.5, 300_000)], Device(), 2)
    for rival in (FixedTimeout(1_024, 1_000, 64), Preferred((512,), 1_000, 64)):
        score = play(rival, came, Device(), 2)
        assert score.timely + score.missed + score.refused == len(came)
