"""The one road between actors: a NATS connection, and a direct hand-over where both ends live in one process.

Nothing here waits for a caller. `send` either takes a message or raises `Refused`; taken means queued in order on a
live connection, never delivered: only an answer says that.
"""

import asyncio
import base64
import contextlib
import json
import logging
import re
import secrets
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

import msgspec
import nats
from msgspec import Struct
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from narsil_stream.core import login
from narsil_stream.core.config import NatsConfig
from narsil_stream.core.config.settings import without_login
from narsil_stream.core.connection import Connection, Headers, Take
from narsil_stream.core.parser import Parser
from narsil_stream.core.ports import address
from narsil_stream.schemas import subjects
from narsil_stream.schemas.errors import Fault, Refused

log = logging.getLogger(__name__)

OUTBOX_BYTES = 64 << 20
"""Bytes that may wait for the socket; more is refused. Below the server's own limit for a slow connection."""
HEADER_ROOM = 512
"""Of max_payload: the server counts headers too, and cuts the connection of who exceeds it."""
GOODBYE_S = 1.0
"""What a broker that does not answer may take of an end."""
SUBJECT = re.compile(r"[^ \t\r\n]+")
"""What does not end a word of the protocol. The server checks the rest."""
LINE_ENDS = str.maketrans("\r\n", "  ")
PROTOCOL_ERRORS = (OSError, nats.errors.Error, asyncio.TimeoutError)
LOGIN_REFUSED = "authorization violation"
"""In the broker's words. It has others for a login that came late, which may be let in when it comes again."""

_encode = msgspec.msgpack.Encoder().encode


class Listening(NamedTuple):
    """Somebody of this process who listens to a subject."""

    owner: object
    subscription: Subscription
    local: Callable[[Any], None] | None


