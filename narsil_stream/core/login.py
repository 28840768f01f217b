"""What is shown to a NATS server so that it lets us in, and what it means when it does not."""

import ssl
from typing import Any

from narsil_stream.core.config import NatsConfig
from narsil_stream.core.config.rules import FILES, unreadable
from narsil_stream.schemas.errors import Fault, Refused


def options(config: NatsConfig) -> dict[str, Any]:
    """Login and TLS, for nats-py. Raises `Refused` INVALID_ARGUMENT for a file that cannot be used."""
    for key in FILES:
        path = getattr(config, key.removeprefix("nats."))
        if path and (reason := unreadable(path)):
            raise unusable(key, path, reason)
    given = {
        "user": config.user,
        "password": config.password,
        "token": config.token,
        "nkeys_seed": config.nkey_seed_file,
        "user_credentials": config.creds_file,
        "tls": _tls(config),
    }
    return {key: value for key, value in given.items() if value}


def unconnected(config: NatsConfig, where: str, error: Exception, asks_for_certificate: bool) -> Refused:
    """Why there is no connection to the servers at `where`."""
    reason = str(error) or type(error).__name__
    if any(word in reason.lower() for word in ("authorization", "authentication")):
        return Refused(Fault.UNAUTHENTICATED, f"the NATS server at {where} refuses this login: {reason}")
    if asks_for_certificate and not config.tls_cert:
        detail = f"the NATS server at {where} wants to see a certificate (nats.tls_cert, nats.tls_key)"
        return Refused(Fault.UNAUTHENTICATED, f"{detail}: {reason}")
    if isinstance(error, ssl.SSLError):
        return Refused(Fault.UNAVAILABLE, f"no TLS with the NATS server at {where}: {reason}")
    return Refused(Fault.UNAVAILABLE, f"no NATS server at {where}: {reason}")


def unusable(key: str, path: str, reason: object) -> Refused:
    """A file of the login is missing, or holds something else."""
    return Refused(Fault.INVALID_ARGUMENT, f"{key} {path} cannot be used: {reason}")


def _tls(config: NatsConfig) -> ssl.SSLContext | None:
    if not (config.tls_ca or config.tls_cert):
        return None
    try:
        context = ssl.create_default_context(cafile=config.tls_ca or None)
    except ssl.SSLError as error:
        raise unusable("nats.tls_ca", config.tls_ca, error) from None
    if config.tls_cert:
        try:
            context.load_cert_chain(config.tls_cert, config.tls_key or None, password="")
        except (ssl.SSLError, ValueError) as error:
            files = f"{config.tls_cert} with nats.tls_key {config.tls_key}"
            raise unusable("nats.tls_cert", files, error) from None
    return context
