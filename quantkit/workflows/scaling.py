"""Scales of a block's inputs: chosen, tried on the block itself, and folded into it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quantkit.core.stats import Moments
from quantkit.methods import awq
from quantkit.runtime.block import Block, InputGroup, is_linear
from quantkit.runtime.folding import Fold
from quantkit.workflows.method import Originals, put_other, put_weight


@dataclass
class Scaling:
    """Scales that were folded into a block. ``columns`` and ``rows`` of a linear's weight are
    multiplied by and divided by them; ``norms`` are parameters as they are stored."""

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, name: str, weight: Tensor) -> Tensor:
        """What a linear's weight [out, in] becomes."""
        if name in self.columns:
            weight = weight * self.columns[name]
        return weight / self.rows[name][:, None] if name in self.rows else weight

    def bias(self, name: str, bias: Tensor | None) -> Tensor | None:
        return bias / self.rows[name] if bias is not None and name in self.rows else bias

    def moments(self, group: InputGroup, moments: Moments) -> Moments:
        """Those of the scaled inputs."""
        scale = self.columns.get(group.names[0])
        if scale is None:
            return moments
        cross = None if moments.cross is None else moments.cross / scale
        gram = awq.scaled_hessian(moments.gram, scale)
        return replace(moments, gram=gram, mean=moments.mean / scale, cross=cross)

    def originals(self, originals: Originals) -> Originals:
        """The scaled block's."""
        return Originals(
            originals.schemes,
            lambda name: self.weight(name, originals.weight(name)),
            lambda name: self.bias(name, originals.bias(name)),
            originals.other,
        )

    def put(self, block: Block, originals: Originals) -> None:
        """Into the running block."""
        scaled = self.originals(originals)
        for name in self.columns.keys() | self.rows.keys():
            put_weight(block, name, scaled.weight(name))
        for name in self.rows:
            bias = scaled.bias(name)
            if bias is not None:
                put_other(block, f"{name}.bias", bias)
        for name, tensor in self.norms.items():
            put_other(block, name, tensor)


def usable(folds: list[Fold], block: Block, schemes: Mapping[str, object]) -> list[Fold]:
    """Folds between linears that are quantized and norms: others have no place for their scales."""
    return [
        fold
        for fold in folds
        if schemes.keys() >= set(fold.consumers)
        and (fold.producer in schemes or not is_linear(block.linear(fold.producer)))
    ]


def folded(fold: Fold, scale: Tensor, block: Block, originals: Originals) -> Scaling:
    """One fold's part in a block: ``scale`` [in] as :func:`stored_scale` made it."""
    producer = block.linear(fold.producer)
    parameters = dict(producer.named_parameters(recurse=False))
    scaling = Scaling(columns=dict.fromkeys(fold.consumers, scale))
    if is_linear(producer):
        count = len(originals.weight(fold.producer))
        scaling.rows[fold.producer] = fold.per_output(scale, count)
        return scaling
    for name in parameters:
        value, dtype = originals.other(f"{fold.producer}.{name}")
        offset = (fold.offset or 0.0) if name == "weight" else 0.0
        scaling.norms[f"{fold.producer}.{name}"] = _divided(value, scale, offset, dtype)
    return scaling


def _divided(value: Tensor, scale: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    return ((value + offset) / scale - offset).to(dtype)


def stored_scale(fold: Fold, originals: Originals) -> Callable[[Tensor], Tensor]:
    """Scales -> the ones whose inverse the file will hold. A norm's weight is stored in 16 bits;
    what rounding it changes is a scale too, and goes into the linears exactly. A scale that would
    leave nothing of a norm's weight, or is of none, is 1."""
    if fold.offset is None:
        return lambda scale: scale
    offset = fold.offset
    value, dtype = originals.other(f"{fold.producer}.weight")

    def nearest(scale: Tensor) -> Tensor:
        got = (value + offset) / (_divided(value, scale, offset, dtype).float() + offset)
        return torch.where(got.isfinite() & (got > 0), got, torch.ones_like(got))

    return nearest


def combined(scalings: list[Scaling]) -> Scaling:
    """Several folds of one block. A linear is a consumer once and a producer once at most."""
    result = Scaling()
    for scaling in scalings:
        result.columns |= scaling.columns
        result.rows |= scaling.rows
        result.norms |= scaling.norms
    return result


@torch.no_grad()
def improves(
    block: Block,
    scaling: Scaling,
    names: tuple[str, ...],
    originals: Originals,
    rounding: Callable[[str, Tensor, Tensor | None], Tensor],
    sample: list[Tensor],
    wanted: list[Tensor],
) -> tuple[bool, float]:
    """Whether the block's output, with the linears ``names`` rounded, is nearer to ``wanted`` when
    they are scaled before; and the squared error relative to what it is without scales.
    ``rounding(name, weight, scale)`` rounds one."""
    lost = []
    for some in (Scaling(), scaling):
        scaled = some.originals(originals)
        with block.restoring():
            some.put(block, originals)
            for name in names:
                put_weight(block, name, rounding(name, scaled.weight(name), some.columns.get(name)))
            pairs = zip(sample, wanted)
            lost.append(sum(float((block.forward(x) - y).float().square().sum()) for x, y in pairs))
    before, after = lost
    return after < before, after / before if before else 1.0
