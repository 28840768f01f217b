"""Machine code on disk, so that a model is not compiled again at every start.

A file is the code and, behind it, its SHA-256: one that was cut short or changed counts as missing. It takes its name
when it is complete, so several processes may write the same one. Nothing here fails: without a folder that can be
written, code is compiled anew, with one warning.
"""

import functools
import hashlib
import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

_DIGEST_BYTES = 32


def cached(name: str, make: Callable[[], bytes]) -> bytes:
    """What `make` makes, from the file `name` of the folder if it is there. Raises what `make` raises."""
    try:
        path = folder() / name
        if (kept := _read(path)) is not None:
            return kept
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        _warn(str(error))
        return make()
    made = make()
    try:
        _write(path, made)
    except OSError as error:
        _warn(str(error))
    return made


def folder() -> Path:
    """$NARSIL_KERNEL_CACHE, or narsil-stream/kernels in the user's cache folder."""
    if chosen := os.environ.get("NARSIL_KERNEL_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "narsil-stream" / "kernels"


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    code, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if hashlib.sha256(code).digest() == digest:
        return code
    log.warning("%s is damaged: compiled anew", path)
    return None


def _write(path: Path, code: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{secrets.token_hex(4)}.tmp")
    try:
        fresh.write_bytes(code + hashlib.sha256(code).digest())
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


@functools.cache
def _warn(problem: str) -> None:
    """Once for each problem."""
    log.warning(
        "compiled kernels are not kept (%s): every start compiles them. Next: point NARSIL_KERNEL_CACHE to a folder "
        "that this user can write",
        problem,
    )
