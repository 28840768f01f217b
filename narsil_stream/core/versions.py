"""Which version of a model is meant when none is named."""

import re


def newness(version: str) -> tuple[int, int, str]:
    """Orders versions, the newest last: numbers by value, and above words."""
    return (1, int(version), "") if re.fullmatch(r"\d{1,18}", version) else (0, 0, version)
