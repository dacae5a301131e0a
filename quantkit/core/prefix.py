"""What two token sequences begin with alike: keys and values of it need not be computed again."""

from collections.abc import Sequence


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
