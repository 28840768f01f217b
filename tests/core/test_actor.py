"""A mailbox and the loop that empties it."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest

from narsil_stream.core.actor import Actor, Mailbox, now_us
from tests.support import PATIENCE_S


class Diary(Actor[int]):
    """Writes down what happens to it, and fails at 13. What it receives above 100 it sends to itself again."""

    kind = "diary"

    def __init__(self) -> None:
        super().__init__(8)
        self.received: list[int] = []
        self.turns: list[int] = []
        """How much was received before each."""
        self.wake_us: int | None = None

    def receive(self, message: int) -> None:
        if message == 13:
            raise ZeroDivisionError
        self.received.append(message)
        if message > 100:
            self.mailbox.put_urgent(message + 1)

    def turn(self) -> int | None:
        self.turns.append(len(self.received))
        when, self.wake_us = self.wake_us, None
        return when


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 nothing tells of it
            await asyncio.sleep(0)


def play(scene: Callable[[Diary], Awaitable[None]]) -> None:
    """With an actor that runs, until the scene is over."""

    async def played() -> None:
        diary = Diary()
        running = asyncio.create_task(diary.run())
        try:
            await scene(diary)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(played())


def test_all_that_waits_is_received_in_order_before_one_turn() -> None:
    """A decision for each message would be one for each row of a batch."""

    async def scene(diary: Diary) -> None:
        await until(lambda: diary.turns == [0])
        for number in range(5):
            diary.mailbox.put(number)
        await until(lambda: len(diary.turns) == 2)
        assert diary.received == [0, 1, 2, 3, 4]
        assert diary.turns == [0, 5]
        assert diary.mailbox.peak == 5

    play(scene)


def test_a_message_that_fails_leaves_the_later_ones_in_the_mailbox() -> None:
    """Their askers are answered at the stop, or they would wait for nothing."""

    async def scene() -> None:
        diary = Diary()
        for number in (1, 13, 2, 3):
            diary.mailbox.put(number)
        with pytest.raises(ZeroDivisionError):
            await diary.run()
        assert diary.received == [1]
        assert list(diary.mailbox.leftovers()) == [2, 3]
        assert list(diary.mailbox.leftovers()) == []

    asyncio.run(scene())


def test_messages_without_end_do_not_keep_an_actor_from_its_turn() -> None:
    """Deadlines are met in turns."""

    async def scene(diary: Diary) -> None:
        diary.mailbox.put(101)
        await until(lambda: len(diary.turns) > 5)
        assert diary.turns[:6] == [0, 1, 2, 3, 4, 5]

    play(scene)


def test_a_turn_names_the_time_of_the_next() -> None:
    """A linger or a lease ends when no message comes."""

    async def scene(diary: Diary) -> None:
        await until(lambda: diary.turns)
        due = diary.wake_us = now_us() + 2_000
        diary.mailbox.put(1)
        await until(lambda: len(diary.turns) == 3)
        assert now_us() >= due - 1_000  # the loop's clock ticks in ms

    play(scene)


def test_a_full_mailbox_refuses_work_and_takes_what_the_protocol_bounds() -> None:
    """Who is refused can be told at once; a lost result would cost a forward pass."""

    async def scene() -> None:
        mailbox: Mailbox[int] = Mailbox(2)
        assert [mailbox.put(number) for number in range(3)] == [True, True, False]
        mailbox.put_urgent(9)
        assert await mailbox.filled() == len(mailbox) == 3
        assert [mailbox.pop() for _ in range(3)] == [0, 1, 9]
        assert mailbox.put(4)

    asyncio.run(scene())


def test_an_actor_that_ended_leaves_no_timer() -> None:
    """A timer would keep it, and the models it holds, in memory."""

    async def scene() -> None:
        diary = Diary()
        diary.wake_us = now_us() + 3_600_000_000
        running = asyncio.create_task(diary.run())
        await until(lambda: diary.mailbox._timer is not None)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        assert diary.mailbox._timer is None

    asyncio.run(scene())
