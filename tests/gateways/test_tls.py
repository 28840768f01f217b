"""TLS as the doors speak it: small real servers of granian and grpc with the arguments that the settings make."""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest
from granian.constants import HTTPModes, Interfaces
from granian.rsgi import HTTPProtocol, Scope
from granian.server.embed import Server

from narsil_stream.core.config import AccessConfig
from narsil_stream.core.ports import reserve
from narsil_stream.gateways.tls import granian_tls, grpc_credentials
from tests.certificates import Files
from tests.support import PATIENCE_S

ECHO = "/test.Echo/Echo"


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@contextlib.asynccontextmanager
async def http_server(access: AccessConfig) -> AsyncIterator[int]:
    """Answers with the version of HTTP and the scheme; gives its port."""

    async def app(scope: Scope, proto: HTTPProtocol) -> None:
        proto.response_str(200, [], f"{scope.http_version} {scope.scheme}")

    with reserve("127.0.0.1", 0, "http.port") as port:
        server = Server(
            app, port=port, interface=Interfaces.RSGI, http=HTTPModes.auto, log_enabled=False, **granian_tls(access)
        )
        serving = asyncio.create_task(server.serve())
        async with asyncio.timeout(PATIENCE_S):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    break
                await asyncio.sleep(0.01)
    try:
        yield port
    finally:
        server.stop()
        await serving


@contextlib.asynccontextmanager
async def grpc_server(access: AccessConfig) -> AsyncIterator[int]:
    """Echoes bytes; gives its port."""

    async def echo(request: bytes, context: object) -> bytes:
        return request

    server = grpc.aio.server()
    handler = grpc.method_handlers_generic_handler("test.Echo", {"Echo": grpc.unary_unary_rpc_method_handler(echo)})
    server.add_generic_rpc_handlers((handler,))
    credentials = grpc_credentials(access)
    assert credentials is not None
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def http_get(port: int, context: ssl.SSLContext, http2: bool = False) -> str:
    async with httpx.AsyncClient(verify=context, http1=not http2, http2=http2, timeout=PATIENCE_S) as client:
        return (await client.get(f"https://127.0.0.1:{port}/")).text


async def grpc_echo(port: int, credentials: grpc.ChannelCredentials | None, timeout: float = PATIENCE_S) -> bytes:
    target = f"127.0.0.1:{port}"
    alone = [("grpc.use_local_subchannel_pool", 1)]  # else a second channel shares the first one's connection
    opened = (
        grpc.aio.secure_channel(target, credentials, alone)
        if credentials is not None
        else grpc.aio.insecure_channel(target, alone)
    )
    async with opened as channel:
        return bytes(await channel.unary_unary(ECHO)(b"hello", timeout=timeout))


@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("http2", [False, True])
def test_http_in_tls_in_both_versions(mutual: bool, http2: bool, files: Files):
    """ALPN chooses: clients of one version must not be broken by the other."""

    async def scene() -> str:
        async with http_server(files.settings(mutual)) as port:
            return await http_get(port, files.context("client" if mutual else ""), http2)

    assert asyncio.run(scene()) == ("2 https" if http2 else "1.1 https")


@pytest.mark.parametrize("client", ["", "stranger"])
@pytest.mark.parametrize("http2", [False, True])
def test_http_turns_away_who_shows_no_certificate_of_ours(client: str, http2: bool, files: Files):
    """That is all that mutual TLS is for; the next good caller is served."""

    async def scene() -> None:
        async with http_server(files.settings(mutual=True)) as port:
            with pytest.raises((httpx.TransportError, ssl.SSLError)):
                await http_get(port, files.context(client), http2)
            assert await http_get(port, files.context("client"))

    asyncio.run(scene())


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1")
def test_http_speaks_tls_1_2_and_nothing_older(files: Files):
    """Many clients have no 1.3 yet; what is older is broken."""

    async def scene(version: ssl.TLSVersion) -> str:
        context = files.context()
        context.set_ciphers("DEFAULT@SECLEVEL=0")
        context.minimum_version = context.maximum_version = version
        async with http_server(files.settings(mutual=False)) as port:
            return await http_get(port, context)

    assert asyncio.run(scene(ssl.TLSVersion.TLSv1_2)) == "1.1 https"
    with pytest.raises(httpx.ConnectError, match="ALERT"):
        asyncio.run(scene(ssl.TLSVersion.TLSv1_1))


def test_plain_http_gets_no_answer_on_a_port_with_tls(files: Files):
    """A token that is sent there is not read by anybody."""

    async def scene() -> None:
        async with http_server(files.settings(mutual=False)) as port, httpx.AsyncClient() as client:
            await client.get(f"http://127.0.0.1:{port}/")

    with pytest.raises(httpx.TransportError):
        asyncio.run(scene())


@pytest.mark.parametrize("mutual", [False, True])
def test_grpc_in_tls(mutual: bool, files: Files):
    """The same files serve both doors."""

    async def scene() -> bytes:
        async with grpc_server(files.settings(mutual)) as port:
            return await grpc_echo(port, files.channel("client" if mutual else ""))

    assert asyncio.run(scene()) == b"hello"


@pytest.mark.parametrize("client", ["", "stranger", "plain"])
def test_grpc_turns_away_who_shows_no_certificate_of_ours(client: str, files: Files):
    """That is all that mutual TLS is for; the next good caller is served."""

    async def scene() -> None:
        async with grpc_server(files.settings(mutual=True)) as port:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await grpc_echo(port, None if client == "plain" else files.channel(client))
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            assert await grpc_echo(port, files.channel("client")) == b"hello"

    asyncio.run(scene())


def test_grpc_shows_a_renewed_certificate_to_new_connections(files: Files):
    """Certificates of short life are renewed every day; a restart for each is a burden."""

    async def scene() -> None:
        async with grpc_server(files.settings(mutual=False)) as port:
            assert await grpc_echo(port, files.channel()) == b"hello"
            files.renew(files.other)
            assert await grpc_echo(port, files.channel(authority=files.other)) == b"hello"

    asyncio.run(scene())


def test_grpc_keeps_its_certificate_while_the_new_one_is_half_written(files: Files, caplog: pytest.LogCaptureFixture):
    """Key and certificate are two files: there is always a moment when they do not fit."""

    async def scene() -> None:
        async with grpc_server(files.settings(mutual=True)) as port:
            key = (files.folder / "key.pem").read_bytes()
            for broken in (b"", files.other.issue_cert("127.0.0.1").private_key_pem.bytes()):
                (files.folder / "key.pem").write_bytes(broken)
                assert await grpc_echo(port, files.channel("client")) == b"hello"
            (files.folder / "key.pem").write_bytes(key)
            assert await grpc_echo(port, files.channel("client")) == b"hello"

    asyncio.run(scene())
    errors = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert errors and all("those of before stay" in message for message in errors)


def test_without_a_certificate_there_is_no_tls():
    """The default is a door on this machine alone."""
    assert granian_tls(AccessConfig()) == {}
    assert grpc_credentials(AccessConfig()) is None
