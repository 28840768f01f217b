"""The settings of who may call the gateways."""

from typing import Annotated

from msgspec import Meta, Struct


class AccessConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Who may call"""

    tls_cert: Annotated[
        str,
        Meta(
            description="PEM file of the certificate, with its chain, that the HTTP and gRPC gateways show. "
            '"": they speak without TLS.',
            extra={"path": True},
        ),
    ] = ""
    tls_key: Annotated[
        str,
        Meta(
            description='PEM file of that certificate\'s private key, without a passphrase. "": none.',
            extra={"path": True},
        ),
    ] = ""
    tls_client_ca: Annotated[
        str,
        Meta(
            description="PEM file of the authorities whose client certificates are let in; callers without one are "
            'turned away. "": no certificate is asked for.',
            extra={"path": True},
        ),
    ] = ""
    tokens_file: Annotated[
        str,
        Meta(
            description="File with the digests of bearer tokens that are let in, and their scopes; `narsil token` "
            'makes them, and changes count within a second. "": no token is asked for.',
            extra={"path": True},
        ),
    ] = ""
