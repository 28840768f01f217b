"""Bearer tokens: what is kept of them, and the file that says which are let in.

    # a line for each token: its digest, its scopes, and for people whose it is
    sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae infer,admin # ci

A token is 32 random bytes, so its plain SHA-256 gives nothing away: there is no dictionary to try.
"""

import hashlib
import re
import secrets
from typing import Literal, get_args

from msgspec import Struct

Scope = Literal["infer", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "narsil_"
"""Begins every token, so that scanners for leaked secrets can know one."""
LINE = re.compile(r"sha256:([0-9a-f]{64})\s+([a-z]+(?:,[a-z]+)*)\s*(?:#\s*(.*))?")
EXPECTED = f"sha256:<64 hex digits> <scopes of {', '.join(SCOPES)}, joined by commas> # <whose it is>"


class Known(Struct, frozen=True):
    """A token that is let in."""

    scopes: frozenset[Scope]
    who: str = ""


def make() -> str:
    """A new token."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()


def line(token: str, scopes: frozenset[Scope], who: str = "") -> str:
    """What the file says of a token. Raises ValueError if `who` cannot stand in a line."""
    if not who.isprintable():
        raise ValueError(f"{who!r}: expected a name that can be printed in one line")
    ordered = ",".join(scope for scope in SCOPES if scope in scopes)
    return f"sha256:{digest(token).hex()} {ordered}" + (f" # {who}" if who else "")


def parse(data: bytes) -> dict[bytes, Known]:
    """The tokens of a file by their digest. Raises ValueError with the line's number, and nothing of what it says."""
    known: dict[bytes, Known] = {}
    for number, text in enumerate(data.decode().splitlines(), 1):
        text = text.strip()
        if not text or text.startswith("#"):
            continue
        found = LINE.fullmatch(text)
        scopes = frozenset(scope for scope in SCOPES if found and scope in found[2].split(","))
        if found is None or len(scopes) != len(found[2].split(",")):
            raise ValueError(f"line {number}: expected {EXPECTED}")
        key = bytes.fromhex(found[1])
        if key in known:
            raise ValueError(f"line {number}: this token has a line already")
        known[key] = Known(scopes, found[3] or "")
    return known
