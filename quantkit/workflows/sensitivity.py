"""What it costs the whole model when a part of it is rounded, measured in one pass.

A part is the linears of a block that share an input: they share a Hessian, and kernels that fuse
them want one scheme for all. Two things are measured about each:

    its error        E|x (W - Q)|^2 at every scheme that may be chosen, from a quick GPTQ solve
    what that means  with this part alone rounded to ``PROBE`` bits, how far the model's predictions
                     move: the KL divergence on a few calibration rows

For errors as small as those of rounding the KL grows with the error (on the demo model their ratio
is the same within 10 % at 2, 3 and 4 bits), and the KLs of parts add up (Malinovskii et al., HIGGS,
arXiv:2411.17525). So the KL that a scheme will cost is the measured one times a ratio of errors.

Every rounded part is a stream of hidden states that runs through the rest of the model beside the
original's, so that the model is read once, however many parts it has.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from math import isfinite

import torch
from torch import Tensor

from quantkit.core.metrics import Comparison
from quantkit.core.progress import Progress, Step
from quantkit.core.qweight import Scheme
from quantkit.core.stats import InputStats
from quantkit.errors import QuantkitError
from quantkit.methods import align, gptq
from quantkit.runtime import gather
from quantkit.runtime.block import Block, InputGroup
from quantkit.runtime.states import Keeping, States
from quantkit.runtime.walk import Walk
from quantkit.workflows.calibrate import batches
from quantkit.workflows.method import Originals, put_other, put_weight

PROBE = 3
_ROWS, _LONGEST, _SHORTEST = 8, 512, 32
_STREAM_BYTES = 1 << 30  # of all streams together
_TOKENS_PER_INPUT = 10
_FINER_AT = 4

OriginalsOf = Callable[[int, Block], Originals]  # of a block by its index


@dataclass(frozen=True)
class Measured:
    """A part: ``names`` of its linears inside block ``block``, what they were measured to lose.

    kl      of the model with only this part rounded to the probe's scheme
    errors  output error |x (W - Q)|^2 / |x W|^2 at each scheme
    probed  the same at the probe's scheme
    """

    block: int
    names: tuple[str, ...]
    kl: float
    errors: dict[Scheme, float]
    probed: float

    def expected(self, scheme: Scheme) -> float:
        """The KL that this part is expected to cost at a scheme."""
        return self.kl * self.errors[scheme] / self.probed if self.probed else 0.0


def measure(
    walk: Walk,
    rows: list[list[int]],
    tokens_at_once: int,
    keeping: Keeping,
    originals: OriginalsOf,
    schemes: Sequence[Scheme],
    options: gptq.Options,
    progress: Progress,
) -> list[Measured]:
    """Every part of the model, in the order of calls. ``rows`` are token ids for the statistics,
    some of them also for the predictions."""
    calibration = batches(rows, tokens_at_once)
    probe = Scheme(PROBE, schemes[0].group_size, schemes[0].symmetric)
    samples = _samples(walk, rows)
    with closing(walk.embedding(calibration + samples)) as hidden:
        full = keeping.keep(islice(hidden, len(calibration)), [x.shape for x in calibration])
        original = States([x.clone() for x in hidden])
    streams: list[States] = []
    found: list[Measured] = []
    progress.begin("measuring", len(walk))
    for index in range(len(walk)):
        with walk.block(index) as block:
            sources = originals(index, block)
            traced = block.trace(full[0], ends=False)
            groups = [g for group in traced if (g := group.only(sources.schemes))]
            widest = max((group.width for group in groups), default=1)
            every = gather.spacing(full, widest, _TOKENS_PER_INPUT)
            stats, _ = gather.observe(block, full, groups, [], every)
            gather.merge(block, stats)
            for stream in streams:
                gather.advance(block, stream)
            for group in groups:
                part = _Part(group, sources, stats.pop(group), options)
                probed, rounded = part.round(probe)
                streams.append(part.stream(block, original, rounded))
                errors = part.errors(schemes)
                found.append(Measured(index, group.names, 0.0, errors, probed))
            gather.advance(block, original)
        progress.step(Step(index + 1, len(walk), walk.block_name(index), None, 0.0))
    progress.end()
    divergences = _divergences(walk, samples, original, streams)
    return [_with_kl(one, kl) for one, kl in zip(found, divergences)]


def _with_kl(found: Measured, kl: float) -> Measured:
    if not isfinite(kl) or not all(isfinite(error) for error in found.errors.values()):
        raise QuantkitError(
            f"the sensitivity of {found.names[0]} in block {found.block} is not a number",
            "run with --dtype float32",
        )
    return replace(found, kl=kl)


class _Part:
    """Linears with one input, and what is known about it."""

    def __init__(
        self, group: InputGroup, originals: Originals, stats: InputStats, options: gptq.Options
    ) -> None:
        self.names, self.options = group.names, options
        self.weights = [originals.weight(name) for name in group.names]
        self.biases = [originals.bias(name) for name in group.names]
        # what biases can take up is no error
        self.moments = stats.moments(centred=all(bias is not None for bias in self.biases))

    def round(self, scheme: Scheme) -> tuple[float, Tensor]:
        """Relative output error, and the rounded weights, one above the other."""
        weight, gram = torch.cat(self.weights), self.moments.gram
        rounded = gptq.solve(weight, gram, scheme, self.options).qweight.dequantize()
        return float(gptq.relative_error(weight, rounded, gram)[0]), rounded

    def errors(self, schemes: Sequence[Scheme]) -> dict[Scheme, float]:
        """Relative output errors. What smaller groups gain is the same factor at all bits, within
        some percent, so it is only measured at ``_FINER_AT``."""
        first = schemes[0].group_size
        found = {
            scheme: self.round(scheme)[0]
            for scheme in schemes
            if scheme.group_size == first or scheme.bits == _FINER_AT
        }
        for scheme in schemes:
            if scheme not in found:
                like = replace(scheme, group_size=first)
                finer, coarse = (replace(one, bits=_FINER_AT) for one in (scheme, like))
                found[scheme] = found[like] * found[finer] / found[coarse]
        return found

    def stream(self, block: Block, original: States, rounded: Tensor) -> States:
        """The block's outputs for ``original`` with these weights. The block stays as it is."""
        result = original.copy()
        parts = rounded.split([len(weight) for weight in self.weights])
        before = {name: dict(block.linear(name).named_parameters()) for name in self.names}
        for name, weight, bias, new in zip(self.names, self.weights, self.biases, parts):
            put_weight(block, name, new)
            if bias is not None:
                corrected = align.corrected_bias(bias, weight, new, self.moments, 0.0)
                put_other(block, f"{name}.bias", corrected)
        gather.advance(block, result)
        for name, parameters in before.items():
            for leaf, parameter in parameters.items():
                setattr(block.linear(name), leaf, parameter)
        return result


def _samples(walk: Walk, rows: list[list[int]]) -> list[Tensor]:
    """Some of the rows, as much of them as keeps all streams small."""
    config = walk.skeleton.config.get_text_config()
    parts = 5 * len(walk)
    room = _STREAM_BYTES // (parts * config.hidden_size * walk.skeleton.dtype.itemsize)
    length = max(_SHORTEST, min(_LONGEST, room // _ROWS))
    chosen = rows[:: max(1, len(rows) // _ROWS)][:_ROWS]
    return [torch.tensor([row[:length]]) for row in chosen]


def _divergences(
    walk: Walk, samples: list[Tensor], original: States, streams: list[States]
) -> list[float]:
    """Mean KL of every stream's predictions from the original's."""
    found = [Comparison() for _ in streams]
    states = [
        state for i in range(len(samples)) for state in (original[i], *(s[i] for s in streams))
    ]
    logits = walk.logits([ids for ids in samples for _ in range(1 + len(streams))], states)
    for ids in samples:
        reference = next(logits)[0]
        for comparison in found:
            comparison.add("sample", ids[0], reference, next(logits)[0])
    return [comparison.overall()[0].mean for comparison in found]
