"""Log probabilities of tokens: of the model's own distribution, before any setting."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.runtime.device import sent
from quantkit.runtime.follow import Arriving
from quantkit.serve.engine import Job, Token


def with_logprobs(token: int, logits: Tensor, count: int) -> Token:
    """``token`` with its log probability, and the ``count`` likeliest tokens with theirs."""
    logs = torch.log_softmax(logits.float(), -1)
    best = logs.topk(count) if count else None
    top = zip(best.indices.tolist(), best.values.tolist()) if best else ()
    return Token(token, float(logs[token]), tuple(top))


class Told:
    """Tells them of those of several texts whose jobs ask for it, without waiting for the
    device."""

    def __init__(self, jobs: Sequence[Job], device: torch.device) -> None:
        self._counts = {i: job.logprobs for i, job in enumerate(jobs) if job.logprobs is not None}
        self._rows = sent(torch.tensor([*self._counts]), device) if self._counts else None

    def __call__(self, logits: Tensor, tokens: Tensor) -> "Numbers | None":
        """Of ``tokens`` [texts], which follow by the logits [texts, vocab]."""
        if self._rows is None:
            return None
        logs = torch.log_softmax(logits[self._rows].float(), -1)
        own = logs.gather(1, tokens[self._rows, None])
        best = logs.topk(max(self._counts.values()), -1)
        return Numbers(self._counts, torch.cat([own, best.values], 1), best.indices)


class Numbers:
    """What was told of the tokens of one step, on its way from the device."""

    def __init__(self, counts: dict[int, int], logs: Tensor, best: Tensor) -> None:
        self._counts = counts
        self._logs, self._best = Arriving(logs), Arriving(best)

    def tokens(self, ids: Sequence[int]) -> dict[int, Token]:
        """By their texts, those that there are numbers of."""
        found = {}
        each = zip(self._counts.items(), self._logs.numbers(), self._best.numbers())
        for (text, count), (own, *logs), best in each:
            found[text] = Token(ids[text], own, tuple(zip(best[:count], logs[:count])))
        return found
