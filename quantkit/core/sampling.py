"""How the next token is chosen from the logits: settings, and the choice itself.

Every engine goes through this, so that a setting means the same everywhere. The order is that of
transformers:

    repetition_penalty -> temperature -> top_k -> top_p -> min_p -> draw

``temperature`` 0 takes the likeliest token and ignores what follows it.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import QuantkitError, UsageError

SEEDS = 2**63  # what a generator of torch takes: 0 to so many, less one
LEAST_PENALTY, _MOST_PENALTY = 1e-3, 1e9
_COLD = 1e-30  # of a temperature: below it logits overflow when they are divided
_FEW = 256  # candidates that are looked at first; nearly always they hold all of top_p


@dataclass(frozen=True)
class Sampling:
    """Settings, all neutral by default: a draw from the model's own distribution.

    temperature         logits are divided by it; 0 always takes the likeliest token
    top_p               keep the likeliest tokens of this total share, 0 < top_p <= 1
    top_k               keep so many of the likeliest tokens; 0 keeps all
    min_p               keep tokens at least so likely as this share of the likeliest, 0 to 1
    repetition_penalty  above 1 makes tokens of the prompt and the text so far less likely;
                        0.001 to 1e9, so that no logit overflows
    seed                for the same tokens again, 0 to 2**63 - 1; None: other ones each time

    Raises UsageError for values out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UsageError(
                f"--temperature {self.temperature:g} is out of range",
                "0 always takes the likeliest token, 1 is the model's own spread",
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(
                f"--top-p {self.top_p:g} must be above 0 and at most 1", "1 turns it off"
            )
        if self.top_k < 0:
            raise UsageError("--top-k cannot be negative", "0 turns it off")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"--min-p {self.min_p:g} must be from 0 to 1", "0 turns it off")
        if not LEAST_PENALTY <= self.repetition_penalty <= _MOST_PENALTY:
            raise UsageError(
                f"--repetition-penalty {self.repetition_penalty:g} must be from {LEAST_PENALTY:g} "
                f"to {_MOST_PENALTY:g}",
                "1.0 turns it off",
            )
        if self.seed is not None and not 0 <= self.seed < SEEDS:
            raise UsageError(f"--seed {self.seed} is out of range", "use 0 to 2**63 - 1")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, so that nothing is left to chance."""
        return self.temperature < _COLD or self.top_k == 1

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for ``model.generate`` of transformers, which has no seed."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "seed"}
        if self.greedy:
            # the model's own sampling settings would only draw warnings now
            off = dict.fromkeys(("temperature", "top_p", "top_k", "min_p"))
            return found | off | {"do_sample": False}
        return found | {"do_sample": True}


def chosen(model: Mapping[str, Any], given: Mapping[str, Any]) -> Sampling:
    """Settings from those that the user gave, and for the others those of ``model``, which has
    what a generation_config.json has. None means not given, in both. A model that does not say
    ``do_sample`` is greedy until a setting of sampling is given."""
    said = {name: value for name, value in given.items() if value is not None}
    names = [f.name for f in fields(Sampling) if f.name != "seed"]
    own = {name: model[name] for name in names if model.get(name) is not None}
    asked = said.keys() & {"temperature", "top_p", "top_k", "min_p"}
    if not asked and not model.get("do_sample"):
        own["temperature"] = 0.0
    return Sampling(**(own | said))


class Sampler:
    """Chooses the tokens of one text after another, from logits on ``device``. The same seed gives
    the same tokens on the same device."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Iterable[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.sampling = sampling
        self._penal = sampling.repetition_penalty != 1
        self._seen = set(prompt) if self._penal else set()
        self._random: torch.Generator | None = None
        if not sampling.greedy:
            self._random = torch.Generator(device)
            if sampling.seed is None:
                self._random.seed()
            else:
                self._random.manual_seed(sampling.seed)

    def next(self, logits: Tensor) -> int:
        """The token that follows, from its logits [vocab]. Raises QuantkitError where those on a
        CPU are no numbers; a GPU would have to be asked, and waited for."""
        if not logits.is_cuda and not math.isfinite(logits.max()):  # NaN is the largest
            raise QuantkitError(
                "the model's predictions are not numbers",
                "'quantkit inspect' says whether its weights are",
            )
        if self._seen:
            logits = penalized(logits, list(self._seen), self.sampling.repetition_penalty)
        if self._random is None:
            token = int(logits.argmax())
        else:
            shares, ids = candidates(logits, self.sampling)
            # argmax(p / e) with e exponential is a draw from p
            noise = torch.empty_like(shares).exponential_(generator=self._random)
            best = (shares / noise).argmax()
            token = int(best if ids is None else ids[best])
        if self._penal:
            self._seen.add(token)
        return token


def penalized(logits: Tensor, seen: list[int], penalty: float) -> Tensor:
    """``logits`` [vocab] with those of the tokens ``seen`` divided by ``penalty``, or multiplied
    where they are negative (Keskar et al., CTRL, arXiv:1909.05858)."""
    index = torch.tensor(seen, device=logits.device)
    found = logits[index]
    changed = torch.where(found < 0, found * penalty, found / penalty)
    return logits.index_copy(0, index, changed)


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """The tokens to draw from: float32 shares [n], not scaled to a sum of 1 and 0 for what is out,
    and their ids int64 [n], or None when they are the whole vocabulary in its order."""
    scaled = logits.float() / sampling.temperature
    ids = None
    if 0 < sampling.top_k < len(scaled):
        scaled, ids = scaled.topk(sampling.top_k)
    shares = torch.softmax(scaled, 0)
    if sampling.top_p < 1:
        shares, order = _largest(shares, sampling.top_p)
        ids = order if ids is None else ids[order]
    if sampling.min_p > 0:
        shares = shares.where(shares >= sampling.min_p * shares.max(), 0)
    return shares, ids


def _largest(shares: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest of the largest ``shares`` that come to ``top_p`` (at least one), and their
    indices. Sorting a large vocabulary takes longer than all else, so it is the last resort."""
    first, order = shares.topk(min(_FEW, len(shares)))
    before = first.cumsum(0) - first
    if len(first) < len(shares) and before[-1] + first[-1] < top_p:
        first, order = shares.sort(descending=True)
        before = first.cumsum(0) - first
    keep = max(1, int((before < top_p).sum()))  # float32 has no top_p below 1e-45
    return first[:keep], order[:keep]
