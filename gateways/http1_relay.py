"""HTTP/2 without TLS: its bytes are carried to the server that speaks it, and back."""

import asyncio
import contextlib
import logging
from typing import Any

from narsil_stream.gateways.http1_exchange import AHEAD_BYTES, IDLE_S

log = logging.getLogger(__name__)


async def relay(transport: Any, begun: bytes, path: str) -> None:
    """Carry a caller's connection, of which `begun` has come, to a Unix socket and back, until one end closes.

    Also until one end takes nothing for `IDLE_S`. Nothing of either is left then. `transport` is paused when given.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            if not transport.is_closing():  # the caller may have left meanwhile
                writer.write(begun)
                await _carry(transport, reader, writer)
        finally:
            writer.close()
    except OSError as error:
        log.warning("HTTP/2 is not served: %s", error)
    finally:
        transport.abort()


async def _carry(transport: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    outside = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(outside)
    protocol.connection_made(transport)
    transport.set_protocol(protocol)
    back = asyncio.StreamWriter(transport, protocol, outside, asyncio.get_running_loop())
    transport.resume_reading()
    pumps = [asyncio.create_task(_pump(*ends)) for ends in ((outside, writer), (reader, back))]
    try:
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
    back.close()
    with contextlib.suppress(OSError):  # what is written still leaves, if it is taken
        async with asyncio.timeout(IDLE_S):
            await back.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(AHEAD_BYTES):
            writer.write(data)
            async with asyncio.timeout(IDLE_S):
                await writer.drain()
