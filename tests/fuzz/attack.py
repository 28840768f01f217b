"""One input against one target."""

import tracemalloc
from typing import Any

from narsil_stream.schemas.errors import DETAIL_CHARS, Fault, Refused
from tests.fuzz.targets import Target

PER_BYTE = 40


def attack(target: Target, given: Any) -> bool:
    """Whether it was read. Fails on what no caller expects: another exception, too much memory, an unfit message."""
    tracemalloc.start()
    try:
        target.read(given)
    except target.refusals as refusal:
        if isinstance(refusal, Refused):
            assert refusal.fault in (Fault.INVALID_ARGUMENT, Fault.TOO_LARGE)
            assert refusal.detail.isprintable() and len(refusal.detail) <= DETAIL_CHARS + len("...")
        return False
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        size = sum(map(len, given)) if isinstance(given, tuple) else len(given)
        assert peak <= PER_BYTE * size + target.memory, f"{peak} bytes of memory for {size} that came"
    return True
