"""What a NATS server says, byte for byte. In place of nats-py's own parser, which any producer could use against us:

It splits lines at every white space character, the server at spaces and tabs alone. A subject with a vertical tab
therefore cuts the connection, or moves the message to another subscription, of the sender's choice. And a message that
nats-py cannot decode, e.g. one whose subject is not UTF-8, ends its reading without a word.
"""

import json
import logging
import re
from typing import Any

from nats.errors import ProtocolError

log = logging.getLogger(__name__)

MSG = re.compile(rb"MSG ([^ \r\n]+) (\d+) (?:([^ \r\n]+) )?(\d+)\r\n")
"""Subject, subscription, reply subject, bytes."""
HMSG = re.compile(rb"HMSG ([^ \r\n]+) (\d+) (?:([^ \r\n]+) )?(\d+) (\d+)\r\n")
"""The same with the bytes of the headers before those of headers and payload."""
LINE_BYTES = 1 << 20
"""Longest line taken: the server's INFO names all members of a cluster."""


class Parser:
    """Has the methods that nats-py's client calls, and calls those of the client that nats-py's parser does."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._buffer = bytearray()
        self.unreadable = 0
        """Messages that were dropped because nats-py could make nothing of them."""

    def reset(self) -> None:
        """Forget what came over a connection that is gone."""
        self._buffer = bytearray()

    async def parse(self, data: bytes = b"") -> None:
        """Hand over all that is complete, and keep the rest. Raises `ProtocolError`."""
        buffer = self._buffer
        buffer += data
        size, at = len(buffer), 0
        view = memoryview(buffer)
        try:
            while at < size:
                if found := MSG.match(buffer, at):
                    subject, sid, reply, total = found.groups()
                    payload_at = start = found.end()
                elif found := HMSG.match(buffer, at):
                    subject, sid, reply, headers, total = found.groups()
                    start = found.end()
                    payload_at = start + int(headers)
                elif (end := buffer.find(b"\r\n", at)) >= 0:
                    line, at = bytes(view[at:end]), end + 2
                    await self._control(line)
                    continue
                elif size - at > LINE_BYTES:
                    raise ProtocolError("nats: a line that does not end")
                else:
                    return
                stop = start + int(total)
                if size < stop + 2:
                    return
                at = stop + 2
                try:
                    await self._client._process_msg(
                        int(sid), subject, reply or b"", bytes(view[payload_at:stop]), bytes(view[start:payload_at])
                    )
                except Exception as error:
                    self.unreadable += 1
                    log.warning("dropped a message on subject %r: %s", subject[:100], error)
        finally:
            view.release()
            del buffer[:at]

    async def _control(self, line: bytes) -> None:
        match line.split(b" ", 1):
            case [b"PING", *_]:
                await self._client._process_ping()
            case [b"PONG", *_]:
                await self._client._process_pong()
            case [b"+OK", *_]:
                pass
            case [b"INFO", info]:
                await self._client._process_info(json.loads(info))
            case [b"-ERR", reason]:
                await self._client._process_err(reason.decode(errors="replace").lower())
            case _:
                raise ProtocolError(f"nats: unknown protocol: {line[:100]!r}")
