"""How others batch, for comparison: first come, first served, with bounds that somebody has to choose.

Both are given what they need to do well: a queue that is bounded, the caller's budget as the time-out of a request, no
way to the device, and no batch before the device is free.
"""

from collections import deque

from narsil_stream.actors.simulation.load import MAX_ROWS, Arrival


class _Fifo:
    def __init__(self) -> None:
        self._queue: deque[Arrival] = deque()

    def _drop_expired(self, now_us: int) -> list[Arrival]:
        """Anywhere in the queue: time-outs differ."""
        expired = [arrival for arrival in self._queue if arrival.deadline_us <= now_us]
        if expired:
            self._queue = deque(arrival for arrival in self._queue if arrival.deadline_us > now_us)
        return expired

    def _take(self, rows: int) -> list[Arrival]:
        """From the front, up to so many rows; one at least."""
        batch, queue = [self._queue.popleft()], self._queue
        rows -= batch[0].rows
        while queue and queue[0].rows <= rows:
            rows -= queue[0].rows
            batch.append(queue.popleft())
        return batch


class FixedTimeout(_Fifo):
    """A batch leaves when it is full or when its oldest request has waited so long (TorchRec, mosec). The queue is
    bounded in requests; batches are counted in rows, which is more than mosec does."""

    def __init__(self, max_rows: int, timeout_us: int, queue_size: int) -> None:
        super().__init__()
        self._max_rows, self._timeout_us, self._queue_size = max_rows, timeout_us, queue_size
        self._rows = 0

    def offer(self, arrival: Arrival) -> bool:
        if len(self._queue) >= self._queue_size:
            return False
        self._queue.append(arrival)
        self._rows += arrival.rows
        return True

    def cut(self, now_us: int) -> tuple[list[Arrival], list[Arrival], int | None]:
        expired = self._drop_expired(now_us)
        self._rows -= sum(arrival.rows for arrival in expired)
        if not self._queue:
            return [], expired, None
        due_us = self._queue[0].at_us + self._timeout_us
        if self._rows < self._max_rows and now_us < due_us:
            return [], expired, due_us
        batch = self._take(self._max_rows)
        self._rows -= sum(arrival.rows for arrival in batch)
        return batch, expired, None


class Preferred(_Fifo):
    """Triton's dynamic batcher: preferred sizes, a largest delay, REJECT of what has timed out, looked for when a batch
    is formed. A batch of a preferred size leaves at once, the largest first; else what waits leaves when the oldest
    request has waited for the delay, or when no more fits. Delay 0: at once."""

    def __init__(self, preferred: tuple[int, ...], delay_us: int, queue_size: int) -> None:
        super().__init__()
        self._preferred = frozenset(preferred or (MAX_ROWS,))
        self._largest = max(self._preferred)
        self._delay_us, self._queue_size = delay_us, queue_size

    def offer(self, arrival: Arrival) -> bool:
        if len(self._queue) >= self._queue_size:
            return False
        self._queue.append(arrival)
        return True

    def cut(self, now_us: int) -> tuple[list[Arrival], list[Arrival], int | None]:
        expired = self._drop_expired(now_us)
        if not self._queue:
            return [], expired, None
        rows, best, full = self._examine()
        waited_us = now_us - self._queue[0].at_us
        exceeded = bool(self._delay_us) and waited_us >= self._delay_us
        if best and not exceeded:
            return self._take(best), expired, None
        if full or rows >= self._largest or exceeded or not self._delay_us:
            return self._take(rows), expired, None
        return [], expired, self._queue[0].at_us + self._delay_us

    def _examine(self) -> tuple[int, int, bool]:
        """Rows from the front that fit into one batch, the best preferred size among the sums on the way, and whether
        the next one would not fit. Beyond the largest preferred size what was there before counts as one."""
        rows = best = 0
        for arrival in self._queue:
            if rows and rows + arrival.rows > self._largest and not best:
                best = rows
            if rows and rows + arrival.rows > MAX_ROWS:
                return rows, best, True
            rows += arrival.rows
            if rows in self._preferred:
                best = rows
        return rows, best, False
