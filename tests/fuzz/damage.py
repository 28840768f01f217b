"""Bytes as nobody should send them: random ones, and valid ones with something wrong somewhere."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec
from hypothesis import strategies as st

DEEP = 20_000
PIECES = (
    b"", b"\0", b"\xff", b"\xff\xff\xff\xff", b"\xed\xa0\x80", b"\xc1", b"-", b"-1", b"1e999", b"NaN", b"null", b"true",
    b"{}", b"[]", b'"', b"\\ud800", b"9" * 400, b"18446744073709551616", b"[" * DEEP, b'{"a":' * DEEP, b"\x91" * DEEP,
    b"\x81\xa1a" * DEEP, b"\x80" * 11, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff", b"\xcf" + b"\xff" * 8, b"\xd3\x80" + b"\0" * 7, b"\xca\x7f\x80\0\0",
    b"\x0a\xff\xff\xff\xff\x0f", b"\x0b" * DEEP,
)  # fmt: skip
"""What decoders have stumbled over: depths, lengths and numbers beyond all bounds, broken text, endless groups."""


@st.composite
def damaged(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """A seed in which up to four places are cut out, doubled, or replaced."""
    whole = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 4))):
        start, stop = sorted((draw(st.integers(0, len(whole))), draw(st.integers(0, len(whole)))))
        stop = min(stop, start + draw(st.sampled_from((0, 1, 4, 64, len(whole)))))
        piece = draw(st.sampled_from(PIECES) | st.binary(max_size=12) | st.just(whole[start:stop] * 2))
        whole = whole[:start] + piece + whole[stop:]
    return whole


def hostile(*seeds: bytes) -> st.SearchStrategy[bytes]:
    return damaged(seeds) | st.binary(max_size=200) | st.sampled_from(seeds).flatmap(_head)


def _head(seed: bytes) -> st.SearchStrategy[bytes]:
    """Random bytes after a good start."""
    return st.tuples(st.integers(0, len(seed)), st.binary(max_size=60)).map(lambda cut: seed[: cut[0]] + cut[1])


SCALARS: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12) | st.sampled_from((0, 1, -1, 2**31, 2**53, 2**62, "FP32", "INT64", "BYTES", "scores"))
)  # fmt: skip


def trees(*names: str) -> st.SearchStrategy[Any]:
    """Values of JSON and msgpack whose objects have members of these names."""
    keys = st.sampled_from(names) | st.text(max_size=4)
    return st.recursive(
        SCALARS, lambda part: st.lists(part, max_size=5) | st.dictionaries(keys, part, max_size=6), max_leaves=20
    )


def depths(*names: str) -> st.SearchStrategy[bytes]:
    """JSON that goes down without end, inside of members that somebody knows and others."""
    downs = st.sampled_from((b"[" * DEEP, b'{"a":' * DEEP, b"[" * DEEP + b"]" * DEEP))
    return st.tuples(st.lists(st.sampled_from((*names, "a")), min_size=1, max_size=4), downs).map(
        lambda way: b"".join([*(b'{"%s":' % name.encode() for name in way[0]), way[1], b"}" * len(way[0])])
    )


def in_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def in_msgpack(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)
