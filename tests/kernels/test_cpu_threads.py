"""The torch family on a CPU: one thread for a piece, several batches at once."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from narsil_stream.kernels import families, torch_family
from narsil_stream.kernels.artifact import read_spec, write
from narsil_stream.kernels.backend import Backend, IdOutOfRange
from narsil_stream.kernels.init import criteo_spec, random_batch, random_model
from narsil_stream.kernels.torch_family import unit

pytestmark = pytest.mark.skipif(not unit.is_here(), reason="no locked unit of torch, FBGEMM and TorchRec")

MODEL = criteo_spec(rows=50)
COUNTING = """
import os, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(2)
from narsil_stream.kernels import torch_family
from narsil_stream.kernels.init import random_batch
backend = torch_family.load(Path(sys.argv[1]), precision="fp32", device="cpu")
before = len(os.listdir("/proc/self/task"))
batch, scores = random_batch(backend.spec, 4000, 1), np.zeros(4000, np.float32)
backend.warm_up(1024)
backend.run(batch, scores)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write(tmp_path / "model", random_model(MODEL, seed=1))
    return tmp_path / "model"


@pytest.fixture
def two_threads() -> None:
    """Whatever this machine has."""
    import torch

    torch.set_num_threads(2)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads by /proc")
def test_a_thread_that_computes_a_piece_starts_no_others(artifact: Path) -> None:
    """Four threads on two cores: each waits for the other half of every product."""
    command = [sys.executable, "-c", COUNTING, str(artifact)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "0"


@pytest.mark.usefixtures("two_threads")
def test_there_are_two_lanes_where_there_are_two_threads(artifact: Path) -> None:
    """One batch is begun while another one ends; a setting may say otherwise."""
    assert _lanes(artifact, 0) == 2
    assert _lanes(artifact, 3) == 3


def test_a_single_thread_has_one_lane(artifact: Path) -> None:
    """Two batches at once would only share it."""
    import torch

    torch.set_num_threads(1)
    assert _lanes(artifact, 0) == _lanes(artifact, 3) == 1


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_a_batch_scores_the_same_bits_beside_others_of_any_size(artifact: Path, precision: str) -> None:
    """How it is cut depends on what else is under way; what it scores must not."""
    backend = torch_family.load(artifact, precision=precision, device="cpu")
    sizes = (1, 100, 127, 300, 1024, 1500, 3333)
    given = [random_batch(MODEL, rows, rows) for rows in sizes]

    def scores(which: int) -> bytes:
        found = np.empty(sizes[which], np.float32)
        backend.run(given[which], found)
        return found.tobytes()

    alone = [scores(which) for which in range(len(sizes))]
    with ThreadPoolExecutor(backend.info.lanes) as lanes:
        order = [(turn * 3) % len(sizes) for turn in range(60)]
        assert list(lanes.map(scores, order)) == [alone[which] for which in order]
    backend.unload()


@pytest.mark.usefixtures("two_threads")
def test_a_failed_batch_leaves_the_threads_to_the_next_one(artifact: Path) -> None:
    """What is under way decides how batches are cut: nothing may stay counted."""
    backend = torch_family.load(artifact, precision="fp32", device="cpu")
    bad = random_batch(MODEL, 300, 1)
    bad.ids[7] = 50
    for _ in range(3):
        with pytest.raises(IdOutOfRange):
            backend.run(bad, np.empty(300, np.float32))
    with backend._share() as threads:  # type: ignore[attr-defined]
        assert threads == 2
    backend.unload()


@pytest.mark.parametrize(
    ("rows", "threads", "piece"),
    [
        (1, 2, 16),
        (100, 2, 112),
        (128, 2, 64),
        (1600, 2, 800),
        (1600, 1, 800),
        (2133, 2, 544),  # three of 711 rows would leave a thread idle for one of them
        (4096, 2, 1024),
        (400, 16, 208),
        (4096, 16, 256),
        (1_000_000, 2, 1024),
    ],
)
def test_each_thread_gets_as_many_pieces_of_one_size(rows: int, threads: int, piece: int) -> None:
    """The slowest thread is when a batch ends."""
    from narsil_stream.kernels.torch_family.cpu import _piece_rows

    assert _piece_rows(rows, threads) == piece


def _lanes(artifact: Path, asked: int) -> int:
    backend: Backend = families.choose("torch", "fp32", read_spec(artifact), asked).load(artifact)
    try:
        return backend.info.lanes
    finally:
        backend.unload()
