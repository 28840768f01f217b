"""Ray Serve: an HTTP proxy in front of replicas that batch."""

import os
import signal
import sys
import threading
from types import FrameType

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig
from starlette.requests import Request
from starlette.responses import Response

from narsil_stream.bench.peer_servers.engine import Engine, Order, order

QUEUE = 4096


def app(given: Order) -> serve.Application:
    settings = given.settings

    @serve.deployment(num_replicas=settings.workers, max_ongoing_requests=QUEUE, ray_actor_options={"num_cpus": 0.1})
    class Scorer:
        def __init__(self) -> None:
            self._engine = Engine(given)

        @serve.batch(max_batch_size=settings.batch, batch_wait_timeout_s=settings.wait_ms / 1e3)  # type: ignore[untyped-decorator]
        async def score(self, bodies: list[bytes]) -> list[bytes]:
            return self._engine.score(bodies)

        async def __call__(self, request: Request) -> Response:
            return Response(await self.score(await request.body()), media_type="application/octet-stream")

    bound: serve.Application = Scorer.bind()  # type: ignore[attr-defined]
    return bound


def main() -> None:
    given = order()
    ray.init(include_dashboard=False, log_to_driver=False, num_cpus=os.cpu_count())
    quiet = LoggingConfig(enable_access_log=False)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=given.port), logging_config=quiet)
    serve.run(app(given), route_prefix="/", logging_config=quiet)
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    signal.signal(signal.SIGTERM, end)
    ended.wait()
    serve.shutdown()
    ray.shutdown()
    sys.exit(0)


if __name__ == "__main__":
    main()
