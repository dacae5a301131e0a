"""The next tokens of several texts, chosen where the logits are: nothing waits for the host.

The same settings in the same order as ``core.sampling``, which chooses for one text and may look at
the numbers as it goes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.core.sampling import Sampling


class Draw:
    """Chooses tokens int64 [texts] from logits [texts, vocab], step after step."""

    def __init__(
        self, sampling: Sampling, ids: Sequence[Sequence[int]], vocab: int, device: torch.device
    ) -> None:
        self.sampling = sampling
        self._seen = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(len(ids), vocab, dtype=torch.bool, device=device)
            for row, prompt in zip(self._seen, ids):
                row[torch.tensor(sorted(set(prompt)), device=device)] = True
        self._random = torch.Generator(device)
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        if self._seen is not None:
            penalty = self.sampling.repetition_penalty
            less = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self._seen, less, logits)
        token = logits.argmax(-1) if self.sampling.greedy else self._drawn(logits)
        if self._seen is not None:
            self._seen.scatter_(1, token[:, None], True)
        return token

    def _drawn(self, logits: Tensor) -> Tensor:
        shares, ids = candidates(logits, self.sampling)
        # argmax(p / e) with e exponential is a draw from p
        noise = torch.empty_like(shares).exponential_(generator=self._random)
        best = (shares / noise).argmax(-1, keepdim=True)
        return (best if ids is None else ids.gather(1, best))[:, 0]


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
