"""Mixtures of experts taken apart: a linear for every projection of every expert.

transformers holds the experts of a block in two tensors [experts, out, in], which it puts together
from the checkpoint's many. Here every expert is a module of linears again, called as they are on
disk, so that each has statistics of its own, is rounded by itself and computes from packed codes.
Which tensors are put together, transformers' conversion tables tell, so that no architecture is
known by name; what a gate does with its input is asked of transformers' module.

A model is left as it is where its checkpoint holds experts in one tensor, and where they have
biases, lie transposed or have no gate.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

Names = tuple[str, str, str]
_FUSED = ("gate_up_proj", "down_proj")  # as transformers calls them, in this order
_ONE = re.compile(r"\\?\.\*\.(\w+)\.weight$")  # one tensor of many, at the end of a pattern


class Expert(nn.Module):
    """``names`` are those of its linears: gate, up, down."""

    def __init__(self, names: Names, hidden: int, inner: int, like: Tensor) -> None:
        super().__init__()
        self._names = names
        for name, (out, width) in zip(names, ((inner, hidden), (inner, hidden), (hidden, inner))):
            made = nn.Linear(width, out, bias=False, device=like.device, dtype=like.dtype)
            self.add_module(name, made.requires_grad_(False))

    def forward(self, x: Tensor, gated: Callable[[Tensor], Tensor]) -> Tensor:
        """[tokens, hidden] -> the same shape."""
        gate, up, down = (self.get_submodule(name) for name in self._names)
        result: Tensor = down(gated(torch.cat((gate(x), up(x)), -1)))
        return result


class Experts(nn.Module):
    """In the place of a module of transformers', and called like it. ``reach_all``: every expert is
    called, those that no token goes to on one of them, for nothing."""

    def __init__(self, fused: nn.Module, names: Names) -> None:
        super().__init__()
        like = getattr(fused, _FUSED[1])
        self.count, hidden, inner = like.shape
        for name in _FUSED:  # what is left knows about gates
            delattr(fused, name)
        self.gates, self.reach_all = fused, False
        for number in range(self.count):
            self.add_module(str(number), Expert(names, hidden, inner, like))

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """hidden [tokens, width], the experts of each token and their weights [tokens, some] ->
        [tokens, width]. An index behind the last expert is none."""
        result = torch.zeros_like(hidden)
        gated: Any = self.gates._apply_gate
        for number, places in enumerate(self._places(index)):
            expert = self.get_submodule(str(number))
            if len(places):
                tokens, which = places // index.shape[1], places % index.shape[1]
                found = expert(hidden[tokens], gated) * weights[tokens, which, None]
                result.index_add_(0, tokens, found.to(result.dtype))
            elif self.reach_all:
                expert(hidden[:1].clone(), gated)
        return result

    def _places(self, index: Tensor) -> tuple[Tensor, ...]:
        """For every expert, which entries of ``index`` name it."""
        flat = index.reshape(-1)
        if flat.is_meta:  # nobody knows: all of them as many
            return torch.empty_like(flat).tensor_split(self.count)
        # waits for the device once
        counts = flat.bincount(minlength=self.count + 1).tolist()
        parts: tuple[Tensor, ...] = flat.argsort(stable=True).split(counts)
        return parts[: self.count]


def take_apart(model: PreTrainedModel, conversions: list[Any], disk: Iterable[str]) -> list[Any]:
    """Give ``model``, which has no weights yet, :class:`Experts` in every place where ``disk``, the
    names of tensors or of packed weights, has experts one by one. Returns the conversions that
    remain."""
    sources = [found for target in _FUSED for found in _sources(conversions, target)]
    names = [name for _, some in sources for name in some]
    fused = [(place, module) for place, module in model.named_modules() if _separable(module)]
    if len(names) != 3 or not fused:
        return conversions
    single = re.compile(rf"experts\.\d+\.({'|'.join(names)})(\.|$)")
    if not any(single.search(name) for name in disk):
        return conversions
    gate, up, down = names
    for place, module in fused:
        parent, _, own = place.rpartition(".")
        setattr(model.get_submodule(parent), own, Experts(module, (gate, up, down)))
    used = {id(converter) for converter, _ in sources}
    return [c for c in conversions if id(c) not in used]


def _sources(conversions: list[Any], target: str) -> list[tuple[WeightConverter, list[str]]]:
    """The conversion that makes the experts' ``target``, and the last names of what goes in."""
    found = []
    for converter in conversions:
        if not isinstance(converter, WeightConverter):
            continue
        if [t.rpartition(".")[2] for t in converter.target_patterns] != [target]:
            continue
        matches = [_ONE.search(pattern) for pattern in converter.source_patterns]
        if matches and all(matches):
            found.append((converter, [match[1] for match in matches if match]))
    return found


def _separable(module: nn.Module) -> bool:
    """Whether this is a module of transformers' that :class:`Experts` can stand for."""
    usual = {
        "has_gate": True,
        "has_bias": False,
        "is_transposed": False,
        "is_concatenated": True,
        "has_post_expert_norm": False,
    }
    return set(module._parameters) == set(_FUSED) and all(
        getattr(module, name, None) is value for name, value in usual.items()
    )


def routed(block: nn.Module) -> set[str]:
    """Names of the linears that only some tokens go to."""
    return {
        f"{place}.{inner}"
        for place, experts in block.named_modules()
        if isinstance(experts, Experts)
        for inner, module in experts.named_modules()
        if hasattr(module, "weight")
    }


@contextmanager
def all_reached(block: nn.Module) -> Iterator[None]:
    """While open, every expert of the block is called, whichever tokens there are."""
    experts = [module for module in block.modules() if isinstance(module, Experts)]
    for module in experts:
        module.reach_all = True
    try:
        yield
    finally:
        for module in experts:
            module.reach_all = False
