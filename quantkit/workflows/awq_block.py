"""One decoder block through AWQ: gather, choose scales, fold them in, round.

The passes are those of gptq_block.py, whose streams and kinds of linears are used too. The first
one, over the original block, gathers the statistics of every linear; scales are chosen from them
(methods/awq.py), and each has to prove itself on the block's output before it is folded. From then
on the block is the scaled one, which computes the same, and is quantized like any other: by GPTQ
under the scaled inputs' Hessian, or to nearest.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from quantkit.core.qweight import Scheme
from quantkit.core.stats import Moments
from quantkit.errors import UsageError
from quantkit.methods import awq
from quantkit.methods.align import Lost
from quantkit.methods.factor import BY_ITSELF, Team
from quantkit.methods.gptq import Solution
from quantkit.runtime import folding, gather
from quantkit.runtime.block import Block, InputGroup
from quantkit.runtime.ranks import ALONE, Ranks
from quantkit.runtime.states import States
from quantkit.workflows import scaling
from quantkit.workflows.gptq_block import Gptq, corrects, fill, round_unreached, solve_group
from quantkit.workflows.method import Originals, Outcome, Solved
from quantkit.workflows.portions import Portion, Portions

Refine = Literal["gptq", "none"]
Seen = tuple[list[InputGroup], list[folding.Fold]]  # linears, and where their inputs can be scaled
_SAMPLES = 2  # micro-batches that decide whether a pair is scaled


@dataclass(frozen=True)
class Awq:
    """AWQ as a method (see method.py), and its settings.

    refine   how the scaled weights are rounded: by GPTQ, or to nearest
    gptq     GPTQ's settings; with refine none, those of the statistics
    """

    refine: Refine
    gptq: Gptq

    name = "awq"
    copies = True

    def __post_init__(self) -> None:
        if self.refine not in get_args(Refine):
            raise UsageError(f"refine '{self.refine}' is unknown", "use gptq or none")

    @property
    def aligned(self) -> bool:
        return self.refine == "gptq" and self.gptq.aligned

    @property
    def damp(self) -> float:
        return self.gptq.damp

    @property
    def rounds(self) -> int:
        return self.gptq.rounds if self.refine == "gptq" else 0

    def resolved(self) -> dict[str, Any]:
        return {**self.gptq.resolved(), "rounds": self.gptq.options.rounds, "refine": self.refine}

    def look(self, block: Block, sample: Tensor) -> Seen:
        groups = block.trace(sample, ends=self.aligned)
        return groups, folding.find(block, groups, sample)

    def solve(
        self,
        block: Block,
        seen: Seen,
        originals: Originals,
        full: States,
        quantized: States | None,
        ranks: Ranks = ALONE,
        keep: bool = False,
    ) -> Outcome:
        traced, scalable_at = seen
        folds = scaling.usable(scalable_at, block, originals.schemes)
        groups = [g for group in traced if (g := group.only(originals.schemes))]
        sample = _sampled(full, ranks)
        wanted = [block.forward(x) for x in sample]

        writers = [group for group in groups if group.writes]
        closing = writers[-1] if writers and writers[-1].closes else None
        inner = [group for group in writers if group is not closing] if self.aligned else []
        widest = max((group.width for group in groups), default=1)
        every = gather.spacing(full, widest, self.gptq.tokens_per_input, ranks)
        # writers are solved under other statistics where there is alignment: these are for scales
        scalable = {name for fold in folds for name in fold.consumers}
        observed = [
            g for g in groups if quantized is None or not g.writes or g.names[0] in scalable
        ]
        stats, outputs = gather.observe(block, full, observed, inner, every, ranks)
        groups = [group for group in groups if group in stats or group not in observed]
        linears = round_unreached(block, originals, groups, self.gptq.options.zero_min)
        # everywhere: scales are chosen before it is known who solves what
        gather.merge(block, stats, ranks)
        moments = {}
        while stats:
            group, sums = stats.popitem()
            moments[group] = sums.moments(centred=corrects(group, originals, self.gptq))

        chosen, notes = self._scale(block, folds, originals, moments, sample, wanted, ranks)
        chosen.put(block, originals)
        scaled = chosen.originals(originals)
        first = groups if quantized is None else [g for g in groups if not g.writes]
        portions = Portions(block, first, ranks)
        rounded: dict[str, Solved] = {}
        for group in portions.order:
            found = chosen.moments(group, moments.pop(group))
            rounded |= self._round(portions.of(group, scaled), found)
        linears |= fill(block, portions.together(rounded))
        kept: gather.Kept = {}
        if quantized is not None:
            moments.clear()
            drifted, kept = gather.observe_drift(
                block, quantized, outputs, closing, full, every, ranks, keep
            )
            outputs.clear()
            portions, rounded = Portions(block, drifted, ranks), {}
            gather.merge(block, drifted, ranks, portions.owners)
            for group in portions.order:
                late = drifted.pop(group)
                if portion := portions.of(group, scaled):
                    found = late.moments(centred=corrects(group, originals, self.gptq))
                    rounded |= self._round(portion, found)
            linears |= fill(block, portions.together(rounded))
        linears = {n: replace(s, notes=notes.get(n, {})) for n, s in linears.items()}
        return Outcome(linears, chosen.norms, kept)

    def _round(self, portion: Portion | None, moments: Moments) -> dict[str, Solved]:
        method = "gptq" if self.refine == "gptq" else "awq"
        if portion is None:
            return {}
        return solve_group(portion, moments, self.gptq, self.rounding, method)

    def rounding(
        self,
        weight: Tensor,
        hessian: Tensor,
        scheme: Scheme,
        lost: Lost | None = None,
        team: Team = BY_ITSELF,
    ) -> Solution:
        if self.refine == "gptq":
            return self.gptq.rounding(weight, hessian, scheme, lost, team)
        assert lost is None  # only GPTQ's targets are aligned
        qweight = awq.rounded(weight, hessian, scheme, self.gptq.options.zero_min)
        return Solution(qweight, weight, 0.0, int((hessian.diagonal() <= 0).sum()))

    def _scale(
        self,
        block: Block,
        folds: list[folding.Fold],
        originals: Originals,
        moments: dict[InputGroup, Moments],
        sample: list[Tensor],
        wanted: list[Tensor],
        ranks: Ranks,
    ) -> tuple[scaling.Scaling, dict[str, dict[str, Any]]]:
        """The scales that win, and what is to be told about each linear. Ranks take folds in
        turn."""
        hessians = {name: found.gram for group, found in moments.items() for name in group.names}
        folds = [fold for fold in folds if fold.consumers[0] in hessians]
        own = [
            self._tried(block, fold, originals, hessians[fold.consumers[0]], sample, wanted)
            for fold in folds[ranks.rank :: ranks.size]
        ]
        found = ranks.everyone(own)
        tried = [found[i % ranks.size][i // ranks.size] for i in range(len(folds))]
        notes = {name: told for fold, (_, told) in zip(folds, tried) for name in fold.consumers}
        return scaling.combined([part for part, _ in tried if part]), notes

    def _tried(
        self,
        block: Block,
        fold: folding.Fold,
        originals: Originals,
        hessian: Tensor,
        sample: list[Tensor],
        wanted: list[Tensor],
    ) -> tuple[scaling.Scaling | None, dict[str, Any]]:
        """The best scales of one fold, if they are better than none, and what is told of them."""
        weight = torch.cat([originals.weight(name) for name in fold.consumers])
        choice = awq.choose(
            weight,
            hessian,
            fold.source,
            self._trial(originals.schemes[fold.consumers[0]]),
            scaling.stored_scale(fold, originals),
        )
        told: dict[str, Any] = {"pair": fold.label, "scaled": False}
        if choice.scale is None:
            return None, told
        part = scaling.folded(fold, choice.scale, block, originals)
        better, ratio = self._proves(block, part, fold, originals, hessian, sample, wanted)
        told |= {"scaled": better, "energy": choice.energy, "peak": choice.peak}
        told |= {"loss": choice.loss, "block_loss": ratio}
        return part if better else None, told

    def _trial(self, scheme: Scheme) -> awq.Rounding:
        """Rounding as candidates are compared by it: without GPTQ's last rounds."""
        options = replace(self.gptq.options, rounds=0)
        quick = replace(self, gptq=replace(self.gptq, options=options))
        return lambda weight, hessian: quick.rounding(weight, hessian, scheme).qweight.dequantize()

    def _proves(
        self,
        block: Block,
        part: scaling.Scaling,
        fold: folding.Fold,
        originals: Originals,
        hessian: Tensor,
        sample: list[Tensor],
        wanted: list[Tensor],
    ) -> tuple[bool, float]:
        def rounding(name: str, weight: Tensor, scale: Tensor | None) -> Tensor:
            curved = hessian if scale is None else awq.scaled_hessian(hessian, scale)
            return self._trial(originals.schemes[name])(weight, curved)

        return scaling.improves(block, part, fold.consumers, originals, rounding, sample, wanted)


def _sampled(hidden: States, ranks: Ranks) -> list[Tensor]:
    """Some micro-batches of all ranks, on each of them."""
    counts = enumerate(gather.everywhere(hidden, ranks))
    places = [(rank, index) for rank, own in counts for index in range(len(own))]
    return [
        ranks.share(hidden[index].clone() if rank == ranks.rank else None, rank)
        for rank, index in places[:: -(-len(places) // _SAMPLES)]
    ]
