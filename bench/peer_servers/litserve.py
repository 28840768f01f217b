"""LitServe: FastAPI in front, a queue to worker processes. The body is taken as it is, without its JSON."""

from typing import Annotated, Any

from fastapi import Body, Response
from litserve import LitAPI, LitServer

from narsil_stream.bench.peer_servers.engine import Engine, order


class Scorer(LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        self._engine = Engine(order())

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/msgpack")]) -> bytes:
        return request

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return inputs

    def predict(self, x: list[bytes] | bytes) -> Any:
        if isinstance(x, list):
            return self._engine.score(x)
        return self._engine.score([x])[0]

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="application/octet-stream")


def main() -> None:
    given = order()
    settings = given.settings
    server = LitServer(
        Scorer(max_batch_size=settings.batch, batch_timeout=settings.wait_ms / 1e3),
        accelerator="cpu",
        workers_per_device=settings.workers,
        timeout=60,
    )
    server.run(host="127.0.0.1", port=given.port, num_api_servers=1, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
