"""What the HTTP and the gRPC gateway have in common as actors."""

from typing import ClassVar

from narsil_stream.core.access import Access
from narsil_stream.core.actor import Actor
from narsil_stream.core.bus import Bus
from narsil_stream.core.config import Config, GrpcConfig, HttpConfig
from narsil_stream.core.ports import address
from narsil_stream.gateways.inference import Inference


class Door(Actor[None]):
    """One process's share of a port, where `scheme` is spoken."""

    kind = "gateway"
    tunable = True
    scheme: ClassVar[str]

    def __init__(self, config: Config, bus: Bus, where: HttpConfig | GrpcConfig, share_port: bool) -> None:
        """`where`: its part of `config`. `share_port`: with other processes that listen on it."""
        super().__init__(1)
        self._config = config
        self._where = where
        self._share_port = share_port
        self._inference = Inference(config, bus, self.registry)
        self._access = Access(config, self.scheme)
        self.port = where.port

    def receive(self, message: None) -> None:
        """Requests do not pass through the mailbox: each is a task of the server."""

    def tune(self, config: Config) -> None:
        self._inference.tune(config)

    def detail(self) -> str:
        models = ", ".join(f"{ref.name} {ref.version}" for ref in self._inference.models()) or "no model"
        ready = "ready" if self._inference.ready else "not ready"
        scheme = f"{self.scheme}s" if self._config.access.tls_cert else self.scheme
        return f"{scheme}://{address(self._where.host, self.port)}, {models}, {ready}"
