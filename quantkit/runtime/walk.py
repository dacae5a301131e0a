"""The walk: a causal LM run one decoder block at a time, with nothing else in memory.

No architecture is known by name. The decoder blocks are the module list that is as long as the
config says; each block's arguments are recorded while the model runs with its blocks replaced by
recorders; and which linears share an input is seen by tracing one small batch (block.py). So the
walk works on whatever transformers can build.

    walk = Walk(skeleton)
    hidden = walk.embed(batches)               # in front of the first block
    for index in range(len(walk)):
        with walk.block(index) as block:       # its weights are in memory in here
            for i, x in enumerate(hidden):
                hidden[i] = block.forward(x)
    for logits in walk.logits(batches, hidden):
        ...
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import QuantkitError
from quantkit.runtime.block import PROBE_TOKENS, Block, Call, features, is_linear
from quantkit.runtime.skeleton import Skeleton


class _Stop(Exception):
    """Leaves a forward pass once everything wanted has been seen."""


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
            pieces = {piece.shape: piece for piece in (b[:1, :PROBE_TOKENS] for b in batches)}
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


def _tensors(value: Any) -> list[Tensor]:
    """The tensors inside of nested tuples, lists and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


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
