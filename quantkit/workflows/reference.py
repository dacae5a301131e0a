"""The original of a verification, with a block in memory at a time.

Any checkpoint that quantkit loads can be one: quantized linears are multiplied out block by block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit.core.source import Source
from quantkit.runtime.block import Block
from quantkit.runtime.opened import open_checkpoint
from quantkit.runtime.unpacked import unpacked_skeleton
from quantkit.runtime.walk import Walk
from quantkit.workflows import whole
from quantkit.workflows.candidate import Candidate
from quantkit.workflows.sizes import bytes_of

_TRACED = 4  # rows whose inputs the layers' errors are measured on


class Reference:
    """``source``, and ``batches`` of token ids ([1, tokens] each) that go through it."""

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        self.source = source
        self.opened = open_checkpoint(source)
        self.skeleton = unpacked_skeleton(self.opened, device, dtype)
        self.tokenizer = self.opened.tokenizer()
        self.walk = Walk(self.skeleton)
        self.bytes = bytes_of(self.opened)
        self.batches: list[Tensor] = []
        self._hidden: list[Tensor] = []  # in front of the next block
        self._written: list[list[int]] | str | None = None

    def run(self, candidates: list[Candidate]) -> Iterator[str]:
        """Take all rows through all blocks, the candidates beside; yields the name of each block
        that is behind them. Of every model one block at most is in memory, and of the candidates
        one at all."""
        self._hidden = self.walk.embed(self.batches)
        self.opened.release()
        for index in range(len(self.walk)):
            with self.walk.block(index) as block:
                self._advance(index, block, candidates)
            self.opened.release()
            yield self.walk.block_name(index)

    def _advance(self, index: int, block: Block, candidates: list[Candidate]) -> None:
        """Every candidate sees the few rows again that layers are compared on; the last one's are
        taken along."""
        every = max(1, len(self.batches) // _TRACED)
        traced = {i: self._hidden[i] for i in range(0, len(self.batches), every)}
        found: dict[int, Tensor] = {}
        for candidate in candidates:
            found = candidate.step(index, block, traced)
        for i, state in enumerate(self._hidden):
            state.copy_(found[i] if i in found else block.forward(state))

    def logits(self) -> Iterator[Tensor]:
        """Predictions for every batch, [tokens, vocabulary]; behind ``run``."""
        for found in self.walk.logits(self.batches, self._hidden):
            yield found[0]
        self.opened.release()

    def written(self) -> list[list[int]] | str:
        """What it writes behind the prompts, or why there is nothing (see whole.py)."""
        if self._written is None:
            self._written = whole.continued(
                "the original", self.opened, self._in_memory(), self.tokenizer, self.skeleton
            )
        return self._written

    def _in_memory(self) -> int:
        """Bytes of the whole original, about."""
        if self.opened.linears:
            return self.bytes
        parameters = sum(parameter.numel() for parameter in self.skeleton.model.parameters())
        return int(parameters * self.skeleton.dtype.itemsize)
