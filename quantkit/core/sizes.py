"""Sizes as people write them."""

import re

from quantkit.errors import UsageError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)


def size_in_bytes(text: str | int) -> int:
    """``5GB``, or 5000000000 -> 5000000000. Raises UsageError."""
    match = _SIZE.fullmatch(str(text).strip())
    size = (
        0
        if match is None
        else int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))
    )
    if size < 1000:
        raise UsageError(f"'{text}' is not a size", "write 5GB or 500MB")
    return size
