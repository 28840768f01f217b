"""Certificates for the doors, made for one test."""

import ssl
from pathlib import Path

import grpc
import trustme

from narsil_stream.core.config import AccessConfig


class Files:
    """Certificates in a folder: a server's, of an authority, with clients of that authority and of another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority, self.other = trustme.CA(), trustme.CA()
        self.authority.cert_pem.write_to_path(folder / "ca.pem")
        self.renew(self.authority)
        for name, authority in (("client", self.authority), ("stranger", self.other)):
            authority.issue_cert(f"{name}@example.org").private_key_and_cert_chain_pem.write_to_path(
                folder / f"{name}.pem"
            )

    def renew(self, authority: trustme.CA) -> None:
        """A new certificate of the server's."""
        server = authority.issue_cert("127.0.0.1", "localhost")
        server.private_key_pem.write_to_path(self.folder / "key.pem")
        (self.folder / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in server.cert_chain_pems))

    def settings(self, mutual: bool) -> AccessConfig:
        return AccessConfig(
            tls_cert=str(self.folder / "cert.pem"),
            tls_key=str(self.folder / "key.pem"),
            tls_client_ca=str(self.folder / "ca.pem") if mutual else "",
        )

    def context(self, client: str = "", authority: trustme.CA | None = None) -> ssl.SSLContext:
        """For a caller who knows `authority`."""
        context = ssl.create_default_context()
        (authority or self.authority).configure_trust(context)
        if client:
            context.load_cert_chain(self.folder / f"{client}.pem")
        return context

    def channel(self, client: str = "", authority: trustme.CA | None = None) -> grpc.ChannelCredentials:
        chain = (self.folder / f"{client}.pem").read_bytes() if client else None
        return grpc.ssl_channel_credentials((authority or self.authority).cert_pem.bytes(), chain, chain)
