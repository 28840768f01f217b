"""Servers of other people around our engine. Each runs in its own virtual environment, started by `bench.peers`."""
