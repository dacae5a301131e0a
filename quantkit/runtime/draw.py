"""The next tokens of several texts, chosen where the logits are: nothing waits for the host.

The same settings in the same order as ``core.sampling``, which chooses for one text and may look at
the numbers as it goes.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.core.sampling import Sampling


def alike(sampling: Sequence[Sampling]) -> bool:
    """Whether these settings differ in their seeds at most, so that Draw can take them."""
    return len({replace(one, seed=None) for one in sampling}) == 1


class Draw:
    """Chooses tokens int64 [texts] from logits [texts, vocab], step after step, behind the prompts
    ``ids``. The settings are :func:`alike`; every text has chances of its own, so that its seed
    gives the same tokens whatever runs beside it."""

    def __init__(
        self, sampling: Sequence[Sampling], ids: Sequence[Sequence[int]], device: torch.device
    ) -> None:
        self.sampling = sampling[0]
        self._ids = [sorted(set(prompt)) for prompt in ids]
        self._seen: Tensor | None = None  # bool [texts, vocab], with a repetition penalty
        self._random: list[torch.Generator] = []
        if not self.sampling.greedy:
            self._random = [_random(one.seed, device) for one in sampling]

    def __call__(self, logits: Tensor) -> Tensor:
        penalty = self.sampling.repetition_penalty
        if penalty != 1:
            if self._seen is None:
                self._seen = self._prompts(logits)
            less = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self._seen, less, logits)
        token = logits.argmax(-1) if self.sampling.greedy else self._drawn(logits)
        if self._seen is not None:
            self._seen.scatter_(1, token[:, None], True)
        return token

    def _prompts(self, logits: Tensor) -> Tensor:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for row, ids in zip(seen, self._ids):
            row[torch.tensor(ids, device=logits.device)] = True
        return seen

    def _drawn(self, logits: Tensor) -> Tensor:
        shares, ids = candidates(logits, self.sampling)
        # argmax(p / e) with e exponential is a draw from p
        noise = torch.empty_like(shares)
        for row, random in zip(noise, self._random):
            row.exponential_(generator=random)
        best = (shares / noise).argmax(-1, keepdim=True)
        return (best if ids is None else ids.gather(1, best))[:, 0]


def _random(seed: int | None, device: torch.device) -> torch.Generator:
    found = torch.Generator(device)
    if seed is None:
        found.seed()
    else:
        found.manual_seed(seed)
    return found


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """float32 shares [texts, n], 0 for what is out and not scaled to a sum of 1, and the tokens
    that they belong to, int64 of the same shape, or None for the whole vocabulary in its order."""
    scaled, ids = logits.float() / sampling.temperature, None
    if 0 < sampling.top_k < scaled.shape[1]:
        scaled, ids = scaled.topk(sampling.top_k, -1)
    elif sampling.top_p < 1:
        scaled, ids = scaled.sort(-1, descending=True)
    shares = torch.softmax(scaled, -1)
    if sampling.top_p < 1:
        before = shares.cumsum(-1) - shares
        shares = shares.where(before < sampling.top_p, 0)
    if sampling.min_p > 0:
        shares = shares.where(shares >= sampling.min_p * shares.amax(-1, keepdim=True), 0)
    return shares, ids
