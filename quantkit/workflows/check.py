"""Held-out text that rides along while a model is quantized.

At every block some rows that take no part in calibration go through the original block, and others
just like them through the quantized one. Behind the last block the two are compared: what the
quantization did to the model's predictions is known when it ends, at the price of a few rows, with
neither model ever in memory.
"""

from math import isfinite, isnan
from typing import Any

import torch
from torch import Tensor, nn

from quantkit import data
from quantkit.core import calibration
from quantkit.core.metrics import Comparison
from quantkit.errors import QuantkitError
from quantkit.runtime import gather
from quantkit.runtime.block import Block
from quantkit.runtime.ranks import ALONE, Ranks
from quantkit.runtime.states import States
from quantkit.runtime.walk import Walk

ROWS, TOKENS = 4, 512


def held_out(tokenizer: Any, rows: int = ROWS, tokens: int = TOKENS) -> dict[str, list[list[int]]]:
    """Rows of the bundled held-out texts by set (en, ja, code, chat)."""
    found = {}
    for label in calibration.BUNDLED:
        path = data.calibration() / "heldout" / f"{label}.jsonl"
        documents = calibration.read(str(path), seed=0)
        found[label] = calibration.pack(documents, tokenizer, None, tokens, rows).rows
    return found


class RideAlong:
    """Rows by set, through the original and the quantized model side by side, up to ``at_once``
    tokens together (rows of one length; one row at least). Each of several ranks has a part of
    them."""

    def __init__(
        self, rows: dict[str, list[list[int]]], at_once: int = 0, ranks: Ranks = ALONE
    ) -> None:
        self._ranks = ranks
        self.batches: list[Tensor] = []
        self._labels: list[list[str]] = []
        pairs = [(label, row) for label, some in rows.items() for row in some]
        pairs = pairs[ranks.part(len(pairs))]
        for length in dict.fromkeys(len(row) for _, row in pairs):
            same = [(label, row) for label, row in pairs if len(row) == length]
            step = max(1, at_once // length)
            for start in range(0, len(same), step):
                some = same[start : start + step]
                self.batches.append(torch.tensor([row for _, row in some]))
                self._labels.append([label for label, _ in some])
        self._original = self._quantized = States([])

    def start(self, hidden: States) -> None:
        """``hidden``: the walk's hidden states of ``batches`` in front of the first block."""
        if self.batches:
            self._original, self._quantized = hidden, hidden.copy()

    def before(self, block: Block) -> None:
        """While the block still has its original weights."""
        gather.advance(block, self._original)

    def after(self, block: Block) -> None:
        """When it has its quantized ones."""
        gather.advance(block, self._quantized)

    def finish(self, walk: Walk, head: dict[str, nn.Parameter] | None = None) -> Comparison:
        """Both models' predictions, compared, for the rows of all ranks. ``head``: the parameters
        of a quantized head. Raises QuantkitError when some predictions are not finite."""
        comparison = Comparison()
        states = zip(self._original, self._quantized)
        with walk.surroundings(head=True):  # of both
            for labels, batch, (original, quantized) in zip(self._labels, self.batches, states):
                before = walk.predicted(batch, original)
                after = walk.predicted(batch, quantized, head)
                for i, label in enumerate(labels):
                    comparison.add(label, batch[i], before[i], after[i])
        whole = Comparison.of(self._ranks.everyone(comparison))
        for label, found in whole.sets().items():
            if not isfinite(found.kl.mean):
                whose = "original" if isnan(found.reference_perplexity) else "quantized model"
                raise QuantkitError(
                    f"what the {whose} predicts on held-out text ({label}) is not finite",
                    "run with --dtype float32, and check that the original itself generates "
                    "sensible text",
                )
        return whole
