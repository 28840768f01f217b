"""The torch family on a CPU: one thread for a piece."""

import subprocess
import sys
from pathlib import Path

import pytest

from narsil_stream.kernels.artifact import write
from narsil_stream.kernels.init import criteo_spec, random_model
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


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads by /proc")
def test_a_thread_that_computes_a_piece_starts_no_others(artifact: Path) -> None:
    """Four threads on two cores: each waits for the other half of every product."""
    command = [sys.executable, "-c", COUNTING, str(artifact)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "0"


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
