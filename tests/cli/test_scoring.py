"""The part of `narsil score` without a broker: the window, the order of the output, what an error does to it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import numpy as np
import pytest

from narsil_stream.cli.asking import NEXT
from narsil_stream.cli.rows import Inputs, Part
from narsil_stream.cli.scoring import TOLD, Scores, Scoring, Stopped, text
from narsil_stream.cli.window import Window
from narsil_stream.core.criteo import BadRow
from narsil_stream.schemas.errors import Fault, Refused


class Puppet:
    """A system that answers when it is told to. A row's score is its first dense value."""

    def __init__(self) -> None:
        self.asked: list[tuple[Inputs, asyncio.Future[Scores]]] = []
        self.most_open = 0

    async def ask(self, inputs: Inputs) -> Scores:
        future: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
        self.asked.append((inputs, future))
        self.most_open = max(self.most_open, self.open)
        return await future

    @property
    def open(self) -> int:
        return sum(not future.done() for _, future in self.asked)

    def answer(self, number: int) -> None:
        inputs, future = self.asked[number]
        future.set_result(inputs.dense[:, 0])

    def refuse(self, number: int, fault: Fault) -> None:
        self.asked[number][1].set_exception(Refused(fault, "as told"))

    def answer_all_open(self) -> None:
        for number in reversed(range(len(self.asked))):
            if not self.asked[number][1].done():
                self.answer(number)


class Run:
    """A scoring with a puppet behind it, and what it wrote."""

    def __init__(self, window: int = 4, rows_per_request: int = 1, skip: bool = False) -> None:
        self.puppet = Puppet()
        self.written = b""
        self.told: list[str] = []
        self.scoring = Scoring(
            self.puppet.ask,
            self._write,
            window=window,
            rows_per_request=rows_per_request,
            skip=skip,
            tell=self.told.append,
        )

    async def _write(self, data: bytes) -> None:
        self.written += data

    async def over(self, *parts: Part) -> None:
        await self.scoring.run(_each(parts))


async def _each(parts: tuple[Part, ...]) -> AsyncIterator[Part]:
    for part in parts:
        yield part


def lines(first: int, *values: float | None) -> Part:
    """Consecutive lines: a row with that dense value, or None for a bad one."""
    places = [place for place, value in enumerate(values) if value is not None]
    dense = np.array([[value] for value in values if value is not None], np.float32).reshape(-1, 1)
    bad = [BadRow(first + i, "I1", "'x'", "an integer") for i, value in enumerate(values) if value is None]
    return Part(first, len(values), np.array(places, np.int64), Inputs(dense, np.zeros((len(dense), 1), int)), bad)


async def turns() -> None:
    """Let all tasks run until they wait for something."""
    for _ in range(20):
        await asyncio.sleep(0)


def play(scene: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scene())


def test_never_more_requests_are_in_flight_than_the_window_holds():
    """Otherwise a big file would flood the system, and this process's memory."""

    async def scene() -> None:
        run = Run(window=3)
        task = asyncio.create_task(run.over(lines(1, *map(float, range(50)))))
        await turns()
        assert run.puppet.open == 3
        run.puppet.answer(1)
        run.puppet.answer(2)
        await turns()
        assert len(run.puppet.asked) == 3, "answers that wait behind a slow one count as well"
        while not task.done():
            run.puppet.answer_all_open()
            await turns()
        await task
        assert run.puppet.most_open == 3

    play(scene)


def test_scores_keep_the_order_of_the_rows_whatever_the_order_of_the_answers():
    """Line i of OUT is all that ties a score to its row."""

    async def scene() -> None:
        run = Run(window=4)
        task = asyncio.create_task(run.over(lines(1, 1, 2), lines(3, 3, 4)))
        await turns()
        for number in (3, 1, 2):
            run.puppet.answer(number)
            await turns()
            assert run.written == b""
        run.puppet.answer(0)
        await task
        assert run.written == b"1\n2\n3\n4\n"
        assert (run.scoring.tally.lines, run.scoring.tally.rows) == (4, 4)

    play(scene)


def test_a_complete_answer_is_written_while_the_input_is_silent():
    """A pipe that waits for its answers before it sends more would wait for ever."""

    async def scene() -> None:
        run = Run()
        silent = asyncio.Event()

        async def parts() -> AsyncIterator[Part]:
            yield lines(1, 7)
            await silent.wait()

        task = asyncio.create_task(run.scoring.run(parts()))
        await turns()
        run.puppet.answer(0)
        await turns()
        assert run.written == b"7\n"
        silent.set()
        await task

    play(scene)


def test_a_bad_row_stops_the_run_after_all_rows_before_it():
    """The output says exactly how far it is whole, whatever was still in flight."""

    async def scene() -> None:
        run = Run(window=8)
        task = asyncio.create_task(run.over(lines(1, 1, 2), lines(3, 3, None, 5)))
        await turns()
        run.puppet.answer_all_open()
        with pytest.raises(Stopped, match="line 4, I1: found 'x', expected an integer"):
            await task
        assert run.written == b"1\n2\n3\n"
        assert len(run.puppet.asked) == 3

    play(scene)


