"""How far one model's predictions are from another's. All logarithms are natural (nats)."""

from collections import defaultdict
from dataclasses import dataclass, field
from math import exp, sqrt
from typing import Any

import torch
from torch import Tensor

# logits of a row are [tokens, vocabulary]: work on few tokens at a time
_CHUNK = 512


@dataclass(frozen=True)
class Estimate:
    """A mean over rows, and the standard error of that mean (0 for a single row)."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: list[float]) -> "Estimate":
        data = torch.tensor(values, dtype=torch.float64)
        error = float(data.std() / sqrt(len(values))) if len(values) > 1 else 0.0
        return cls(float(data.mean()), error)

    @classmethod
    def average(cls, parts: list["Estimate"]) -> "Estimate":
        """The mean of independent estimates, each weighing the same."""
        return cls(
            sum(p.mean for p in parts) / len(parts),
            sqrt(sum(p.error**2 for p in parts)) / len(parts),
        )


@dataclass(frozen=True)
class SetResult:
    """One text set. kl: mean over tokens of KL(reference || model); top1: share of tokens for which
    both predict the same next token; perplexities of both on the text."""

    kl: Estimate
    top1: Estimate
    reference_perplexity: float
    perplexity: float


@dataclass
class Comparison:
    """Accumulates rows of logits of a reference model and another model, by text set.

    Every row weighs the same inside a set, every set the same in the whole.
    """

    _rows: dict[str, list[tuple[float, float, float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def add(self, label: str, ids: Tensor, reference: Tensor, other: Tensor) -> None:
        """One row: ``ids`` [tokens]; both models' logits [tokens, vocabulary]. A row of a single
        token has nothing to predict and is left out."""
        if len(ids) < 2:
            return
        kl, agree, nll = [], [], []
        for start in range(0, len(ids), _CHUNK):
            part = slice(start, start + _CHUNK)
            p = reference[part].float().log_softmax(-1)
            q = other[part].float().log_softmax(-1)
            kl.append((p.exp() * (p - q)).sum(-1))
            agree.append((p.argmax(-1) == q.argmax(-1)).float())
            nxt = ids[start + 1 : start + 1 + _CHUNK].to(p.device)
            chosen = torch.stack([p, q])[:, : len(nxt)].gather(2, nxt.expand(2, -1)[:, :, None])
            nll.append(-chosen[:, :, 0])
        loss = torch.cat(nll, 1).mean(1)
        self._rows[label].append(
            (
                float(torch.cat(kl).mean()),
                float(torch.cat(agree).mean()),
                float(loss[0]),
                float(loss[1]),
            )
        )

    def sets(self) -> dict[str, SetResult]:
        result = {}
        for label, rows in self._rows.items():
            kl, agree, before, after = (list(column) for column in zip(*rows))
            result[label] = SetResult(
                Estimate.of(kl),
                Estimate.of(agree),
                exp(sum(before) / len(before)),
                exp(sum(after) / len(after)),
            )
        return result

    def described(self) -> dict[str, Any]:
        """As plain numbers, for reports."""
        kl, top1 = self.overall()
        return {
            "kl": kl.mean,
            "kl_error": kl.error,
            "top1": top1.mean,
            "sets": {
                label: {
                    "rows": len(self._rows[label]),
                    "kl": found.kl.mean,
                    "kl_error": found.kl.error,
                    "top1": found.top1.mean,
                    "top1_error": found.top1.error,
                    "reference_perplexity": found.reference_perplexity,
                    "perplexity": found.perplexity,
                }
                for label, found in self.sets().items()
            },
        }

    def overall(self) -> tuple[Estimate, Estimate]:
        """Mean KL and top-1 agreement, the sets weighing equally."""
        sets = self.sets().values()
        return (
            Estimate.average([s.kl for s in sets]),
            Estimate.average([s.top1 for s in sets]),
        )
