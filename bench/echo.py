"""Bare echoes: what a load generator and a protocol can do when the server does nothing.

`python -m narsil_stream.bench.echo http|granian|grpc|nats` gives one answer, read from stdin, to everything, and
decodes nothing.
"""

import asyncio
import sys
from typing import Any

import uvloop

from narsil_stream.bench.questions import GRPC_INFER
from narsil_stream.core.ports import free_port
from narsil_stream.schemas import subjects
from narsil_stream.schemas.protobuf import SERVICE


class HttpEcho(asyncio.Protocol):
    """Counts bytes: all requests on a connection are as long as its first."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._head = b""
        self._length = self._got = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if not self._length:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            at = self._head.lower().index(b"\r\ncontent-length:") + 17
            self._length = end + 4 + int(self._head[at:].split(b"\r\n", 1)[0])
            data, self._head = self._head, b""
        self._got += len(data)
        while self._got >= self._length:
            self._got -= self._length
            self._transport.write(self._answer)


async def http(answer: bytes, _: str) -> None:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: {len(answer)}\r\n\r\n"
    port = free_port("127.0.0.1", 0, "http.port")
    server = await asyncio.get_running_loop().create_server(
        lambda: HttpEcho(head.encode() + answer), "127.0.0.1", port, backlog=1024
    )
    print(f"echo on {port}", flush=True)
    await server.serve_forever()


async def granian(answer: bytes, _: str) -> None:
    """The server library of our HTTP gateway."""
    from granian.constants import Interfaces
    from granian.server.embed import Server

    async def infer(_: Any, proto: Any) -> None:
        await proto()
        proto.response_bytes(200, [("content-type", "application/json")], answer)

    port = free_port("127.0.0.1", 0, "http.port")
    server = Server(infer, port=port, interface=Interfaces.RSGI, websockets=False, backlog=1_024, log_enabled=False)
    print(f"echo on {port}", flush=True)
    await server.serve()


async def grpc(answer: bytes, _: str) -> None:
    import grpc as lib
    from grpc import aio

    async def infer(_: bytes, __: Any) -> bytes:
        return answer

    server = aio.server()
    handlers = {GRPC_INFER.rpartition("/")[2]: lib.unary_unary_rpc_method_handler(infer)}
    server.add_generic_rpc_handlers((lib.method_handlers_generic_handler(SERVICE.full_name, handlers),))
    print(f"echo on {server.add_insecure_port('127.0.0.1:0')}", flush=True)
    await server.start()
    await server.wait_for_termination()


async def nats(answer: bytes, url: str) -> None:
    """nats-py, as a service of its users would be written. `url`: of the broker."""
    import nats as lib

    connection = await lib.connect(url, allow_reconnect=False)

    async def on_message(message: Any) -> None:
        await connection.publish(message.reply, answer)

    limits = {"pending_msgs_limit": 0, "pending_bytes_limit": 0}
    await connection.subscribe(f"{subjects.INFER}.>", queue="echo", cb=on_message, **limits)
    await connection.flush()
    print(f"echo on {url.rpartition(':')[2]}", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    serve = {"http": http, "granian": granian, "grpc": grpc, "nats": nats}[sys.argv[1]]
    uvloop.run(serve(sys.stdin.buffer.read(), sys.argv[2] if len(sys.argv) > 2 else ""))


if __name__ == "__main__":
    main()
