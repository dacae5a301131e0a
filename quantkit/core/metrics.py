"""How far one model's predictions are from another's. All logarithms are natural (nats); the
definitions are in docs/verify.md."""

from collections import defaultdict
from dataclasses import dataclass, field
from math import exp, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

# logits of a row are [tokens, vocabulary]: work on few tokens at a time, on a GPU on enough to keep
# it busy (footprint.py counts them)
_CHUNK, _GPU_CHUNK = 64, 512
_TOP = 5
# edges of the histogram: 10 bins for every factor of ten from 1e-6 to 10 nats
_LOWEST, _HIGHEST, _BINS = -6, 1, 70
_MONSTER = 1e6  # numbers from here on have no use for digits behind the point


@dataclass(frozen=True)
class Estimate:
    """A mean over rows, and the standard error of that mean (None for a single row, which says
    nothing about it)."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: list[float]) -> "Estimate":
        data = torch.tensor(values, dtype=torch.float64)
        error = float(data.std() / sqrt(len(values))) if len(values) > 1 else None
        return cls(float(data.mean()), error)

    @classmethod
    def average(cls, parts: list["Estimate"]) -> "Estimate":
        """The mean of independent estimates, each weighing the same."""
        errors = [p.error for p in parts if p.error is not None]
        known = len(errors) == len(parts)
        return cls(
            sum(p.mean for p in parts) / len(parts),
            sqrt(sum(e**2 for e in errors)) / len(parts) if known else None,
        )

    def exponential(self) -> "Estimate":
        """exp of the mean, and its error to first order."""
        value = _exp(self.mean)
        return Estimate(value, None if self.error is None else value * self.error)


@dataclass(frozen=True)
class SetResult:
    """One text set. Means over its rows:

    kl       of tokens' KL(reference || model)
    top1     share of tokens for which both predict the same next token
    top5     share for which the reference's choice is among the model's five likeliest
    lost     probability that the next token of the text lost
    log_ratio    of the perplexities: what the text's negative log-likelihood rose by, row by row
    tokens   predictions that were compared
    kl_p95, kl_p99, kl_max    over single tokens
    """

    kl: Estimate
    top1: Estimate
    top5: Estimate
    lost: Estimate
    log_ratio: Estimate
    reference_perplexity: float
    perplexity: float
    rows: int
    tokens: int
    kl_p95: float
    kl_p99: float
    kl_max: float

    def described(self) -> dict[str, Any]:
        """As plain numbers."""
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            **_with_error("kl", self.kl),
            "kl_p95": self.kl_p95,
            "kl_p99": self.kl_p99,
            "kl_max": self.kl_max,
            **_with_error("top1", self.top1),
            **_with_error("top5", self.top5),
            "reference_perplexity": self.reference_perplexity,
            "perplexity": self.perplexity,
            **_with_error("perplexity_ratio", self.log_ratio.exponential()),
            **_with_error("probability_lost", self.lost),
        }


@dataclass(frozen=True)
class _Row:
    """Means over a row's tokens; ``before`` and ``after``: negative log-likelihood of the text."""

    kl: float
    top1: float
    top5: float
    before: float
    after: float
    lost: float