class Bus:
    """One per process. Handlers are plain functions: they take a message and return at once."""

    def __init__(self, config: NatsConfig, name: str) -> None:
        self._config = config
        self._name = name
        self._nats = Connection()
        self._parser = self._nats._ps = Parser(self._nats)
        self._local: dict[str, list[Callable[[Any], None]]] = {}
        self._subscriptions: dict[str, list[Listening]] = {}
        self._responders: dict[str, Callable[[], bytes]] = {}
        self._begun = False
        self._refusing: set[str] = set()
        """Servers that refused the login before there was a connection."""
        self._closing = False
        self.on_lost: list[Callable[[], None]] = []
        """Called when the connection breaks: what is under way over it may be lost."""
        self.on_back: list[Callable[[], None]] = []
        self.closed = asyncio.Event()
        """Set when the client gave up for good, e.g. for refused credentials."""
        self._dropped = 0
        self._inboxes = subjects.inbox()

    async def connect(self, timeout: float = 10.0) -> None:
        """Connect, trying for `timeout` seconds, or until each server has refused the login. Raises `Refused`, with the
        reason: UNAVAILABLE, UNAUTHENTICATED, or INVALID_ARGUMENT for a file of the login that cannot be used.
        """
        options = self._options()
        try:
            await asyncio.wait_for(self._nats.connect(**options), timeout)
        except PROTOCOL_ERRORS as error:
            self._nats.cut()
            asks_for_certificate = bool(self._nats._server_info.get("tls_verify"))
            reason = self._nats.last_error or error
            raise login.unconnected(self._config, self.where, reason, asks_for_certificate) from None
        except Exception as error:  # nats-py lets through whatever the reading of a seed raises
            if not (seed := self._config.nkey_seed_file or self._config.creds_file):
                raise
            key = "nats.nkey_seed_file" if self._config.nkey_seed_file else "nats.creds_file"
            raise login.unusable(key, seed, error) from None
        self._inboxes = subjects.inbox(self._user())
        self._nats._inbox_prefix = bytearray(self._inboxes.encode())
        self._begun = True

    @property
    def where(self) -> str:
        """The broker's address for messages, without a login that may be in it."""
        return without_login(self._address)

    @property
    def _address(self) -> str:
        return self._config.url or f"nats://{address(self._config.host, self._config.port)}"

    @property
    def _servers(self) -> list[str]:
        return [url.strip() for url in self._address.split(",")]

    def new_inbox(self, kind: str = "") -> str:
        """A subject for answers that nobody can guess, and that a broker can keep for this login. Once connected.

        `kind` becomes a part of its name, by which a broker can tell who may answer.
        """
        return ".".join(filter(None, (self._inboxes, kind, secrets.token_hex(8))))

    @property
    def connected(self) -> bool:
        return bool(self._nats.is_connected) and not self._closing

    @property
    def max_payload(self) -> int:
        """Bytes that one message may hold, headers not counted."""
        return int(self._nats.max_payload) - HEADER_ROOM

    @property
    def dropped(self) -> int:
        """Messages that were unreadable, came faster than they were taken, or could not be sent any more."""
        return self._dropped + self._parser.unreadable + self._nats.unreadable + self._nats.unsent

    @property
    def waiting_bytes(self) -> int:
        """Of messages that the socket has not taken yet."""
        return self._nats.waiting_bytes

    def is_local(self, subject: str) -> bool:
        return subject in self._local

    def send(self, subject: str, message: Struct) -> None:
        """To the one who listens on `subject`: by reference in this process, else encoded."""
        handlers = self._local.get(subject)
        if handlers is None:
            self.publish(subject, _encode(message))
            return
        for handler in handlers:
            handler(message)

    def broadcast(self, subject: str, message: Struct) -> None:
        """To all who listen, here and elsewhere. Raises nothing: what cannot be sent now is left to the next one."""
        for handler in self._local.get(subject, ()):
            handler(message)
        if self.connected:
            self._spread(subject, _encode(message))

    def signal(self, subject: str) -> None:
        """An empty message to all who listen elsewhere. Raises nothing, and is nothing without a broker."""
        if self.connected:
            self._spread(subject, b"")

    def _spread(self, subject: str, payload: bytes) -> None:
        try:
            self.publish(subject, payload)
        except Refused as refused:
            self._dropped += 1
            log.warning("a message on %s was not sent: %s", subject, refused.detail)

    def publish(self, subject: str, payload: bytes, reply: str = "", headers: dict[str, str] | None = None) -> None:
        """Queue raw bytes. Raises `Refused`: UNAVAILABLE when disconnected, TOO_LARGE, OVERLOADED."""
        if not self.connected:
            raise Refused(Fault.UNAVAILABLE, "the broker is not connected", 1_000_000)
        if len(payload) > self.max_payload:
            raise Refused(
                Fault.TOO_LARGE, f"a message of {len(payload)} bytes; the broker takes at most {self.max_payload}"
            )
        if self._nats.waiting_bytes + len(payload) > OUTBOX_BYTES:
            raise Refused(Fault.OVERLOADED, "the connection to the broker is saturated", 100_000)
        if not SUBJECT.fullmatch(subject) or (reply and not SUBJECT.fullmatch(reply)):
            self._dropped += 1
            log.warning("a message to %r was not sent: no subject can be called so", subject[:100])
        elif headers is None:
            self._nats.send(f"PUB {subject} {reply} {len(payload)}\r\n".encode(), payload)
        else:
            said = _headers(headers)
            head = f"HPUB {subject} {reply} {len(said)} {len(said) + len(payload)}\r\n"
            self._nats.send(head.encode() + said, payload)

    async def listen(
        self,
        subject: str,
        handler: Callable[[Any], None],
        decode: Callable[[bytes], Any],
        owner: object = None,
    ) -> None:
        """Decoded messages of a subject that is spoken between actors. Undecodable ones are dropped and counted.

        Several actors of one process may listen to one subject; `owner` tells them apart for `unsubscribe`.
        """

        def take(_: bytes, __: bytes, payload: bytes, ___: Headers) -> None:
            try:
                decoded = decode(payload)
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                self._dropped += 1
                log.warning("dropped an undecodable message on %s: %s", subject, error)
                return
            handler(decoded)

        # Rebound, never changed: `send` may be going through the list.
        self._local[subject] = [*self._local.get(subject, ()), handler]
        await self._subscribe(subject, take, "", owner, handler)

    async def subscribe(
        self, subject: str, handler: Callable[[Msg], None], queue: str = "", owner: object = None
    ) -> None:
        """Raw messages of a subject, wildcards allowed."""

        def take(subject: bytes, reply: bytes, payload: bytes, headers: Headers) -> None:
            handler(Msg(self._nats, subject.decode(), reply.decode(), payload, headers))

        await self._subscribe(subject, take, queue, owner, None)

    async def respond(self, subject: str, answer: Callable[[], bytes], owner: object = None) -> None:
        """Answer each request on a subject; those of this process too, which the broker does not bring back."""

        def on_message(message: Msg) -> None:
            if message.reply:
                self.publish(message.reply, answer())

        self._responders[subject] = answer
        await self.subscribe(subject, on_message, owner=owner)

    async def _subscribe(
        self,
        subject: str,
        take: Take,
        queue: str,
        owner: object,
        local: Callable[[Any], None] | None,
    ) -> None:
        def guarded(said: bytes, reply: bytes, payload: bytes, headers: Headers) -> None:
            try:
                take(said, reply, payload, headers)
            except Refused as refused:
                log.info("a message on %s has no answer: %s", subject, refused.detail)
            except UnicodeDecodeError:
                raise
            except Exception:
                log.exception("a message on %s could not be handled", subject)

        async def on_message(message: Msg) -> None:
            """Of those that come past the short way: over a WebSocket."""
            guarded(message.subject.encode(), message.reply.encode(), message.data, message.headers)

        subscription = await self._nats.subscribe(
            subject, queue=queue, cb=on_message, pending_msgs_limit=65_536, pending_bytes_limit=256 << 20
        )
        self._nats.takers[b"%d" % subscription._id] = guarded
        self._subscriptions.setdefault(subject, []).append(Listening(owner, subscription, local))

    async def unsubscribe(self, subject: str, owner: object = None) -> None:
        """The owner stops taking; what the server has already sent is still handled before this returns."""
        self._responders.pop(subject, None)
        heard = self._subscriptions.pop(subject, [])
        if others := [one for one in heard if one.owner is not owner]:
            self._subscriptions[subject] = others
        if local := [one.local for one in others if one.local is not None]:
            self._local[subject] = local
        else:
            self._local.pop(subject, None)
        for one in heard:
            if one.owner is owner:
                await self._leave(subject, one.subscription)

    async def _leave(self, subject: str, subscription: Subscription) -> None:
        try:
            if self.connected:
                await _at_most(GOODBYE_S, subscription.drain())
        except PROTOCOL_ERRORS:
            log.info("left %s without a goodbye: the broker does not answer", subject)
        finally:  # or it would be subscribed to again with the next connection
            self._nats.takers.pop(b"%d" % subscription._id, None)
            self._nats._remove_sub(subscription._id)
            with contextlib.suppress(TimeoutError):
                await _at_most(GOODBYE_S, subscription._pending_queue.join())
            subscription._stop_processing()

    async def request(self, subject: str, payload: bytes = b"", timeout: float = 1.0) -> bytes:
        """One question, one answer. Raises `Refused(UNAVAILABLE)`."""
        if subject in self._responders:
            return self._responders[subject]()
        if not self.connected:
            raise Refused(Fault.UNAVAILABLE, "the broker is not connected", 1_000_000)
        try:
            return bytes((await self._nats.request(subject, payload, timeout=timeout)).data)
        except PROTOCOL_ERRORS:
            raise Refused(Fault.UNAVAILABLE, f"no answer on {subject}", 100_000) from None

    async def flush(self, timeout: float = 2.0) -> None:
        """Return when the server has taken all that was sent, or after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                if self.connected:
                    await self._nats.flush(max(1, round(timeout)))
        except PROTOCOL_ERRORS:
            log.info("the broker did not confirm the last messages")

    async def close(self) -> None:
        if not self._begun:
            return  # never connected
        self._closing = True
        self._nats.forget()
        try:
            if not self._nats.is_connected:
                self._nats.cut()  # nats-py would write what is pending to a socket that is closed
            else:
                await _at_most(GOODBYE_S, self._nats.flush(1))
        except PROTOCOL_ERRORS:
            log.info("closing at once: the broker does not answer")
            self._nats.cut()
        try:
            await _at_most(GOODBYE_S, self._nats.close())
        except PROTOCOL_ERRORS as error:
            log.info("the connection did not close cleanly: %r", error)
            self._nats.cut()

    def _options(self) -> dict[str, Any]:
        """For nats-py. Raises `Refused` INVALID_ARGUMENT."""
        options: dict[str, Any] = {
            "servers": self._servers,
            "name": self._name,
            "no_echo": True,
            "allow_reconnect": True,
            "max_reconnect_attempts": -1,
            "reconnect_time_wait": 0.2,
            "connect_timeout": 2,
            "ping_interval": 2,
            "max_outstanding_pings": 2,
            "pending_size": 8 << 20,
            "flush_timeout": 5.0,
            "error_cb": self._on_error,
            "disconnected_cb": self._on_disconnected,
            "reconnected_cb": self._on_reconnected,
            "closed_cb": self._on_closed,
            "lame_duck_mode_cb": self._on_lame_duck,
        }
        return options | login.options(self._config)

    def _user(self) -> str:
        """The public nkey that this login has shown, "" if it is none."""
        if not self._config.creds_file:
            return self._nats._public_nkey or ""
        claims = bytes(self._nats._user_jwt_cb()).split(b".")[1]
        return str(json.loads(base64.urlsafe_b64decode(claims + b"=="))["sub"])

    async def _on_error(self, error: Exception) -> None:
        if not self._begun and LOGIN_REFUSED in str(error).lower():
            self._refusing.add(self._nats._current_server.uri.netloc)
            if len(self._refusing) == len(set(self._servers)):
                self._nats.options["allow_reconnect"] = False  # or nats-py would try again until the time is over
        if isinstance(error, nats.errors.SlowConsumerError):
            self._dropped += 1
        elif "permissions violation" in str(error).lower():
            log.error("the broker does not allow this login what it needs: %s", error)
        else:
            log.info("NATS: %s", error or type(error).__name__)

    async def _on_disconnected(self) -> None:
        self._nats.forget()
        if self._closing:
            return
        log.warning("lost the broker at %s", self.where)
        for callback in self.on_lost:
            callback()

    async def _on_reconnected(self) -> None:
        log.info("back at the broker at %s", self.where)
        for callback in self.on_back:
            callback()

    async def _on_closed(self) -> None:
        if not self._closing:
            self.closed.set()

    async def _on_lame_duck(self) -> None:
        log.info("the broker is going away: moving to another server")
        await self._nats.force_reconnect()


def _headers(headers: dict[str, str]) -> bytes:
    """As the protocol spells them; a value stays on its line."""
    lines = "".join(f"{name}: {value.translate(LINE_ENDS).strip()}\r\n" for name, value in headers.items())
    return f"NATS/1.0\r\n{lines}\r\n".encode()


async def _at_most(seconds: float, work: Coroutine[Any, Any, None]) -> None:
    """As `asyncio.wait_for`, but it does not wait for the end of what does not let itself be cancelled."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # somebody has looked
    try:
        await asyncio.wait((task,), timeout=seconds)
        if not task.done():
            raise TimeoutError
        task.result()
    finally:
        task.cancel()
