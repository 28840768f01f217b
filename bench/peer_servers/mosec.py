"""mosec: its web server in Rust, workers behind a Unix socket."""

import sys

from mosec import Server, Worker

from narsil_stream.bench.peer_servers.engine import Engine, order


class Scorer(Worker):  # type: ignore[misc]
    """Decoding and encoding are part of `forward`, which sees whole batches; bytes pass through the rest untouched."""

    resp_mime_type = "application/octet-stream"

    def __init__(self) -> None:
        super().__init__()
        self._engine = Engine(order())

    def deserialize(self, data: bytes) -> bytes:
        return data

    def serialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: list[bytes] | bytes) -> list[bytes] | bytes:
        if isinstance(data, list):
            return self._engine.score(data)
        return self._engine.score([data])[0]


def main() -> None:
    given = order()
    sys.argv = ["mosec", "--address", "127.0.0.1", "--port", str(given.port), "--log-level", "warning"]
    server = Server()
    settings = given.settings
    server.append_worker(
        Scorer, num=settings.workers, max_batch_size=settings.batch, max_wait_time=settings.wait_ms, timeout=60
    )
    server.run()


if __name__ == "__main__":
    main()
