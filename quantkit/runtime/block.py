"""One decoder block, with its weights in memory: it runs, is watched while it does, and says which
of its linears share an input.

    with walk.block(index) as block:
        groups = block.trace(hidden)           # a piece of the hidden states is run
        with block.watching({name: see}):      # see(x) with every input of that linear
            block.forward(hidden)
"""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantkit.core import pinned
from quantkit.runtime import exits
from quantkit.runtime.exits import Exit
from quantkit.runtime.experts import all_reached, routed

PROBE_TOKENS = 32  # of the piece that is traced


@dataclass(frozen=True)
class Call:
    """The arguments of a block beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class InputGroup:
    """Linears of one block that receive the very same input tensor, in the order of their calls.

    names      inside the block, such as ``self_attn.q_proj``
    width      input features
    writes     a single linear as wide as the residual stream: it adds to it (attention output, MLP
               output); the others read from it
    closes     its output reaches the block's output unchanged (see Block.trace)
    routed     only some tokens go there: to an expert. Those never count as writers
    exit       how a writer's output leaves the block, if nothing that other writers put out comes
               into its input (see Block.shortened)
    """

    names: tuple[str, ...]
    width: int
    writes: bool = False
    closes: bool = False
    routed: bool = False
    exit: Exit | None = None

    def only(self, names: Collection[str]) -> "InputGroup | None":
        """The part of the group that is in ``names``."""
        some = tuple(name for name in self.names if name in names)
        return replace(self, names=some) if some else None


class Block:
    """One decoder block with its weights in memory."""

    def __init__(self, name: str, module: nn.Module, calls: dict[tuple[int, int], Call]) -> None:
        self.name, self.module = name, module
        self._calls = calls

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [rows, tokens, width] -> the block's output, same shape."""
        call = self._calls[hidden.shape[0], hidden.shape[1]]
        return _hidden(self.module(hidden, *call.args, **call.kwargs))

    def linear(self, name: str) -> nn.Module:
        return self.module.get_submodule(name)

    @contextmanager
    def watching(self, hooks: dict[str, Any], outputs: bool = False) -> Iterator[None]:
        """While open, call ``hooks[name](tensor)`` with the input of each named linear, or with
        its input and output: ``hooks[name](x, y)``."""
        handles = []
        for name, hook in hooks.items():
            if outputs:
                handles.append(
                    self.linear(name).register_forward_hook(
                        lambda module, args, result, hook=hook: hook(args[0], result)
                    )
                )
            else:
                handles.append(
                    self.linear(name).register_forward_pre_hook(
                        lambda module, args, hook=hook: hook(args[0])
                    )
                )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def shortened(self, kept: dict[InputGroup, Tensor]) -> AbstractContextManager[None]:
        """While open, what leads to the inputs of these writers, which have an ``exit``, is not
        computed: they are given the ones that are kept, [rows, tokens, width]."""
        ways = {group.names[0]: (group.exit, x) for group, x in kept.items() if group.exit}
        return exits.shortened(self.module, ways)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """When this ends, every parameter is the one that it was."""
        kept = [(module, dict(module._parameters)) for module in self.module.modules()]
        try:
            yield
        finally:
            for module, parameters in kept:
                module._parameters.update(parameters)

    def exact(self) -> "Block":
        """A copy that computes in float32, from float32 hidden states."""
        calls = {
            shape: Call(_in_float32(call.args), _in_float32(call.kwargs))
            for shape, call in self._calls.items()
        }
        return Block(self.name, deepcopy(self.module).float(), calls)

    def trace(self, sample: Tensor, ends: bool = True) -> list[InputGroup]:
        """Which linears share inputs, in the order of their calls. ``sample`` is any hidden state;
        a short piece of it is run, on which every expert is called.

        With ``ends`` it is run some more to find ``closes`` and ``exit``, by numbers: noise added
        to a linear's output must come out of the block as it went in; it must not come into others'
        inputs, and with all such ways taken the block gives what it gives without.
        """
        piece = sample[:1, :PROBE_TOKENS]
        seen: dict[int, list[str]] = {}
        inputs: list[Tensor] = []

        def note(name: str, x: Tensor) -> None:
            for key, known in enumerate(inputs):
                if known is x or (known.data_ptr() == x.data_ptr() and known.shape == x.shape):
                    if name not in seen[key]:
                        seen[key].append(name)
                    return
            inputs.append(x)  # keeping it alive keeps its address unique
            seen[len(inputs) - 1] = [name]

        names = [name for name, module in self.module.named_modules() if is_linear(module)]
        watching = self.watching({n: lambda x, n=n: note(n, x) for n in names})
        with all_reached(self.module), watching, exits.watched(self.module, names) as ways:
            output = self.forward(piece)
        experts = routed(self.module)
        groups = [
            InputGroup(
                tuple(members),
                inputs[key].shape[-1],
                writes=len(members) == 1
                and members[0] not in experts
                and features(self.linear(members[0]))[0] == output.shape[-1],
                routed=members[0] in experts,
            )
            for key, members in seen.items()
        ]
        given = {group: x for group, x in zip(groups, inputs) if group.writes}
        return self._with_ends(groups, given, ways, piece, output) if ends and given else groups

    def _with_ends(
        self,
        groups: list[InputGroup],
        given: dict[InputGroup, Tensor],
        ways: dict[str, Exit],
        piece: Tensor,
        output: Tensor,
    ) -> list[InputGroup]:
        """The groups with ``closes`` and ``exit``. ``given``: writers' inputs, as ``piece`` was run
        and gave ``output``; ``ways`` that their outputs may take."""
        leaving = {replace(g, exit=ways.get(g.names[0])): x for g, x in given.items()}
        with self.shortened(leaving):
            off = (self.forward(piece) != output).float().mean()
        noise = _noise_like(output)
        effects = [self._effects(group, piece, output, noise, given) for group in given]
        # a GPU is waited for once
        numbers = pinned.numbers(torch.stack([torch.cat([off[None], each]) for each in effects]))
        closing = {group for group, (_, distance, *_) in zip(given, numbers) if distance < 0.05}
        reached = {
            other
            for group, (_, _, *changed) in zip(given, numbers)
            for other, share in zip(given, changed)
            if share and other is not group
        }
        like = piece.dtype, piece.shape[:-1]
        fit = {group for group, x in given.items() if (x.dtype, x.shape[:-1]) == like} - reached
        if numbers[0][0]:
            fit.clear()
        return [
            replace(
                group,
                closes=group in closing,
                exit=ways.get(group.names[0]) if group in fit else None,
            )
            for group in groups
        ]

    def _effects(
        self,
        group: InputGroup,
        piece: Tensor,
        output: Tensor,
        noise: Tensor,
        given: dict[InputGroup, Tensor],
    ) -> Tensor:
        """How far noise that is added to a writer's output comes out of the block changed; and the
        share that it changes of each writer's input, which was what is ``given``."""
        changed = {}

        def compare(other: InputGroup, x: Tensor) -> None:
            changed[other] = (x != given[other]).float().mean()

        handle = self.linear(group.names[0]).register_forward_hook(
            lambda module, args, result: result + noise.reshape(result.shape)
        )
        try:
            with self.watching({g.names[0]: lambda x, g=g: compare(g, x) for g in given}):
                change = self.forward(piece).float() - output.float()
        finally:
            handle.remove()
        distance: Tensor = (change - noise.float()).norm() / noise.float().norm()
        return torch.stack([distance, *[changed[other] for other in given]])


def _noise_like(output: Tensor) -> Tensor:
    """The same for every output of one size, and as large as that, so that bf16 sums stay
    comparable."""
    size = output.float().pow(2).mean().sqrt()
    return (_noise(output.shape, output.device) * size).to(output.dtype)


@lru_cache(1)
def _noise(shape: torch.Size, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def _hidden(output: Any) -> Tensor:
    result = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(result, Tensor)
    return result


def _in_float32(value: Any) -> Any:
    """The same with all floating-point tensors inside in float32."""
    if isinstance(value, dict):
        return {key: _in_float32(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_in_float32(part) for part in value)
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def is_linear(module: nn.Module) -> bool:
    """Whether this gives a product with its weight: not what inherits from a linear and returns
    several things, as Phi-MoE's router says that it does."""
    returned = type(module).forward.__annotations__.get("return", Tensor)
    return isinstance(module, (nn.Linear, Conv1D)) and "tuple" not in str(returned)


def features(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear or of GPT-2's transposed Conv1D."""
    out, width = module.weight.shape  # type: ignore[misc]
    return (width, out) if isinstance(module, Conv1D) else (out, width)
