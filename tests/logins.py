"""Every way to log in at a broker, with what both ends need for it, and a login of the same kind that is refused."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nkeys
import pytest
from nkeys import KeyPair

from narsil_stream.core.broker_init import CONFIG, init
from narsil_stream.core.config import NatsConfig


class Login(NamedTuple):
    """Settings of `nats` by name. `server` is text for the configuration of nats-server."""

    server: str
    good: dict[str, str]
    wrong: dict[str, str]

    def options(self, folder: Path) -> tuple[str, str]:
        """For `NatsServer`."""
        path = folder / "server.conf"
        path.write_text(self.server)
        return "-c", str(path)


def environ(settings: dict[str, str]) -> dict[str, str]:
    """The variables for settings of `nats`."""
    return {f"NARSIL_NATS_{name.upper()}": value for name, value in settings.items()}


def password(folder: Path) -> Login:
    good = {"user": "bob", "password": "hunter2"}
    return Login("authorization { user: bob, password: hunter2 }", good, good | {"password": "hunter3"})


def token(folder: Path) -> Login:
    return Login('authorization { token: "s3cret" }', {"token": "s3cret"}, {"token": "s3cre"})


def nkey(folder: Path) -> Login:
    pair, other = key_pair(nkeys.PREFIX_BYTE_USER), key_pair(nkeys.PREFIX_BYTE_USER)
    files = {}
    for name, one in (("good.nk", pair), ("wrong.nk", other)):
        (folder / name).write_bytes(one.seed + b"\n")
        files[name] = str(folder / name)
    server = f"authorization {{ users: [ {{ nkey: {public(pair)} }} ] }}"
    return Login(server, {"nkey_seed_file": files["good.nk"]}, {"nkey_seed_file": files["wrong.nk"]})


def creds(folder: Path) -> Login:
    """An operator signs an account, which signs a user; the wrong user is signed by an account that nobody knows."""
    operator = key_pair(nkeys.PREFIX_BYTE_OPERATOR)
    account, stranger = key_pair(nkeys.PREFIX_BYTE_ACCOUNT), key_pair(nkeys.PREFIX_BYTE_ACCOUNT)
    limits = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1)
    account_jwt = jwt(operator, account, "account", {"limits": limits | {"wildcards": True}})
    server = f"""operator: {jwt(operator, operator, "operator", {})}
resolver: MEMORY
resolver_preload: {{ {public(account)}: {account_jwt} }}"""
    good, wrong = credentials(folder / "good.creds", account), credentials(folder / "wrong.creds", stranger)
    return Login(server, {"creds_file": good}, {"creds_file": wrong})


def tls(folder: Path) -> Login:
    """Wrong is who does not know the authority; it is the client who hangs up."""
    certificates(folder)
    return Login(f"tls {{ {server_files(folder)} }}", {"tls_ca": f"{folder}/ca.pem"}, {"tls_ca": f"{folder}/other.pem"})


def mutual_tls(folder: Path) -> Login:
    """Wrong is who shows no certificate."""
    certificates(folder)
    server = f'tls {{ {server_files(folder)}, ca_file: "{folder}/ca.pem", verify: true }}'
    wrong = {"tls_ca": f"{folder}/ca.pem"}
    good = wrong | {"tls_cert": f"{folder}/client.pem", "tls_key": f"{folder}/client.key"}
    return Login(server, good, wrong)


def role(folder: Path, name: str = "serve") -> Login:
    """As `narsil broker --init` makes it; wrong is who may only publish requests."""
    users = {user.name: user for user in init(folder / "nats", NatsConfig(), {"right": name, "wrong": "producer"})}
    good, wrong = ({"nkey_seed_file": str(users[which].seed_file)} for which in ("right", "wrong"))
    return Login((folder / "nats" / CONFIG).read_text(), good, wrong)


SECRETS: dict[str, Callable[[Path], Login]] = {
    "password": password,
    "token": token,
    "nkey": nkey,
    "creds": creds,
}
TLS: dict[str, Callable[[Path], Login]] = {"tls": tls, "mutual tls": mutual_tls}


def key_pair(prefix: int) -> KeyPair:
    return nkeys.from_seed(bytearray(nkeys.encode_seed(os.urandom(32), prefix)))


def public(pair: KeyPair) -> str:
    return str(pair.public_key.decode())


def jwt(signer: KeyPair, subject: KeyPair, kind: str, claims: dict[str, object]) -> str:
    """A NATS JWT: `signer` says what `subject` is."""
    head = {"typ": "JWT", "alg": "ed25519-nkey"}
    body = {"jti": public(subject), "iat": 1, "iss": public(signer), "sub": public(subject), "name": kind}
    nats = {"type": kind, "version": 2} | claims
    signed = b".".join(base64url(json.dumps(part).encode()) for part in (head, body | {"nats": nats}))
    return b".".join((signed, base64url(signer.sign(signed)))).decode()


def base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def credentials(path: Path, account: KeyPair) -> str:
    """The credentials file of a new user of `account`."""
    user = key_pair(nkeys.PREFIX_BYTE_USER)
    claims = {"pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1}
    token = jwt(account, user, "user", claims)
    path.write_text(
        f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n"
    )
    return str(path)


def certificates(folder: Path) -> None:
    """ca.pem with a server for 127.0.0.1 and a client that it signed; other.pem is an authority that signed neither."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    def new(name: str, *options: str) -> None:
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key")
        openssl("req", "-x509", *key, "-out", f"{name}.pem", "-days", "2", "-subj", f"/CN={name}", *options)

    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE")
    for authority in ("ca", "other"):
        new(authority, "-addext", "keyUsage=critical,keyCertSign")
    new("server", *signed, "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "extendedKeyUsage=serverAuth")
    new("client", *signed, "-addext", "extendedKeyUsage=clientAuth")


def server_files(folder: Path) -> str:
    return f'cert_file: "{folder}/server.pem", key_file: "{folder}/server.key"'
