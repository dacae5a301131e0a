"""``quantkit compare``: several models against one original, ranked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.core.progress import Progress
from quantkit.core.source import resolve
from quantkit.errors import UsageError
from quantkit.workflows.engine import TORCH, refuse_engine
from quantkit.workflows.gate import Gate, Given
from quantkit.workflows.verify import Bench, Verification, recorded_original


@dataclass
class Ranking:
    """``models``: best first, by mean KL; what is no number comes last."""

    against: str
    models: list[Verification]

    def described(self) -> dict[str, Any]:
        """Plain numbers and text, for JSON and the report. ``behind``, for each but the first: how
        much larger its mean KL is than that of the one before, on the same rows."""
        pairs = zip(self.models, self.models[1:])
        behind = [after.comparison.kl_above(before.comparison) for before, after in pairs]
        return {
            "against": self.against,
            "models": [model.described() for model in self.models],
            "behind": [None, *({"kl": one.mean, "kl_error": one.error} for one in behind)],
        }


def compare(
    models: list[str] | tuple[str, ...],
    *,
    against: str | None = None,
    text: str | Sequence[str] = (),
    rows: int = 16,
    seqlen: int = 512,
    samples: bool = True,
    max_kl: Given = None,
    min_top1: Given = None,
    max_ppl_ratio: Given = None,
    gate: bool = False,
    engine: str = TORCH,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Ranking:
    """Measure each of ``models`` against the original (by default the one that the first of them
    names). All rows go through the original once, and through the models beside it; in memory are
    one block of the original and one of a model, and the hidden states of all. Everything else is
    as for ``verify``, but nothing is written.

    Raises QuantkitError when one of them cannot be loaded, or was not made from the original.
    """
    limits = Gate.of(max_kl, min_top1, max_ppl_ratio, gate)
    models = [models] if isinstance(models, str) else models
    if not models:
        raise UsageError("there is nothing to compare", "name one or more models")
    sources = [resolve(model) for model in models]
    refuse_engine(engine, sources)
    original = resolve(against) if against else recorded_original(sources[0])
    bench = Bench(original, text, rows, seqlen, samples, device, dtype, limits, engine)
    found = bench.measure(sources, progress or Progress())
    _tell_apart(found, [str(model) for model in models])
    return Ranking(original.name, sorted(found, key=_loss))


def _tell_apart(found: list[Verification], given: list[str]) -> None:
    """Two folders of one name are called what they were called by whoever asked."""
    names = [one.name for one in found]
    for one, text in zip(found, given):
        if names.count(one.name) > 1:
            one.name = text


def _loss(model: Verification) -> float:
    kl = model.comparison.overall()[0].mean
    return kl if kl == kl else float("inf")
