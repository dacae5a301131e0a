"""Names of tensors and modules."""

import re


def natural(name: str) -> tuple[object, ...]:
    """Sort key: numbers inside names count as numbers, tensors outside of blocks come first."""
    parts = re.split(r"(\d+)", name)
    block = int(parts[1]) if len(parts) > 1 else -1
    return (block, [int(p) if p.isdigit() else p for p in parts])


def in_block(name: str) -> bool:
    """Whether it is one of many alike: of a decoder block."""
    return any(part.isdigit() for part in name.split("."))
