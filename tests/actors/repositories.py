"""Repositories of small models, and ways to ask for what they serve."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from narsil_stream.kernels.artifact import write
from narsil_stream.kernels.init import criteo_spec, random_model
from narsil_stream.schemas import codec
from narsil_stream.schemas.errors import Refused
from narsil_stream.schemas.wire import InferAnswer, InferRequest
from tests.asking import Rows
from tests.door import Door
from tests.support import System

Start = Callable[..., System]


def make(folder: Path, name: str, version: str = "1", seed: int = 1, rows: int = 50) -> Path:
    """A small artifact, in the place of one that may be there."""
    spec = replace(criteo_spec(name, rows=rows, dim=4, bottom=(8,), top=(8,)), version=version)
    write(folder, random_model(spec, seed), overwrite=True)
    return folder


def request(rows: Rows, budget_us: int = 20_000_000) -> InferRequest:
    return InferRequest("", (codec.tensor("dense", rows.dense), codec.tensor("sparse", rows.ids)), budget_us)


def scored(answer: InferAnswer, rows: Rows) -> bool:
    """Whether these are the rows' scores; False for a fault."""
    return not answer.fault and bool(np.allclose(codec.array(answer.outputs[0]), rows.scores, rtol=0, atol=1e-6))


def refusal(verb: Callable[..., None], *args: str, **parameters: Any) -> Refused:
    with pytest.raises(Refused) as refused:
        verb(*args, **parameters)
    return refused.value


def ask(door: Door, model: str, rows: Rows, version: str = "") -> InferAnswer:
    return door.ask(model, request(rows), version).result(20)
