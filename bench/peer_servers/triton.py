"""Triton by nvidia-pytriton: tritonserver's own HTTP server and dynamic batcher, Python behind a socket."""

import os
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from narsil_stream.bench.peer_servers.engine import Engine, order
from narsil_stream.bench.questions import MODEL
from narsil_stream.core.ports import free_port
from narsil_stream.kernels.artifact import read_spec

HOST = "127.0.0.1"


def main() -> None:
    given = order()
    # Triton's Python backend must load the library of this interpreter: another one's does not fit its modules.
    os.environ["LD_LIBRARY_PATH"] = sysconfig.get_config_var("LIBDIR")
    settings, spec = given.settings, read_spec(Path(given.model))
    engines = [_worker(Engine(given)) for _ in range(settings.workers)]
    config = TritonConfig(
        http_address=HOST,
        http_port=given.port,
        grpc_address=HOST,
        grpc_port=free_port(HOST, 0, "grpc"),
        allow_metrics=False,
        log_verbose=0,
    )
    batcher = DynamicBatcher(max_queue_delay_microseconds=settings.wait_ms * 1000)
    with Triton(config=config) as triton:
        triton.bind(
            model_name=MODEL,
            infer_func=engines,
            inputs=[
                Tensor(name="dense", dtype=np.float32, shape=(spec.n_dense,)),
                Tensor(name="sparse", dtype=np.int32, shape=(spec.n_sparse,)),
            ],
            outputs=[Tensor(name="scores", dtype=np.float32, shape=(1,))],
            config=ModelConfig(max_batch_size=settings.batch * given.rows, batcher=batcher),
        )
        triton.serve()


def _worker(engine: Engine) -> Any:
    @batch  # type: ignore[untyped-decorator]
    def infer(dense: Any, sparse: Any) -> dict[str, Any]:
        return {"scores": engine(dense, sparse)[:, None]}

    return infer


if __name__ == "__main__":
    main()