@dataclass
class Comparison:
    """Accumulates rows of logits of a reference model and another model, by text set.

    Every row weighs the same inside a set, every set the same in the whole. Of single tokens only
    the KL is kept, 4 bytes each.
    """

    _rows: dict[str, list[_Row]] = field(default_factory=lambda: defaultdict(list))
    _tokens: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def add(self, label: str, ids: Tensor, reference: Tensor, other: Tensor) -> Tensor | None:
        """One row: ``ids`` [tokens]; both models' logits [tokens, vocabulary] -> the KL of every
        token, float32 [tokens] on the CPU. A row of a single token has nothing to predict and is
        left out."""
        if len(ids) < 2:
            return None
        parts, chunk = [], _GPU_CHUNK if reference.is_cuda else _CHUNK
        for start in range(0, len(ids), chunk):
            part = slice(start, start + chunk)
            following = ids[start + 1 : start + 1 + chunk]
            parts.append(_tokens(following, reference[part], other[part]))
        kl, top1, top5, before, after = _fetched([torch.cat(column) for column in zip(*parts)])
        self._tokens[label].append(kl)
        self._rows[label].append(
            _Row(
                float(kl.mean()),
                float(top1.mean()),
                float(top5.mean()),
                float(before.mean()),
                float(after.mean()),
                float((torch.exp(-before) - torch.exp(-after)).mean()),
            )
        )
        return kl

    @classmethod
    def of(cls, parts: list["Comparison"]) -> "Comparison":
        """The rows of all ``parts``, in their order."""
        whole = cls()
        for part in parts:
            for label, rows in part._rows.items():
                whole._rows[label] += rows
                whole._tokens[label] += part._tokens[label]
        return whole

    def sets(self) -> dict[str, SetResult]:
        return {label: self._set(label, rows) for label, rows in self._rows.items()}

    def _set(self, label: str, rows: list[_Row]) -> SetResult:
        kl = torch.cat(self._tokens[label]).double()
        p95, p99 = np.quantile(kl.numpy(), [0.95, 0.99]).tolist()
        return SetResult(
            kl=Estimate.of([row.kl for row in rows]),
            top1=Estimate.of([row.top1 for row in rows]),
            top5=Estimate.of([row.top5 for row in rows]),
            lost=Estimate.of([row.lost for row in rows]),
            log_ratio=Estimate.of([row.after - row.before for row in rows]),
            reference_perplexity=_exp(sum(row.before for row in rows) / len(rows)),
            perplexity=_exp(sum(row.after for row in rows) / len(rows)),
            rows=len(rows),
            tokens=len(kl),
            kl_p95=p95,
            kl_p99=p99,
            kl_max=float(kl.max()),
        )

    def described(self) -> dict[str, Any]:
        """As plain numbers, for reports."""
        sets = self.sets()
        kl, top1, top5, log_ratio = (
            Estimate.average([getattr(one, name) for one in sets.values()])
            for name in ("kl", "top1", "top5", "log_ratio")
        )
        return {
            **_with_error("kl", kl),
            "top1": top1.mean,
            "top5": top5.mean,
            **_with_error("perplexity_ratio", log_ratio.exponential()),
            "sets": {label: one.described() for label, one in sets.items()},
        }

    def histogram(self) -> dict[str, Any]:
        """How often the KL of a single token was how large: edges in nats, evenly spaced in their
        logarithms, and counts by set. What lies outside is counted in the first or last bin; what
        is not a number, nowhere."""
        steps = (_HIGHEST - _LOWEST) / _BINS
        edges = [10 ** (_LOWEST + i * steps) for i in range(_BINS + 1)]
        counts = {}
        for label, tokens in self._tokens.items():
            kl = torch.cat(tokens).double()
            kl = kl[~kl.isnan()].clamp(edges[0], edges[-1])
            at = torch.bucketize(kl, torch.tensor(edges[1:-1], dtype=kl.dtype), right=True)
            counts[label] = torch.bincount(at, minlength=_BINS).tolist()
        return {"edges": edges, "counts": counts}

    def overall(self) -> tuple[Estimate, Estimate]:
        """Mean KL and top-1 agreement, the sets weighing equally."""
        sets = self.sets().values()
        return (
            Estimate.average([s.kl for s in sets]),
            Estimate.average([s.top1 for s in sets]),
        )

    def kl_above(self, other: "Comparison") -> Estimate:
        """How much larger the mean KL is than another model's, on the same rows. What makes a row
        hard for both cancels: the error is that of the rows' differences."""
        return Estimate.average(
            [
                Estimate.of([a.kl - b.kl for a, b in zip(rows, other._rows[label])])
                for label, rows in self._rows.items()
            ]
        )


def _tokens(following: Tensor, reference: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    """KL, top-1 and top-5 agreement of each token, and both models' negative log-likelihoods of
    those that follow (as many as ``following`` has); all float32, where the logits are."""
    p = reference.float().log_softmax(-1)
    q = other.float().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    choice = p.argmax(-1)
    top1 = (choice == q.argmax(-1)).float()
    # how many the model finds likelier than the reference's choice; a NaN is found likelier
    likelier = (~(q <= q.gather(1, choice[:, None]))).sum(-1)
    top5 = (likelier < _TOP).float()
    following = following.to(p.device)[:, None]
    before, after = (-x[: len(following)].gather(1, following)[:, 0] for x in (p, q))
    return kl, top1, top5, before, after


def _fetched(columns: list[Tensor]) -> list[Tensor]:
    """All of them on the CPU, in one copy; each in memory of its own."""
    fetched = torch.cat(columns).cpu()
    return [part.clone() for part in torch.split(fetched, [len(column) for column in columns])]


def shown(value: float, error: float | None, digits: int = 4) -> str:
    """A number with its standard error, for people."""
    return f"{number(value, digits)} ± {'-' if error is None else number(error, digits)}"


def number(value: float, digits: int) -> str:
    """With so many digits behind the point, unless it is a monster."""
    return f"{value:.{digits}f}" if not abs(value) >= _MONSTER else f"{value:.3g}"


def _with_error(name: str, estimate: Estimate) -> dict[str, float | None]:
    return {name: estimate.mean, f"{name}_error": estimate.error}


def _exp(value: float) -> float:
    """exp that ends in infinity, not in an exception."""
    return exp(value) if not value > 700 else float("inf")
