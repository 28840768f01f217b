"""Synthetic click rows in Criteo's format, with the probability that each label was drawn from.

So the best AUC and log loss that any model can reach on them are known. For demos, tests and measurements.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from narsil_stream.core.criteo import DENSE, SPARSE

_WORLD_SEED = 20_240_101
_LATENT = 4
_BIAS = -1.8


class Clicks(Struct, frozen=True):
    """A piece of a synthetic data set."""

    text: bytes
    """Rows of 40 fields (39 without labels), each ended by LF."""
    labels: NDArray[np.float32]
    """[B] of 0 and 1"""
    probability: NDArray[np.float64]
    """[B] of a click; what a perfect model would answer."""


class _Field(NamedTuple):
    """A category: its words from the most to the least frequent, and what each does to a click."""

    words: NDArray[np.str_]
    cumulative: NDArray[np.float64]
    effect: NDArray[np.float64]
    latent: NDArray[np.float64]
    missing: float


class _World(NamedTuple):
    fields: tuple[_Field, ...]
    count_mean: NDArray[np.float64]
    count_effect: NDArray[np.float64]
    count_missing: NDArray[np.float64]


def clicks(rows: int, seed: int, labelled: bool = True, piece_rows: int = 10_000) -> Iterator[Clicks]:
    """`rows` rows in pieces. Every seed draws other rows from the same truth: train on one seed, test on another.

    About a quarter are clicks; a click depends on the logarithms of the counts, on each category, and on how the first
    two categories go together. About one field in seven is missing.
    """
    rng = np.random.default_rng(seed)
    for start in range(0, rows, piece_rows):
        yield _piece(rng, min(piece_rows, rows - start), labelled)


def _piece(rng: np.random.Generator, rows: int, labelled: bool) -> Clicks:
    world = _world()
    columns: list[list[str]] = []
    logit = np.full(rows, _BIAS)
    for i in range(len(DENSE)):
        counts = np.exp(rng.normal(world.count_mean[i], 1.0, rows)).astype(np.int64) - (i == 1)
        known = rng.random(rows) >= world.count_missing[i]
        logit += known * world.count_effect[i] * (np.log(np.maximum(counts, 0) + 1) - world.count_mean[i])
        columns.append(_cells(counts.astype(np.str_), known))
    meeting = np.ones((rows, _LATENT))
    for i, field in enumerate(world.fields):
        value = np.searchsorted(field.cumulative, rng.random(rows), side="right")
        known = rng.random(rows) >= field.missing
        logit += known * field.effect[value]
        if i < 2:
            meeting *= known[:, None] * field.latent[value]
        columns.append(_cells(field.words[value], known))
    probability = 1 / (1 + np.exp(-logit - meeting.sum(axis=1)))
    labels = rng.random(rows) < probability
    if labelled:
        columns.insert(0, _cells(labels.astype(np.int8).astype(np.str_), np.ones(rows, np.bool_)))
    text = "".join("\t".join(cells) + "\n" for cells in zip(*columns, strict=True))
    return Clicks(text.encode(), labels.astype(np.float32), probability)


def _cells(words: NDArray[np.str_], known: NDArray[np.bool_]) -> list[str]:
    cells: list[str] = np.where(known, words, "").tolist()
    return cells


@functools.cache
def _world() -> _World:
    """The truth: always the same, whatever the seed of the rows."""
    rng = np.random.default_rng(_WORLD_SEED)
    sizes = np.geomspace(3, 1000, len(SPARSE)).astype(int)
    rng.shuffle(sizes)
    return _World(
        fields=tuple(_field(rng, int(size)) for size in sizes),
        count_mean=rng.uniform(0.5, 4, len(DENSE)),
        count_effect=rng.normal(0, 0.15, len(DENSE)),
        count_missing=rng.choice([0.0, 0.1, 0.3], len(DENSE)),
    )


def _field(rng: np.random.Generator, size: int) -> _Field:
    weight = 1 / np.arange(1, size + 1) ** 1.1
    hashes = rng.choice(2**32, size, replace=False)
    return _Field(
        words=np.array([f"{value:08x}" for value in hashes.tolist()]),
        cumulative=np.cumsum(weight)[:-1] / weight.sum(),
        effect=rng.normal(0, 0.25, size),
        latent=rng.normal(0, 0.6, (size, _LATENT)),
        missing=float(rng.choice([0.0, 0.05, 0.3])),
    )
