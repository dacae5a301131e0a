"""Statistics of a block's linears, gathered while calibration rows run through it.

A block's outputs take the place of its inputs (see states.py).
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import count

import torch
from torch import Tensor

from quantkit.core import pinned
from quantkit.core.profile import phase
from quantkit.core.stats import InputStats
from quantkit.errors import QuantkitError
from quantkit.runtime.block import Block, InputGroup
from quantkit.runtime.ranks import ALONE, Ranks
from quantkit.runtime.states import States

Stats = dict[InputGroup, InputStats]
Kept = dict[InputGroup, States]  # inputs of writers with an exit, in the quantized model


def observe(
    block: Block,
    hidden: States,
    groups: list[InputGroup],
    keep: list[InputGroup],
    every: int = 1,
    ranks: Ranks = ALONE,
) -> tuple[Stats, dict[InputGroup, States]]:
    """Run all rows once. Returns the statistics of the inputs of ``groups``, from one token in
    ``every`` (an expert: from all that it gets), and every output of the linears ``keep``;
    ``hidden`` then holds the block's outputs. On several ranks the statistics are those of this
    one's rows, to be merged. There are none of groups that no token went to, on any rank.
    """
    device, (number, first) = hidden.device, calls(hidden, ranks)
    stats = {
        g: InputStats(g.width, device, None, number, 1 if g.routed else every, first)
        for g in groups
    }
    kept = {group: hidden.empty() for group in keep}
    place = {group: count() for group in keep}
    with (
        block.watching({group.names[0]: stats[group].add for group in groups}),
        block.watching(
            {g.names[0]: lambda x, y, g=g: kept[g].put(next(place[g]), y) for g in keep},
            outputs=True,
        ),
    ):
        advance(block, hidden)
    for states in kept.values():
        states.settle()
    counts = ranks.everyone([found.count for found in stats.values()])
    reached = [group for group, each in zip(stats, zip(*counts)) if any(each)]
    return {group: stats[group] for group in reached}, kept


def observe_drift(
    block: Block,
    hidden: States,
    wanted: dict[InputGroup, States],
    last: InputGroup | None,
    closing: States,
    every: int = 1,
    ranks: Ranks = ALONE,
    keep: bool = False,
) -> tuple[Stats, Kept]:
    """Run all rows once and leave ``hidden`` as it is. Returns, for each linear in ``wanted``, the
    statistics of its inputs (one token in ``every``) and of the difference between the outputs that
    it should have had and those it has, of this rank's rows, to be merged. For ``last``, a linear
    that closes the block, that is the difference between the block's wanted outputs, ``closing``,
    and its actual ones. With ``keep`` also all inputs of those that have an exit."""
    groups = [*wanted, *([last] if last else [])]
    device, out, (number, first) = hidden.device, hidden.width, calls(hidden, ranks)
    stats = {group: InputStats(group.width, device, out, number, every, first) for group in groups}
    kept = {g: hidden.empty(g.width) for g in groups if keep and g.exit}
    place = {group: count() for group in kept}
    held: dict[InputGroup, Tensor] = {}
    due: dict[InputGroup, Tensor] = {}

    def hook(group: InputGroup) -> Callable[[Tensor, Tensor], None]:
        def see(x: Tensor, y: Tensor) -> None:
            if group in due:
                stats[group].add(x, due[group].reshape(y.shape) - y)
            else:
                held[group] = x
            if group in kept:
                kept[group].put(next(place[group]), x)

        return see

    hooks = {group.names[0]: hook(group) for group in groups}
    for x, closed, *others in zip(hidden, closing, *wanted.values(), strict=True):
        due.update(zip(wanted, others))
        with block.watching(hooks, outputs=True), phase("forward"):
            difference = closed - block.forward(x)
        for group in list(held):
            stats[group].add(held.pop(group), difference)
    return stats, kept


def merge(
    block: Block,
    stats: Stats,
    ranks: Ranks = ALONE,
    owners: Mapping[InputGroup, Sequence[int]] | None = None,
) -> None:
    """Make statistics of this rank's tokens those of all tokens, on the ``owners`` of each group,
    or everywhere. Raises QuantkitError there when any inputs were not finite. A GPU is waited for
    to know that, so it is given what is to be exchanged first."""
    every = range(ranks.size)
    ranks.merge((found, owners[group] if owners else every) for group, found in stats.items())
    finite = [found.finite for found in stats.values()]
    sound = pinned.numbers(torch.stack(finite)) if finite else []
    for group, fine in zip(stats, sound):
        if not fine:
            raise _not_finite(block, group)


def mean_squares(
    block: Block, hidden: States, groups: list[InputGroup]
) -> dict[InputGroup, Tensor]:
    """Run all rows once. Returns the mean square of every input of ``groups``, float32 [width];
    ``hidden`` then holds the block's outputs. Raises QuantkitError for inputs that are not finite.
    """
    sums = {group: torch.zeros(group.width, device=hidden.device) for group in groups}
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


def everywhere(hidden: States, ranks: Ranks) -> list[list[int]]:
    """The tokens of every micro-batch of every rank. The same ranks tell each other once: states
    take the place of states."""
    if hidden.everywhere is None:
        hidden.everywhere = ranks.everyone([rows * length for rows, length in hidden.shapes])
    return hidden.everywhere


def calls(hidden: States, ranks: Ranks) -> tuple[int, int]:
    """How many micro-batches all ranks have, and how many of them come before this rank's."""
    counts = [len(own) for own in everywhere(hidden, ranks)]
    return sum(counts), sum(counts[: ranks.rank])


def spacing(hidden: States, width: int, tokens_per_input: int | None, ranks: Ranks = ALONE) -> int:
    """One token in how many leaves at least ``tokens_per_input`` (None: all) for each of ``width``
    features, and one of every micro-batch."""
    if tokens_per_input is None:
        return 1
    tokens = [number for own in everywhere(hidden, ranks) for number in own]
    return max(1, min(sum(tokens) // (tokens_per_input * width), *tokens))


def advance(block: Block, hidden: States, kept: Kept | None = None) -> None:
    """Overwrite hidden states with the block's outputs. What leads to inputs that are ``kept`` is
    not computed again; uses them up."""
    kept = kept or {}
    with phase("forward"):
        for index, x in enumerate(hidden):
            with block.shortened({group: inputs[index] for group, inputs in kept.items()}):
                hidden.put(index, block.forward(x))
        hidden.settle()
    kept.clear()


def _not_finite(block: Block, group: InputGroup) -> QuantkitError:
    for name, parameter in block.module.named_parameters():
        if not bool(parameter.isfinite().all()):
            return QuantkitError(
                f"{block.name}.{name} holds infinities or NaN", "the original may be damaged"
            )
    return QuantkitError(
        f"the inputs of {block.name}.{group.names[0]} are not finite during calibration",
        "run with --dtype float32, and check that the model itself generates sensible text",
    )
