"""What a compute family says that it can do. A part of a model's card, so that callers see it too."""

from msgspec import Struct


class Capabilities(Struct, frozen=True):
    """Of one family on one device, for the model that is loaded."""

    protocol: str
    """Of the backend, as "major.minor": see `kernels.backend.PROTOCOL`."""
    device_kind: str
    """cpu or cuda"""
    precisions: tuple[str, ...]
    """Of the arithmetic, that this family offers on this device: fp32, fp16 ..."""
    multi_hot: bool
    """Whether it takes bags of ids."""
    max_rows: int
    """Of a batch that is computed in one piece, as warmed up; longer ones are cut. 0: any."""
