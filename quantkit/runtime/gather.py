"""Statistics of a block's linears, gathered while calibration rows run through it.

Hidden states are lists of tensors [rows, tokens, width], one a micro-batch. A block's outputs take
the place of its inputs in the same memory, and what is kept for long is one large piece of memory:
small lasting tensors among all the short-lived ones would leave the heap in pieces.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from quantkit.core.profile import phase
from quantkit.core.stats import InputStats
from quantkit.errors import QuantkitError
from quantkit.runtime.ranks import ALONE, Ranks
from quantkit.runtime.walk import Block, InputGroup

Stats = dict[InputGroup, InputStats]


def observe(
    block: Block,
    hidden: list[Tensor],
    groups: list[InputGroup],
    keep: list[InputGroup],
    every: int = 1,
    ranks: Ranks = ALONE,
) -> tuple[Stats, dict[InputGroup, list[Tensor]]]:
    """Run all rows once. Returns the statistics of the inputs of ``groups``, from one token in
    ``every``, and every output of the linears ``keep``; ``hidden`` then holds the block's outputs.
    On several ranks the statistics are those of this one's rows.
    """
    device, (count, first) = hidden[0].device, calls(hidden, ranks)
    stats = {group: InputStats(group.width, device, None, count, every, first) for group in groups}
    kept = {group: copied(hidden) for group in keep}
    free = {group: iter(kept[group]) for group in keep}
    with (
        block.watching({group.names[0]: stats[group].add for group in groups}),
        block.watching(
            {g.names[0]: lambda x, y, g=g: _fill(next(free[g]), y) for g in keep}, outputs=True
        ),
    ):
        advance(block, hidden)
    return _checked(block, stats), kept


def observe_drift(
    block: Block,
    hidden: list[Tensor],
    wanted: dict[InputGroup, list[Tensor]],
    closing: list[Tensor],
    every: int = 1,
    ranks: Ranks = ALONE,
) -> Stats:
    """Run all rows once and leave ``hidden`` as it is. Returns, for each linear in ``wanted``, the
    statistics of its inputs (one token in ``every``) and of the difference between the outputs that
    it should have had and those it has. For a linear that closes the block, that is the difference
    between the block's wanted outputs, ``closing``, and its actual ones."""
    device, out, (count, first) = hidden[0].device, hidden[0].shape[-1], calls(hidden, ranks)
    stats = {group: InputStats(group.width, device, out, count, every, first) for group in wanted}
    held: dict[InputGroup, Tensor] = {}

    def hook(group: InputGroup, index: int) -> Callable[[Tensor, Tensor], None]:
        def see(x: Tensor, y: Tensor) -> None:
            stats[group].add(x)
            if wanted[group]:
                stats[group].add_drift(x, wanted[group][index] - y)
            else:
                held[group] = x

        return see

    for i, x in enumerate(hidden):
        hooks = {g.names[0]: hook(g, i) for g in wanted}
        with block.watching(hooks, outputs=True), phase("forward"):
            difference = closing[i] - block.forward(x)
        for group in list(held):
            stats[group].add_drift(held.pop(group), difference)
    return _checked(block, stats)


def mean_squares(
    block: Block, hidden: list[Tensor], groups: list[InputGroup]
) -> dict[InputGroup, Tensor]:
    """Run all rows once. Returns the mean square of every input of ``groups``, float32 [width];
    ``hidden`` then holds the block's outputs. Raises QuantkitError for inputs that are not finite.
    """
    sums = {group: torch.zeros(group.width, device=hidden[0].device) for group in groups}
    count = dict.fromkeys(groups, 0)

    def add(group: InputGroup, x: Tensor) -> None:
        rows = x.reshape(-1, group.width).float()
        sums[group] += rows.square().sum(0)
        count[group] += len(rows)

    with block.watching({g.names[0]: lambda x, g=g: add(g, x) for g in groups}):
        advance(block, hidden)
    for group, found in sums.items():
        if not bool(found.isfinite().all()):
            raise _not_finite(block, group)
    return {group: sums[group] / count[group] for group in groups if count[group]}


def calls(hidden: list[Tensor], ranks: Ranks) -> tuple[int, int]:
    """How many micro-batches all ranks have, and how many of them come before this rank's."""
    counts = ranks.everyone(len(hidden))
    return sum(counts), sum(counts[: ranks.rank])


def spacing(
    hidden: list[Tensor], width: int, tokens_per_input: int | None, ranks: Ranks = ALONE
) -> int:
    """One token in how many leaves at least ``tokens_per_input`` (None: all) for each of ``width``
    features, and one of every micro-batch."""
    if tokens_per_input is None:
        return 1
    own = [x.shape[0] * x.shape[1] for x in hidden]
    tokens = [count for counts in ranks.everyone(own) for count in counts]
    return max(1, min(sum(tokens) // (tokens_per_input * width), *tokens))


def copied(hidden: list[Tensor]) -> list[Tensor]:
    """The same hidden states once more, in one piece of memory."""
    together = torch.cat([x.reshape(-1, x.shape[-1]) for x in hidden])
    parts = together.split([x.shape[0] * x.shape[1] for x in hidden])
    return [part.reshape(x.shape) for part, x in zip(parts, hidden)]


def _fill(place: Tensor, y: Tensor) -> None:
    place.copy_(y.reshape(place.shape))


def advance(block: Block, hidden: list[Tensor]) -> None:
    """Overwrite hidden states with the block's outputs."""
    with phase("forward"):
        for x in hidden:
            x.copy_(block.forward(x))


def _checked(block: Block, stats: Stats) -> Stats:
    for group, found in stats.items():
        if not found.finite:
            raise _not_finite(block, group)
    return stats


def _not_finite(block: Block, group: InputGroup) -> QuantkitError:
    return QuantkitError(
        f"the inputs of {block.name}.{group.names[0]} are not finite during calibration",
        "run with --dtype float32, and check that the model itself generates sensible text",
    )
