"""Solving a block on several ranks: who solves what, and how the parts become whole again.

Rows of a weight do not depend on each other once the Hessian of their inputs is there, so they can
be divided among ranks. But some of the work is the same for one row as for all: a Hessian has to be
factored, and a column waits for the one before. So a group of linears is only divided where all of
them end sooner for it; others go whole to one rank, and those that are divided level out what that
leaves. The Hessian of a divided group is factored by all that have rows of it, each with all of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate

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

_GRAIN = 32  # rows are divided in whole numbers of these


@dataclass(frozen=True)
class Pace:
    """What solving takes on a kind of device, set against what a column of one row takes: a column
    costs ``alone`` times as much as there are inputs, however few rows there are (what moves,
    factors and refines by a Hessian, and what waits for the column before); and from ``span``
    inputs on a row costs twice as much, since others of its columns have more to do with it. To
    have ``shared`` linears with others costs so much, whatever they are: ranks wait for each
    other."""

    alone: Fraction
    span: int | None = None
    shared: int = 0

    def whole(self, width: int) -> Fraction:
        """However few rows there are."""
        return width * width * self.alone

    def row(self, width: int) -> Fraction:
        return width * (1 + Fraction(width, self.span) if self.span else Fraction(1))


# Multiplications and additions on a CPU. On an H200 by traces of linears of 4,864 and 19,456
# inputs, of all rows and of some (solver_gpu.md).
CPU, GPU = Pace(Fraction(1, 3)), Pace(Fraction(3, 5), 20_000, 10_000_000)

Shares = list[Fraction]  # of some rows, one for each rank


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
    """Who solves which of ``groups``: ``owners`` are the ranks that have rows of each."""

    def __init__(self, block: Block, groups: Iterable[InputGroup], ranks: Ranks) -> None:
        self._ranks = ranks
        self._outs = {
            group: {name: features(block.linear(name))[0] for name in group.names}
            for group in groups
        }
        rows = {group: sum(outs.values()) for group, outs in self._outs.items()}
        shares = divided(rows, ranks.size, GPU if ranks.device.type == "cuda" else CPU)
        self._bounds = {group: [Fraction(), *accumulate(shares[group])] for group in rows}
        self.owners = {
            group: [
                rank
                for rank in range(ranks.size)
                if any(self._rows(group, name, rank) for name in group.names)
            ]
            for group in rows
        }

    @property
    def order(self) -> list[InputGroup]:
        """In which every rank solves them: first what several ranks do together, so that none waits
        for what another one does by itself; else the last one first, which is mostly the widest,
        while there is no other's result in memory."""
        last_first = list(reversed(self.owners))
        return sorted(last_first, key=lambda group: -len(self.owners[group]))

    def of(self, group: InputGroup, originals: Originals) -> Portion | None:
        """What this rank solves of a group."""
        rows = {
            name: slice(some.start, some.stop)
            for name in self._outs[group]
            if (some := self._rows(group, name, self._ranks.rank))
        }
        return Portion(rows, _cut(originals, rows), self._team(group)) if rows else None

    def _rows(self, group: InputGroup, name: str, rank: int) -> range:
        start, stop = self._bounds[group][rank : rank + 2]
        return share(self._outs[group][name], start, stop)

    def _team(self, group: InputGroup) -> Team:
        """All ranks, where all of them have rows of all linears, and so do the same."""
        busy = all(
            self._rows(group, name, rank)
            for name in self._outs[group]
            for rank in range(self._ranks.size)
        )
        return self._ranks if busy else BY_ITSELF

    def together(self, solved: dict[str, Solved]) -> dict[str, Solved]:
        """What all ranks have solved, the same on each."""
        parts: dict[str, list[Solved]] = {}
        for found in self._ranks.everyone(solved):
            for name, one in found.items():
                parts.setdefault(name, []).append(one)
        return {name: joined(some) for name, some in parts.items()}


def divided(rows: Mapping[InputGroup, int], ranks: int, pace: Pace) -> dict[InputGroup, Shares]:
    """What each of so many ranks takes of the ``rows`` of every group, so that the last one is done
    soonest: which of the cheapest go whole to one rank is tried out."""
    costs = {cost(group, count, pace) for group, count in rows.items()}
    plans = [_planned(rows, ranks, pace, most) for most in [Fraction(), *sorted(costs)]]
    return min(plans, key=lambda plan: plan[0])[1]


def cost(group: InputGroup, rows: int | Fraction, pace: Pace) -> Fraction:
    """Of solving so many rows of it, by itself."""
    return pace.whole(group.width) + rows * pace.row(group.width)


def _planned(
    rows: Mapping[InputGroup, int], ranks: int, pace: Pace, most: Fraction
) -> tuple[Fraction, dict[InputGroup, Shares]]:
    """Shares where groups that cost ``most`` or less are not divided; and how much the rank with
    most to do has to do."""
    costs = {group: cost(group, count, pace) for group, count in rows.items()}
    loads, shares = [Fraction()] * ranks, {}
    for group in sorted(costs, key=lambda group: -costs[group]):
        if costs[group] <= most:
            taker = loads.index(min(loads))
            loads[taker] += costs[group]
            shares[group] = [Fraction(rank == taker) for rank in range(ranks)]
    rest = [group for group in rows if group not in shares]
    alike = sum(pace.whole(group.width) + pace.shared for group in rest)
    work = sum(rows[group] * pace.row(group.width) for group in rest)
    levelled = _levelled(loads, work) if work else []
    busy = [load + alike + some * work for load, some in zip(loads, levelled) if some]
    return max(loads + busy), shares | dict.fromkeys(rest, levelled)


def _levelled(loads: Sequence[Fraction], work: Fraction) -> Shares:
    """Shares of some ``work`` after which those who have any of it have as much to do as each
    other, and nobody else has less."""
    lowest = sorted(loads)
    for count in reversed(range(1, len(loads) + 1)):
        level = (sum(lowest[:count]) + work) / count
        if level > lowest[count - 1]:
            break
    return [max(Fraction(), level - load) / work for load in loads]


def share(rows: int, start: Fraction, stop: Fraction) -> range:
    """The part of so many rows from one fraction of them to another."""
    grains = -(-rows // _GRAIN)
    return range(*(min(rows, int(grains * bound) * _GRAIN) for bound in (start, stop)))


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
