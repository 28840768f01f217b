"""TLS for the doors: the settings as granian and grpc want them. Files were checked when the configuration was loaded.

Both speak TLS 1.2 and 1.3. With `access.tls_client_ca` a caller must show a certificate that one of these authorities
signed; without, none is asked for.
"""

import logging
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narsil_stream.core.config import AccessConfig

if TYPE_CHECKING:
    import grpc

log = logging.getLogger(__name__)


def granian_tls(access: AccessConfig) -> dict[str, Any]:
    """Keyword arguments for `granian.server.embed.Server`; none without a certificate. ALPN offers HTTP/2 and 1.1."""
    from granian.constants import SSLProtocols

    if not access.tls_cert:
        return {}
    return {
        "ssl_cert": Path(access.tls_cert),
        "ssl_key": Path(access.tls_key),
        "ssl_ca": Path(access.tls_client_ca) if access.tls_client_ca else None,
        "ssl_client_verify": bool(access.tls_client_ca),
        "ssl_protocol_min": SSLProtocols.tls12,
    }


def grpc_credentials(access: AccessConfig) -> "grpc.ServerCredentials | None":
    """For `add_secure_port`; None without a certificate. New connections see new files, as soon as they fit together.

    Raises OSError.
    """
    import grpc

    if not access.tls_cert:
        return None
    files = _Files(access)
    return grpc.dynamic_ssl_server_credentials(
        files.configuration(), files.changed, require_client_authentication=bool(access.tls_client_ca)
    )


class _Files:
    """The three files, read again for each new connection. grpc calls from threads of its own."""

    def __init__(self, access: AccessConfig) -> None:
        self._access = access
        self._paths = [Path(path) for path in (access.tls_key, access.tls_cert, access.tls_client_ca) if path]
        self._data = self._read()
        self._problem = ""

    def configuration(self) -> "grpc.ServerCertificateConfiguration":
        import grpc

        key, cert, *authorities = self._data
        return grpc.ssl_server_certificate_configuration([(key, cert)], *authorities)

    def changed(self) -> "grpc.ServerCertificateConfiguration | None":
        """None: as before, also while the new ones cannot be used."""
        try:
            data = self._read()
            if data == self._data:
                return None
            self._try()
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            if str(error) != self._problem:
                log.error("the new TLS files cannot be used, those of before stay: %s", error)
            self._problem = str(error)
            return None
        self._data, self._problem = data, ""
        log.info("%s is shown from now on", self._access.tls_cert)
        return self.configuration()

    def _read(self) -> list[bytes]:
        return [path.read_bytes() for path in self._paths]

    def _try(self) -> None:
        """Raises ssl.SSLError: grpc would take any bytes, and then fail every handshake."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._access.tls_cert, self._access.tls_key, password="")
        if self._access.tls_client_ca:
            context.load_verify_locations(self._access.tls_client_ca)
