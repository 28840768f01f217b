"""Who may call: a bearer token's scopes against what a verb needs. The same for every gateway."""

import enum
import logging
import time
from pathlib import Path

from narsil_stream.core import tokens
from narsil_stream.core.config import Config
from narsil_stream.core.config.doors import loopback
from narsil_stream.core.tokens import Known, Scope, digest
from narsil_stream.schemas.errors import Fault, Refused

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
"""So long may a change of the file go unnoticed."""
TOKEN_CHARS = 512
NAME_CHARS = 128
"""Of whose token it is, as far as a request carries it."""


class Need(enum.Enum):
    """The scopes of which a token must have one."""

    NOTHING = frozenset[Scope]()
    READ = frozenset[Scope]({"infer", "admin"})
    INFER = frozenset[Scope]({"infer"})
    ADMIN = frozenset[Scope]({"admin"})


VERBS = {
    "ServerLive": Need.NOTHING,
    "ServerReady": Need.NOTHING,
    "Documents": Need.NOTHING,
    "ModelReady": Need.READ,
    "ServerMetadata": Need.READ,
    "ModelMetadata": Need.READ,
    "ModelConfig": Need.READ,
    "ModelStatistics": Need.READ,
    "RepositoryIndex": Need.READ,
    "Metrics": Need.READ,
    "ModelInfer": Need.INFER,
    "ModelStreamInfer": Need.INFER,
    "RepositoryModelLoad": Need.ADMIN,
    "RepositoryModelUnload": Need.ADMIN,
}
"""By the names of `inference.GRPCInferenceService`, which HTTP's paths stand for. Any other verb needs ADMIN.

The index changes nothing and says no more than metadata does, so who may infer may wait for a model with it.
"""

CHALLENGES = {Fault.UNAUTHENTICATED: "Bearer", Fault.PERMISSION_DENIED: 'Bearer error="insufficient_scope"'}
"""What HTTP's `www-authenticate` says beside these (RFC 6750)."""


class Access:
    """One for each gateway. `door` is the section of its address: http or grpc."""

    def __init__(self, config: Config, door: str) -> None:
        path = config.access.tokens_file
        self._file = TokensFile(Path(path)) if path else None
        self._trusting = config.insecure or loopback(getattr(config, door).host)

    @property
    def reads_tokens(self) -> bool:
        """Otherwise `check` needs no header."""
        return self._file is not None

    def check(self, authorization: str | None, verb: str) -> str:
        """Whether a caller with that `authorization` header may use `verb`, see `VERBS`. Returns whose token it is; ""
        where none is needed.

        Raises `Refused`: UNAUTHENTICATED, PERMISSION_DENIED.
        """
        need = VERBS.get(verb, Need.ADMIN)
        if self._file is None:
            if need is Need.ADMIN and not self._trusting:
                raise Refused(Fault.PERMISSION_DENIED, f"{verb} needs a token here, and this server knows none")
            return ""
        if need is Need.NOTHING:
            return ""
        key = digest(_token(authorization))
        known = self._file.known().get(key)
        if known is None:
            raise Refused(Fault.UNAUTHENTICATED, "this token is not known")
        if not known.scopes & need.value:
            raise Refused(Fault.PERMISSION_DENIED, f"{verb} needs a token with scope {' or '.join(sorted(need.value))}")
        return known.who[:NAME_CHARS] or f"token {key.hex()[:8]}"


class TokensFile:
    """The tokens that are let in now. A file that cannot be used leaves those of before, and the log says why.

    Finding a token's digest in a dictionary takes a time that depends on the digest: nothing follows from it about a
    token, whose caller cannot choose the digest.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError, ValueError."""
        self._path = path
        self._data = path.read_bytes()
        self._known = tokens.parse(self._data)
        self._look_at = time.monotonic() + LOOK_EVERY_S
        self._problem = ""
        if path.stat().st_mode & 0o027:
            log.warning("%s: others may read or change this file of tokens; `chmod 600` it", path)

    def known(self) -> dict[bytes, Known]:
        """By digest. Reads the file again, once a second at most: comparing its bytes misses no change."""
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_EVERY_S
            self._look()
        return self._known

    def _look(self) -> None:
        try:
            data = self._path.read_bytes()
            if data == self._data and not self._problem:
                return
            self._known, self._data = tokens.parse(data), data
        except (OSError, ValueError) as error:
            self._say(str(error))
            return
        self._problem = ""
        level = logging.INFO if self._known else logging.WARNING
        log.log(level, "%s: %d tokens are let in now", self._path, len(self._known))

    def _say(self, problem: str) -> None:
        if problem != self._problem:
            log.error("%s cannot be used, the tokens of before stay: %s", self._path, problem)
        self._problem = problem


def _token(authorization: str | None) -> str:
    """Raises `Refused`."""
    scheme, _, token = (authorization or "").partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token or len(token) > TOKEN_CHARS:
        raise Refused(Fault.UNAUTHENTICATED, "expected the header `authorization: Bearer <token>`")
    return token
