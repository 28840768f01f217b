"""narsil-stream: recommender requests over NATS, coalesced by deadline, scored in one forward pass."""

__version__ = "0.1.0"
