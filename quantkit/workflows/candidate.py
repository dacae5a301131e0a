"""A model that is measured: run block by block beside its original, in the layers of the loaded
model, so that what is measured is what will run."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from quantkit.core.qweight import QWeight
from quantkit.core.source import Source
from quantkit.errors import QuantkitError
from quantkit.methods import digest
from quantkit.runtime import gather
from quantkit.runtime.block import Block
from quantkit.runtime.linear import multiplied_out
from quantkit.runtime.opened import open_checkpoint, recorded
from quantkit.runtime.quant_skeleton import QuantSkeleton
from quantkit.runtime.skeleton import Skeleton
from quantkit.runtime.states import States
from quantkit.runtime.walk import Walk
from quantkit.workflows import divergence, whole
from quantkit.workflows.engine import LLAMA_CPP, TORCH, llama_cpp_for
from quantkit.workflows.layer_errors import LayerErrors
from quantkit.workflows.sizes import Census
from quantkit.workflows.units import Units, units

_ROWS = 64  # of a weight are enough to see where it lies
GIVE_IT = "give the model that was quantized with --against"


class Candidate:
    """``source``, compared with ``original`` (its name and walk) on ``batches`` of token ids
    ([1, tokens] each). ``engine``: what predicts, see engine.py.

    record   what quantkit.json says of how it was made
    layers   by linear: what LayerErrors finds; ``predicted``, the error when it was quantized, on
             calibration text; ``held``, whether the file holds the numbers that were computed then
    census   what it has in memory

    Raises QuantkitError when it cannot be run, or was not made from the original.
    """

    def __init__(
        self, source: Source, original: Source, walk: Walk, batches: list[Tensor], engine: str
    ) -> None:
        self.opened = open_checkpoint(source)
        self._names = source.name, original.name
        self._batches = batches
        self.record = recorded(self.opened)
        like = walk.skeleton
        skeleton = QuantSkeleton(self.opened, like.device, like.dtype, self._see)
        self.walk = Walk(skeleton)
        self._refuse_another(walk)
        self._llama = llama_cpp_for(engine, self.opened)
        self.engine = TORCH if self._llama is None else LLAMA_CPP
        self._said = _said(self.record, skeleton)
        self._digests: dict[str, str] = {}
        self._seen: set[str] = set()
        self._tops: dict[str, QWeight] = {}
        self.layers: dict[str, dict[str, Any]] = {}
        self.census = Census(skeleton.model)
        self._hidden = States([])

    def begin(self) -> None:
        """Look at what is outside of the blocks, and take all rows to the first one."""
        with self.walk.surroundings(head=True):
            self.census.see()
        if self._llama is None:
            self._hidden = States(self.walk.embed(self._batches))
        self.opened.release()

    def step(self, index: int, original: Block, traced: dict[int, Tensor]) -> dict[int, Tensor]:
        """Through block ``index``. The original's block runs the inputs ``traced``, so that its
        linears are compared, and what it makes of them is returned."""
        with self.walk.block(index) as own:
            self.census.see()
            with multiplied_out(own.module):
                prefix = f"{own.name}."
                tops = {name.removeprefix(prefix): q for name, q in self._tops.items()}
                errors = LayerErrors(original, own, self._units(original, own, traced), tops)
                with errors.measuring():
                    found = {i: original.forward(x) for i, x in traced.items()}
                gather.advance(own, self._hidden)
            for name, numbers in errors.described().items():
                self.layers[name] = {**numbers, **self._told(name)}
        self._tops = {}
        self.opened.release()
        return found

    def logits(self) -> Iterator[Tensor]:
        """Predictions for every batch, [tokens, vocabulary]; once, behind the last ``step``."""
        if self._llama is not None:
            yield from (self._llama.logits(batch[0]) for batch in self._batches)
            return
        hidden, self._hidden = self._hidden, States([])
        for found in self.walk.logits(self._batches, hidden):
            yield found[0]
        self.opened.release()

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

    def _see(self, name: str, q: QWeight) -> None:
        """A packed weight of the file, when its block is filled."""
        top = q.rows(0, _ROWS)
        self._tops[name] = replace(top, codes=top.codes.clone())  # or all of them would stay
        if name in self._seen:  # the first block is filled twice
            return
        self._seen.add(name)
        self.census.see_packed(name, q)
        if "digest" in self._said.get(name, {}):
            self._digests[name] = digest.of(q)

    def _units(self, original: Block, own: Block, traced: dict[int, Tensor]) -> Units:
        awq = "awq" in (self.opened.format, self.record.get("method"))
        return units(original, own, next(iter(traced.values()))) if awq else Units()

    def _told(self, name: str) -> dict[str, Any]:
        """What the record says of a linear."""
        said = self._said.get(name, {})
        known = "digest" in said and name in self._digests
        return {
            "predicted": said.get("error"),
            "held": said["digest"] == self._digests[name] if known else None,
        }

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


def _said(record: dict[str, Any], skeleton: Skeleton) -> dict[str, dict[str, Any]]:
    """``error`` and ``digest`` of every linear, by its name in the model, as far as quantkit.json
    knows them: anybody may have written it."""
    layers = record.get("layers")
    found: dict[str, dict[str, Any]] = {}
    for disk, layer in layers.items() if isinstance(layers, dict) else ():
        name = skeleton.live_name(f"{disk}.weight").removesuffix(".weight")
        said = layer if isinstance(layer, dict) else {}
        error, known = said.get("error"), said.get("digest")
        found[name] = {
            **({"error": float(error)} if isinstance(error, int | float) else {}),
            **({"digest": known} if isinstance(known, str) else {}),
        }
    return found
