"""The walk: a causal LM run one decoder block at a time, with nothing else in memory.

No architecture is known by name. The decoder blocks are the module list that is as long as the
config says; each block's arguments are recorded while the model runs with its blocks replaced by
recorders; and which linears share an input is seen by tracing one small batch. So the walk works on
whatever transformers can build.

    walk = Walk(skeleton)
    hidden = walk.embed(batches)               # in front of the first block
    for index in range(len(walk)):
        with walk.block(index) as block:       # its weights are in memory in here
            for i, x in enumerate(hidden):
                hidden[i] = block.forward(x)
    for logits in walk.logits(batches, hidden):
        ...
"""

from collections.abc import Collection, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantkit.errors import QuantkitError
from quantkit.runtime import exits
from quantkit.runtime.exits import Exit
from quantkit.runtime.experts import all_reached, routed
from quantkit.runtime.skeleton import Skeleton

_PROBE_TOKENS = 32


class _Stop(Exception):
    """Leaves a forward pass once everything wanted has been seen."""


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

    def trace(self, sample: Tensor) -> list[InputGroup]:
        """Which linears share inputs, in the order of their calls. ``sample`` is any hidden state;
        a short piece of it is run, on which every expert is called.

        ``closes`` is found by numbers: noise added to the linear's output must come out of the
        block as it went in. So is ``exit``: such noise must not come into others' inputs, and with
        all such ways taken the block gives what it gives without.
        """
        piece = sample[:1, :_PROBE_TOKENS]
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
        if not given:
            return groups
        leaving = {replace(g, exit=ways.get(g.names[0])): x for g, x in given.items()}
        with self.shortened(leaving):
            off = (self.forward(piece) != output).float().mean()
        effects = [self._effects(group, piece, output, given) for group in given]
        # a GPU is waited for once
        numbers = torch.stack([torch.cat([off[None], each]) for each in effects]).tolist()
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
        self, group: InputGroup, piece: Tensor, output: Tensor, given: dict[InputGroup, Tensor]
    ) -> Tensor:
        """How far noise that is added to a writer's output comes out of the block changed; and the
        share that it changes of each writer's input, which was what is ``given``."""
        # a power of two near the output's size, so that bf16 sums stay comparable
        size = output.float().pow(2).mean().sqrt()
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(output.shape, generator=generator).to(output.device) * size
        noise = noise.to(output.dtype)
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


