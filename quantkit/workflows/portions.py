"""Solving a block on several ranks: who solves what, and how the parts become whole again.

Rows of a weight do not depend on each other once the Hessian of their inputs is there. So each rank
takes the same share of the rows of every linear, and their times differ little, whatever a row may
cost. The Hessian they factor together, each with all of it. Only groups that are a small part of a
block (one of a hundred experts) are not divided: each goes to the rank that has least to do.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.core.qweight import stacked
from quantkit.core.stats import Moments
from quantkit.errors import QuantkitError
from quantkit.methods import gptq
from quantkit.methods.factor import BY_ITSELF, Team
from quantkit.runtime.block import Block, InputGroup, features
from quantkit.runtime.ranks import Ranks
from quantkit.workflows.method import Originals, Solved

_SMALL = 1 / 32  # of what a rank has to do: then a group is not divided
_GRAIN = 32  # rows are divided in whole numbers of these


@dataclass(frozen=True)
class Portion:
    """``rows`` of a group's linears, and the ``originals`` of just these rows; the ``team`` that
    has others of the group."""

    rows: Mapping[str, slice]
    originals: Originals
    team: Team = BY_ITSELF

    def moments(self, whole: Moments) -> Moments:
        """Those that concern the rows. Only linears that are alone in their group have any that
        concern outputs."""
        if whole.cross is None:
            return whole
        (rows,) = self.rows.values()
        return whole.of_rows(rows)


class Portions:
    """Who solves which of ``groups``: ``owners`` are the ranks of each."""

    def __init__(self, block: Block, groups: Iterable[InputGroup], ranks: Ranks) -> None:
        self._ranks = ranks
        self._outs = {
            group: {name: features(block.linear(name))[0] for name in group.names}
            for group in groups
        }
        # time is taken to go with the number of weights
        weights = {group: group.width * sum(outs.values()) for group, outs in self._outs.items()}
        self.owners = divided(weights, ranks.size)

    def of(self, group: InputGroup, originals: Originals) -> Portion | None:
        """What this rank solves of a group."""
        owners = self.owners[group]
        if self._ranks.rank not in owners:
            return None
        at = owners.index(self._ranks.rank)
        rows = {
            name: slice(some.start, some.stop)
            for name, out in self._outs[group].items()
            if (some := share(out, at, len(owners)))
        }
        return Portion(rows, _cut(originals, rows), self._team(group)) if rows else None

    def _team(self, group: InputGroup) -> Team:
        """All ranks, where all of them have rows of all linears, and so do the same."""
        count, outs = self._ranks.size, self._outs[group].values()
        everyone = len(self.owners[group]) == count
        busy = all(share(out, at, count) for out in outs for at in range(count))
        return self._ranks if everyone and busy else BY_ITSELF

    def together(self, solved: dict[str, Solved]) -> dict[str, Solved]:
        """What all ranks have solved, the same on each."""
        parts: dict[str, list[Solved]] = {}
        for found in self._ranks.everyone(solved):
            for name, one in found.items():
                parts.setdefault(name, []).append(one)
        return {name: joined(some) for name, some in parts.items()}


def divided(weights: Mapping[InputGroup, int], ranks: int) -> dict[InputGroup, list[int]]:
    """The ranks that solve each of some groups with so many weights."""
    fair = sum(weights.values()) / ranks
    found = {group: [*range(ranks)] for group in weights}
    load = [0] * ranks
    for group in sorted(weights, key=lambda group: -weights[group]):
        if weights[group] < fair * _SMALL:
            taker = load.index(min(load))
            load[taker] += weights[group]
            found[group] = [taker]
    return found


def share(rows: int, at: int, parts: int) -> range:
    """The ``at``-th of ``parts`` shares of so many rows."""
    grains = -(-rows // _GRAIN)
    start, stop = (min(rows, grains * k // parts * _GRAIN) for k in (at, at + 1))
    return range(start, stop)


def _cut(originals: Originals, rows: Mapping[str, slice]) -> Originals:
    def bias(name: str) -> Tensor | None:
        whole = originals.bias(name)
        return None if whole is None else whole[rows[name]]

    return replace(originals, weight=lambda name: originals.weight(name)[rows[name]], bias=bias)


def joined(parts: list[Solved]) -> Solved:
    """A linear from shares of its rows, in their order."""
    first = parts[0]
    if len(parts) == 1:
        return first
    indices = [part.qweight.group_of for part in parts]
    if any(not _alike(indices[0], index) for index in indices):
        raise QuantkitError(
            "two processes put the inputs of one linear into different groups",
            "use --act-order static, or GPUs of one kind",
        )
    energy = torch.stack([part.energy for part in parts])
    lost = torch.stack([part.error for part in parts]) * energy
    biases = [part.bias for part in parts if part.bias is not None]
    return replace(
        first,
        qweight=stacked((part.qweight for part in parts), sum(p.qweight.shape[0] for p in parts)),
        bias=torch.cat(biases) if biases else None,
        error=gptq.share(lost.sum(), energy.sum()),
        energy=energy.sum(),
        damp=max(part.damp for part in parts),
    )


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
