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
from quantkit.methods import awq, gptq
from quantkit.runtime import folding, gather
from quantkit.runtime.states import States
from quantkit.runtime.walk import Block, InputGroup
from quantkit.workflows import scaling
from quantkit.workflows.gptq_block import Gptq, corrects, round_unreached, solve_group
from quantkit.workflows.method import Originals, Outcome, Solved, put

Refine = Literal["gptq", "none"]
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

    def solve(
        self,
        block: Block,
        originals: Originals,
        full: States,
        quantized: States | None,
    ) -> Outcome:
        groups = block.trace(full[0])
        folds = folding.find(block, groups, full[0])
        folds = scaling.usable(folds, block, originals.schemes)
        groups = [g for group in groups if (g := group.only(originals.schemes))]
        linears = round_unreached(block, originals, groups, self.gptq.options.zero_min)
        sample = [full[i].clone() for i in range(0, len(full), -(-len(full) // _SAMPLES))]
        wanted = [block.forward(x) for x in sample]

        writers = [group for group in groups if group.writes]
        closing = writers[-1] if writers and writers[-1].closes else None
        kept = [group for group in writers if group is not closing] if self.aligned else []
        widest = max((group.width for group in groups), default=1)
        every = gather.spacing(full, widest, self.gptq.tokens_per_input)
        stats, outputs = gather.observe(block, full, groups, kept, every)
        moments = {}
        while stats:
            group, found = stats.popitem()
            moments[group] = found.moments(centred=corrects(group, originals, self.gptq))

        chosen, notes = self._scale(block, folds, originals, moments, sample, wanted)
        chosen.put(block, originals)
        scaled = chosen.originals(originals)
        first = groups if quantized is None else [g for g in groups if not g.writes]
        for group in first:
            found = chosen.moments(group, moments.pop(group))
            linears |= self._round(block, group, scaled, found)
        if quantized is not None:
            moments.clear()
            drifted = gather.observe_drift(block, quantized, outputs, closing, full, every)
            while drifted:
                group, late = drifted.popitem()
                found = late.moments(centred=corrects(group, originals, self.gptq))
                linears |= self._round(block, group, scaled, found)
        linears = {n: replace(s, notes=notes.get(n, {})) for n, s in linears.items()}
        return Outcome(linears, chosen.norms)

    def _round(
        self, block: Block, group: InputGroup, originals: Originals, moments: Moments
    ) -> dict[str, Solved]:
        method = "gptq" if self.refine == "gptq" else "awq"
        found = solve_group(group, originals, moments, self.gptq, self.rounding, method)
        for name, result in found.items():
            put(block, name, result.qweight, result.bias)
        return found

    def rounding(self, target: Tensor, hessian: Tensor, scheme: Scheme) -> gptq.Solution:
        if self.refine == "gptq":
            return self.gptq.rounding(target, hessian, scheme)
        qweight = awq.rounded(target, hessian, scheme, self.gptq.options.zero_min)
        return gptq.Solution(qweight, 0.0, int((hessian.diagonal() <= 0).sum()))

    def _scale(
        self,
        block: Block,
        folds: list[folding.Fold],
        originals: Originals,
        moments: dict[InputGroup, Moments],
        sample: list[Tensor],
        wanted: list[Tensor],
    ) -> tuple[scaling.Scaling, dict[str, dict[str, Any]]]:
        """The scales that win, and what is to be told about each linear."""
        hessians = {name: found.gram for group, found in moments.items() for name in group.names}
        kept, notes = [], {}
        for fold in folds:
            if fold.consumers[0] not in hessians:
                continue
            hessian = hessians[fold.consumers[0]]
            weight = torch.cat([originals.weight(name) for name in fold.consumers])
            choice = awq.choose(
                weight,
                hessian,
                fold.source,
                self._trial(originals.schemes[fold.consumers[0]]),
                scaling.stored_scale(fold, originals),
            )
            told: dict[str, Any] = {"pair": fold.label, "scaled": False}
            if choice.scale is not None:
                part = scaling.folded(fold, choice.scale, block, originals)
                better, ratio = self._proves(block, part, fold, originals, hessian, sample, wanted)
                told |= {"scaled": better, "energy": choice.energy, "peak": choice.peak}
                told |= {"loss": choice.loss, "block_loss": ratio}
                if better:
                    kept.append(part)
            notes |= dict.fromkeys(fold.consumers, told)
        return scaling.combined(kept), notes

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
