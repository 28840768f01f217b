"""FBGEMM logs each of its libraries and switches through the root logger: no news for whoever reads a server's log."""

import logging


class _OnlyWarnings(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO or "fbgemm_gpu" not in record.pathname


_FILTER = _OnlyWarnings()


def quieten() -> None:
    """Keep FBGEMM's warnings, drop the rest. Others' records stay: a logger's filter sees only what goes through it."""
    logging.getLogger().addFilter(_FILTER)
