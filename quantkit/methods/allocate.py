"""How many bytes each part of a model gets, so that all together lose the least.

Every part has some options, each with a size and a loss, and losses add up (they do, for errors as
small as those of quantization: Malinovskii et al., HIGGS, arXiv:2411.17525, theorem 1). The least
total loss under a budget is then found from the steepest steps first: on the lower convex hull of
a part's options, every step up costs more bytes for each bit of loss that it saves.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """What one setting of a part costs: bytes in the file, and loss."""

    nbytes: int
    loss: float


def allocate(parts: Sequence[Sequence[Option]], budget: int) -> list[int] | None:
    """Which option each part takes, by its index; None when not even the smallest fit.

    Deterministic: equal steps are taken in the order of the parts. What the last step leaves over
    is given to later, smaller steps that still fit.
    """
    hulls = [hull(options) for options in parts]
    at = [0] * len(parts)
    spent = sum(options[h[0]].nbytes for options, h in zip(parts, hulls))
    if spent > budget:
        return None
    steps = [
        (_gain(options, h[k], h[k + 1]), -part, -k)
        for part, (options, h) in enumerate(zip(parts, hulls))
        for k in range(len(h) - 1)
    ]
    # On a hull gains fall from step to step, so that a part's steps come in their order
    for _, minus_part, minus_k in sorted(steps, reverse=True):
        part, k = -minus_part, -minus_k
        options, h = parts[part], hulls[part]
        more = options[h[k + 1]].nbytes - options[h[k]].nbytes
        if at[part] == k and spent + more <= budget:
            at[part], spent = k + 1, spent + more
    return [h[k] for h, k in zip(hulls, at)]


def hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull, smallest first: no mixture of two others is
    as good."""
    order = sorted(range(len(options)), key=lambda i: options[i])
    found: list[int] = []
    for i in order:
        if found and options[i].loss >= options[found[-1]].loss:
            continue
        if found and options[i].nbytes == options[found[-1]].nbytes:
            continue
        while len(found) > 1 and _gain(options, found[-2], found[-1]) <= _gain(
            options, found[-1], i
        ):
            found.pop()
        found.append(i)
    return found


def _gain(options: Sequence[Option], a: int, b: int) -> float:
    """Loss saved by a byte on the way from option ``a`` to ``b``."""
    return (options[a].loss - options[b].loss) / (options[b].nbytes - options[a].nbytes)
