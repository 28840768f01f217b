"""What keeps a port from being opened: files of its TLS or tokens that cannot be used, an address open to strangers."""

import ipaddress
from collections.abc import Iterable, Iterator
from pathlib import Path

from narsil_stream.core import tokens
from narsil_stream.core.config.access import AccessConfig
from narsil_stream.core.config.rules import Broken, unreadable
from narsil_stream.core.config.schema import Config

CHECKS = ("http", "grpc")
"""Doors that check who calls."""


def open_doors(config: Config, doors: Iterable[str]) -> Iterator[Broken]:
    """What keeps `doors` (sections with a host: http, grpc, metrics, nats) from being opened as `config` says."""
    doors = tuple(doors)
    if set(doors) & set(CHECKS):
        yield from _access_files(config.access)
    beyond = [door for door in doors if not loopback(getattr(config, door).host)]
    if config.insecure:
        return
    checked = bool(config.access.tokens_file or config.access.tls_client_ca)
    if (keys := tuple(f"{door}.host" for door in beyond if door in CHECKS)) and not checked:
        yield (
            "beyond this machine whoever reaches the gateway may call it: set access.tokens_file (`narsil token` makes "
            "tokens) or access.tls_client_ca; or give --insecure where something else decides who gets there",
            keys,
        )
    if "metrics" in beyond:
        yield (
            "beyond this machine whoever reaches the metrics may read them, no token is asked for; give --insecure "
            "where something else decides who gets there",
            ("metrics.host",),
        )
    if "nats" in beyond and not config.nats.url and not (config.nats.user or config.nats.token):
        yield (
            "beyond this machine whoever reaches our own broker may do everything: set nats.user and nats.password, or "
            "use `narsil broker --init`; or give --insecure where something else decides who gets there",
            ("nats.host",),
        )


def loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there. A name other than localhost counts as beyond."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _access_files(access: AccessConfig) -> Iterator[Broken]:
    names = ("tls_cert", "tls_key", "tls_client_ca", "tokens_file")
    given = {f"access.{name}": path for name in names if (path := getattr(access, name))}
    reasons = {key: reason for key, path in given.items() if (reason := unreadable(path))}
    for key, reason in reasons.items():
        yield f"this file cannot be read ({reason})", (key,)
    if access.tls_cert and access.tls_key and not reasons:
        yield from _certificates(access)
    if access.tokens_file and "access.tokens_file" not in reasons:
        yield from _tokens(access.tokens_file)


def _certificates(access: AccessConfig) -> Iterator[Broken]:
    import ssl  # only who uses it pays for it

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(access.tls_cert, access.tls_key, password="")
    except (ssl.SSLError, ValueError) as error:
        keys = ("access.tls_cert", "access.tls_key")
        yield f"these are no certificate in PEM with its private key, without a passphrase ({error})", keys
    if access.tls_client_ca:
        try:
            context.load_verify_locations(access.tls_client_ca)
        except ssl.SSLError as error:
            yield f"this holds no certificate in PEM ({error})", ("access.tls_client_ca",)


def _tokens(path: str) -> Iterator[Broken]:
    try:
        if not tokens.parse(Path(path).read_bytes()):
            yield "this file holds no token, so nobody could call (`narsil token` makes one)", ("access.tokens_file",)
    except ValueError as error:
        yield f"this is no file of tokens ({error})", ("access.tokens_file",)
