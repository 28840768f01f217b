"""Buffers that come and go use the same memory again."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from narsil_stream.core.memory import keep_freed_memory
keep_freed_memory()
for at in range(200):
    if at == 100:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [bytes(1_000_000) for _ in range(4)]
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_large_buffers_do_not_fault_their_pages_in_again() -> None:
    """Each page of each batch would be a trap into the kernel: 10,000 of them here."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1_000
