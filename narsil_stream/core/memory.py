"""How a process that is fed with messages holds its memory."""

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's `mallopt`."""
KEPT_BYTES = 64 << 20
LARGE_BYTES = 16 << 20
"""Above any message: what is larger comes from the operating system and goes back there at once."""


def keep_freed_memory() -> None:
    """Buffers of messages and batches come and go all the time: use the same memory again, up to 64 MiB of it.

    Otherwise glibc gives it back and asks for it anew, and the first touch of each page is a trap into the kernel.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library has no such setting
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