def test_skipped_rows_leave_empty_lines_and_are_counted():
    """Without them line i of OUT would belong to another row of IN."""

    async def scene() -> None:
        run = Run(skip=True, rows_per_request=2)
        task = asyncio.create_task(run.over(lines(1, None, 2, 3, None), lines(5, None, 6)))
        await turns()
        run.puppet.answer_all_open()
        await task
        assert run.written == b"\n2\n3\n\n\n6\n"
        assert (run.scoring.tally.lines, run.scoring.tally.rows, run.scoring.tally.skipped) == (6, 3, 3)
        assert run.told[0] == "skipped line 1, I1: found 'x', expected an integer"

    play(scene)


def test_only_the_first_skips_are_told_one_by_one():
    """A file in the wrong format would fill the terminal, or the disk that a log is on."""

    async def scene() -> None:
        run = Run(skip=True)
        await run.over(*(lines(line, None) for line in range(1, 100)))
        assert len(run.told) == TOLD + 1
        assert run.scoring.tally.skipped == 99

    play(scene)


@pytest.mark.parametrize("fault", Fault)
def test_an_error_that_would_hit_every_request_ends_the_run_even_when_skipping(fault: Fault):
    """A lost broker must not turn a whole file into empty lines; one late answer must not end a long run."""

    async def scene() -> None:
        run = Run(skip=True, rows_per_request=2)
        task = asyncio.create_task(run.over(lines(1, 1, 2, 3, 4)))
        await turns()
        run.puppet.refuse(0, fault)
        run.puppet.answer(1)
        if fault in {Fault.UNAVAILABLE, Fault.UNAUTHENTICATED, Fault.PERMISSION_DENIED, Fault.NOT_FOUND,
                     Fault.UNIMPLEMENTED}:  # fmt: skip
            with pytest.raises(Stopped, match=f"lines 1 to 2: {fault.name}: as told"):
                await task
            assert run.written == b""
        else:
            await task
            assert run.written == b"\n\n3\n4\n"
            assert run.told == [f"skipped lines 1 to 2: {fault.name}: as told"]

    play(scene)


def test_a_request_that_fails_stops_the_run_where_it_stands():
    """Answers behind it are not written: there would be a hole before them."""

    async def scene() -> None:
        run = Run()
        task = asyncio.create_task(run.over(lines(1, 1, 2, 3)))
        await turns()
        run.puppet.answer(2)
        run.puppet.refuse(1, Fault.INTERNAL)
        run.puppet.answer(0)
        with pytest.raises(Stopped, match="line 2: INTERNAL"):
            await task
        assert run.written == b"1\n"

    play(scene)


def test_a_cancelled_run_writes_what_is_complete_and_withdraws_the_rest():
    """Ctrl-C after an hour must not cost the hour, nor leave requests behind."""

    async def scene() -> None:
        run = Run(window=4)
        held = asyncio.Event()

        async def slow_write(data: bytes) -> None:
            await held.wait()
            run.written += data

        run.scoring._write = slow_write
        task = asyncio.create_task(run.over(lines(1, 1, 2, 3, 4)))
        await turns()
        run.puppet.answer(0)
        await turns()
        run.puppet.answer(1)
        task.cancel()
        await turns()
        held.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert run.written == b"1\n2\n"
        assert run.scoring.tally.lines == 2
        assert run.puppet.open == 0

    play(scene)


def test_an_input_that_breaks_is_told_after_what_came_before_it():
    """The reader's error must neither be lost nor overtake good rows."""

    async def scene() -> None:
        run = Run()

        async def parts() -> AsyncIterator[Part]:
            yield lines(1, 1)
            raise OSError("the disk is gone")

        task = asyncio.create_task(run.scoring.run(parts()))
        await turns()
        run.puppet.answer(0)
        with pytest.raises(OSError, match="the disk is gone"):
            await task
        assert run.written == b"1\n"

    play(scene)


def test_a_call_that_breaks_is_raised_in_its_turn():
    """A defect must end the run, not hang it."""

    async def scene() -> None:
        async def call(item: int) -> int:
            if item == 1:
                raise ZeroDivisionError
            return item

        window = Window(call, 4)
        for item in range(3):
            await window.put(item)
        await turns()
        assert await window.take() == [0]
        with pytest.raises(ZeroDivisionError):
            await window.take()
        assert await window.take() == [2]
        window.close()
        assert await window.take() == []

    play(scene)


def test_written_scores_are_the_same_fp32_when_read_again():
    """A digit fewer and two scores that differ look equal."""
    rng = np.random.default_rng(0)
    scores = rng.random(5000, np.float32) ** 8
    part = lines(1, *scores.tolist())
    assert np.array_equal(np.array(text(part, scores).split(), np.float32), scores)


def test_parts_split_without_losing_a_line():
    """Blank lines and bad rows between requests keep their place."""
    part = lines(11, None, 1, None, None, 2, 3, None)
    split = list(part.split(1))
    assert [(p.first, p.lines) for p in split] == [(11, 4), (15, 1), (16, 2)]
    assert [len(p.inputs) for p in split] == [1, 1, 1]
    assert [row.line for p in split for row in p.bad] == [11, 13, 14, 17]


def test_every_error_has_a_next_step():
    """An error that only names itself leaves people where they were."""
    assert set(NEXT) == set(Fault)
