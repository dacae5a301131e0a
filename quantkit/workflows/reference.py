"""The original of a verification: its predictions computed once, with a block in memory at a time.

Any checkpoint that quantkit loads can be one: quantized linears are multiplied out block by block.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from quantkit.core.source import Source
from quantkit.runtime.load import load_model
from quantkit.runtime.opened import open_checkpoint
from quantkit.runtime.unpacked import unpacked_skeleton
from quantkit.runtime.walk import Walk
from quantkit.workflows import divergence
from quantkit.workflows.layer_errors import LayerErrors
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
        self._last: list[Tensor] = []  # hidden states behind the last block
        self._written: list[list[int]] | None = None

    def layers(
        self, other: nn.Module, name: str, done: Callable[[int, str], None]
    ) -> dict[str, dict[str, float | None]]:
        """What the linears of ``other``, called ``name``, lose (see LayerErrors) on a few of the
        rows. The first time all rows are taken along, for ``logits``."""
        every = max(1, len(self.batches) // _TRACED)
        traced = set(range(0, len(self.batches), every))
        if self._last:
            batches = [self.batches[i] for i in sorted(traced)]
            traced = set(range(len(batches)))
        else:
            batches = self.batches
        hidden = self.walk.embed(batches)
        found: dict[str, dict[str, float | None]] = {}
        for index in range(len(self.walk)):
            with self.walk.block(index) as block:
                errors = LayerErrors(block, other, (name, self.source.name))
                for i, state in enumerate(hidden):
                    with errors.measuring() if i in traced else nullcontext():
                        hidden[i] = block.forward(state)
                found |= errors.described()
            self.opened.release()
            done(index + 1, self.walk.block_name(index))
        self._last = self._last or hidden
        return found

    def logits(self) -> Iterator[Tensor]:
        """Predictions for every batch, [1, tokens, vocabulary]; behind ``layers``."""
        return self.walk.logits(self.batches, self._last)

    def written(self) -> list[list[int]] | str:
        """Greedy continuations, or why there are none: they need the whole original, so they are
        only made where there is room for it."""
        if self._written is None:
            needed = int(1.2 * self._in_memory())
            free = psutil.virtual_memory().available
            if self.skeleton.device.type == "cuda":
                free = torch.cuda.mem_get_info(self.skeleton.device)[0]
            if free < needed:
                return (
                    f"no continuations: the original needs {needed / 1e9:.1f} GB, "
                    f"{free / 1e9:.1f} GB are free"
                )
            model: Any = load_model(self.source, self.skeleton.device, self.skeleton.dtype)
            self._written = divergence.continued(
                divergence.greedy(model, self.tokenizer), self.tokenizer
            )
        return self._written

    def _in_memory(self) -> int:
        """Bytes of the whole original, about."""
        if self.opened.linears:
            return self.bytes
        parameters = sum(parameter.numel() for parameter in self.skeleton.model.parameters())
        return parameters * self.skeleton.dtype.itemsize