class Walk:
    """Runs batches of token ids (int64 [rows, tokens] each) through a skeleton, block by block."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.prefix, self._blocks = find_blocks(skeleton.model)
        self._calls: list[dict[tuple[int, int], Call]] = [{} for _ in self._blocks]
        self._tuples = False  # blocks of some architectures return a tuple, or a list

    def __len__(self) -> int:
        return len(self._blocks)

    def block_name(self, index: int) -> str:
        return f"{self.prefix}.{index}"

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear of the blocks, by its name in the model."""
        return {
            f"{self.prefix}.{name}": features(module)
            for name, module in self._blocks.named_modules()
            if is_linear(module)
        }

    @contextmanager
    def block(self, index: int) -> Iterator[Block]:
        """Block ``index``, its weights in memory until the context ends."""
        module = self._blocks[index]
        self.skeleton.fill([self.block_name(index)])
        try:
            with torch.no_grad():
                yield Block(self.block_name(index), module, self._calls[index])
        finally:
            self.skeleton.empty(module)

    def embed(self, batches: list[Tensor]) -> list[Tensor]:
        """Hidden states in front of the first block, one tensor [rows, tokens, width] a batch.
        Also records what every block is called with."""
        return list(self.embedding(batches))

    @torch.no_grad()
    def embedding(self, batches: list[Tensor]) -> Generator[Tensor, None, None]:
        """What :meth:`embed` gives, a batch at a time. Nothing else may be run before the end."""
        with self.surroundings():
            self._tuples = self._returns_tuple(batches[0][:1, :4])
            self._refuse_text_arguments()
            # what Block.trace runs, whichever batch it is given a piece of
            pieces = {piece.shape: piece for piece in (b[:1, :_PROBE_TOKENS] for b in batches)}
            for piece in pieces.values():
                self._record(piece)
            for batch in batches:
                yield self._record(batch)

    def logits(self, batches: list[Tensor], hidden: Iterable[Tensor]) -> Iterator[Tensor]:
        """The model's predictions [rows, tokens, vocabulary] from hidden states behind the last
        block, a batch at a time."""
        with self.surroundings(head=True):
            for batch, state in zip(batches, hidden):
                yield self.predicted(batch, state)

    @torch.no_grad()
    def predicted(
        self, batch: Tensor, state: Tensor, head: dict[str, nn.Parameter] | None = None
    ) -> Tensor:
        """The predictions of one batch, while the surroundings and their head are in memory.
        ``head``: parameters that the output head has instead of its own."""
        with self._headed(head or {}):
            found: Tensor = self._behind(batch, state).logits
        return found

    @torch.no_grad()
    def head_inputs(self, batches: list[Tensor], hidden: Iterable[Tensor]) -> Iterator[Tensor]:
        """What the output head is given [rows, tokens, width], from hidden states behind the last
        block, a batch at a time. The head itself is not read."""
        seen: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Tensor]) -> None:
            seen.append(args[0])
            raise _Stop

        with self.surroundings():
            for batch, state in zip(batches, hidden):
                handle = find_head(self.skeleton.model)[1].register_forward_pre_hook(stop)
                try:
                    self._behind(batch, state)
                except _Stop:
                    pass
                finally:
                    handle.remove()
                yield seen.pop()

    def _behind(self, batch: Tensor, state: Tensor) -> Any:
        """Run the model with ``state`` for what its blocks make of ``batch``."""
        for block in self._blocks:
            block.forward = lambda *args, **kwargs: (state,) if self._tuples else state
        try:
            ids = batch.to(self.skeleton.device)
            return self.skeleton.model(input_ids=ids, use_cache=False)
        finally:
            for block in self._blocks:
                del block.forward

    @contextmanager
    def _headed(self, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
        """While open, the output head has these parameters."""
        if not parameters:
            yield
            return
        _, head = find_head(self.skeleton.model)
        own = dict(head._parameters)
        head._parameters.update(parameters)
        try:
            yield
        finally:
            head._parameters.update(own)

    @contextmanager
    def surroundings(self, head: bool = False) -> Iterator[None]:
        """Everything outside of the blocks in memory; the output head only when asked for."""
        model = self.skeleton.model
        skipped = None if head else model.get_output_embeddings()
        outside = {
            name: module
            for name, module in model.named_modules()
            if not name.startswith(self.prefix + ".")
            and any(parameter is not None for parameter in module._parameters.values())
        }
        self.skeleton.fill(name for name, module in outside.items() if module is not skipped)
        try:
            yield
        finally:
            for module in outside.values():
                self.skeleton.empty(module)

    def _returns_tuple(self, batch: Tensor) -> bool:
        """Whether blocks return a tuple, seen by running the first one on a few tokens."""
        result: list[Any] = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            result.append(output)
            raise _Stop

        with self.block(0):
            handle = self._blocks[0].register_forward_hook(stop)
            try:
                self._run(batch)
            finally:
                handle.remove()
        return isinstance(result[0], (tuple, list))

    def _refuse_text_arguments(self) -> None:
        """Blocks are called with what was recorded for a shape, whatever the tokens are. So refuse
        models whose blocks also get something made from the tokens (per-layer embeddings), or from
        what the blocks before them were given."""
        found = []
        for token in (0, 1):
            for calls in self._calls:
                calls.clear()  # so that every block is reached
            self._record(torch.full((1, 4), token))
            found.append([vars(calls[1, 4]) for calls in self._calls])
        if not all(torch.equal(a, b) for a, b in zip(*map(_tensors, found), strict=True)):
            raise QuantkitError(
                f"the blocks of {type(self.skeleton.model).__name__} take more of the text than "
                "their hidden states, which quantkit does not support yet",
                "please report the architecture",
            )

    def _record(self, batch: Tensor) -> Tensor:
        """Run the model on ``batch`` with recorders for blocks -> hidden states for block 0. Once
        the calls for this shape are known, only the first block is reached."""
        shape = (batch.shape[0], batch.shape[1])
        known = shape in self._calls[-1]
        first: list[Tensor] = []

        def recorder(index: int) -> Any:
            def record(*args: Any, **kwargs: Any) -> Any:
                if args:
                    hidden, args = args[0], args[1:]
                else:
                    hidden = kwargs.pop("hidden_states")
                if index == 0:
                    first.append(hidden)
                elif hidden is not first[0] and not torch.equal(hidden, first[0]):
                    raise self._not_one_by_one("their outputs are changed on the way to the next")
                self._calls[index][shape] = Call(args, kwargs)
                if known or index == len(self._blocks) - 1:
                    raise _Stop
                return (hidden,) if self._tuples else hidden

            return record

        for index, block in enumerate(self._blocks):
            block.forward = recorder(index)
        try:
            self._run(batch)
        finally:
            for block in self._blocks:
                del block.forward
        return first[0]

    def _run(self, batch: Tensor) -> None:
        try:
            self.skeleton.model(input_ids=batch.to(self.skeleton.device), use_cache=False)
        except _Stop:
            return
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            # its own code wants more than hidden states from a block (a router's or an RNN's state)
            raise self._not_one_by_one(str(error).partition("\n")[0]) from error
        raise QuantkitError("the model's forward pass does not go through its decoder blocks")

    def _not_one_by_one(self, reason: str) -> QuantkitError:
        kind = type(self.skeleton.model).__name__
        return QuantkitError(
            f"the blocks of {kind} cannot be run one by one: {reason}",
            "please report the architecture",
        )


def _hidden(output: Any) -> Tensor:
    result = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(result, Tensor)
    return result


def _tensors(value: Any) -> list[Tensor]:
    """The tensors inside of nested tuples, lists and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def _in_float32(value: Any) -> Any:
    """The same with all floating-point tensors inside in float32."""
    if isinstance(value, dict):
        return {key: _in_float32(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_in_float32(part) for part in value)
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The module list of the decoder blocks and its name: as long as the config says, and holding
    the most parameters. Raises QuantkitError when there is none."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    depth = config.num_hidden_layers
    lists = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not lists:
        raise QuantkitError(
            f"no list of {depth} decoder blocks was found in {type(model).__name__}",
            "please report the architecture",
        )
    _, name, module = max(lists, key=lambda entry: entry[0])
    return name, module


def find_head(model: nn.Module) -> tuple[str, nn.Module]:
    """The output head and its name. Raises QuantkitError when there is none."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if module is head:
            return name, module
    raise QuantkitError(
        f"no output head was found in {type(model).__name__}", "please report the architecture"
    )


def is_linear(module: nn.Module) -> bool:
    """Whether this gives a product with its weight: not what inherits from a linear and returns
    several things, as Phi-MoE's router says that it does."""
    returned = type(module).forward.__annotations__.get("return", Tensor)
    return isinstance(module, (nn.Linear, Conv1D)) and "tuple" not in str(returned)


def features(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear or of GPT-2's transposed Conv1D."""
    out, width = module.weight.shape  # type: ignore[misc]
    return (width, out) if isinstance(module, Conv1D) else (out, width)
