"""A model that is measured: run block by block beside its original, in the layers of the loaded
model, so that what is measured is what will run."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from quantkit.core.source import Source
from quantkit.errors import QuantkitError
from quantkit.runtime import gather
from quantkit.runtime.linear import multiplied_out
from quantkit.runtime.opened import open_checkpoint
from quantkit.runtime.quant_skeleton import QuantSkeleton
from quantkit.runtime.walk import Block, Walk
from quantkit.workflows import divergence, whole
from quantkit.workflows.engine import LLAMA_CPP, TORCH, llama_cpp_for
from quantkit.workflows.layer_errors import LayerErrors
from quantkit.workflows.sizes import Census

GIVE_IT = "give the model that was quantized with --against"


class Candidate:
    """``source``, compared with ``original`` (its name and walk) on ``batches`` of token ids
    ([1, tokens] each). ``engine``: what predicts, see engine.py.

    layers   by linear, what LayerErrors finds
    census   what its memory holds

    Raises QuantkitError when it cannot be run, or was not made from the original.
    """

    def __init__(
        self, source: Source, original: Source, walk: Walk, batches: list[Tensor], engine: str
    ) -> None:
        self.opened = open_checkpoint(source)
        self._names = source.name, original.name
        self._batches = batches
        skeleton = QuantSkeleton(self.opened, walk.skeleton.device, walk.skeleton.dtype)
        self.walk = Walk(skeleton)
        self._refuse_another(walk)
        self._llama = llama_cpp_for(engine, self.opened)
        self.engine = TORCH if self._llama is None else LLAMA_CPP
        self.layers: dict[str, dict[str, float | None]] = {}
        self.census = Census(skeleton.model)
        self._hidden: list[Tensor] = []

    def begin(self) -> None:
        """Look at what is outside of the blocks, and take all rows to the first one."""
        with self.walk.surroundings(head=True):
            self.census.see()
        if self._llama is None:
            self._hidden = self.walk.embed(self._batches)
        self.opened.release()

    def step(self, index: int, original: Block, traced: dict[int, Tensor]) -> dict[int, Tensor]:
        """Through block ``index``. The original's block runs the inputs ``traced``, so that its
        linears are compared, and what it makes of them is returned."""
        with self.walk.block(index) as own:
            self.census.see()
            with multiplied_out(own.module):
                errors = LayerErrors(original, own)
                with errors.measuring():
                    found = {i: original.forward(x) for i, x in traced.items()}
                gather.advance(own, self._hidden)
            self.layers |= errors.described()
        self.opened.release()
        return found

    def logits(self) -> Iterator[Tensor]:
        """Predictions for every batch, [tokens, vocabulary]; once, behind the last ``step``."""
        if self._llama is not None:
            yield from (self._llama.logits(batch[0]) for batch in self._batches)
            return
        hidden, self._hidden = self._hidden, []
        for found in self.walk.logits(self._batches, hidden):
            yield found[0]

    def written(self, tokenizer: Any) -> list[list[int]] | str:
        """What it writes behind the prompts, or why there is nothing (see whole.py)."""
        if self._llama is not None:
            return divergence.continued(self._llama.write, tokenizer)
        size = self.census.bytes
        return whole.continued(self._names[0], self.opened, size, tokenizer, self.walk.skeleton)

    def close(self) -> None:
        """Let go of llama.cpp."""
        if self._llama is not None:
            self._llama.close()

    def _refuse_another(self, original: Walk) -> None:
        """What shows before anything runs: other words, other linears."""
        mine, its = (one.skeleton.config.get_text_config() for one in (self.walk, original))
        if mine.vocab_size != its.vocab_size:
            names = " and ".join(self._names)
            raise QuantkitError(f"{names} have different vocabularies", GIVE_IT)
        ours, theirs = self.walk.linears(), original.linears()
        different = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
        if different:
            made = "{} was not made from {}".format(*self._names)
            raise QuantkitError(f"{made}: they differ in {different[0]}", GIVE_IT)
