"""The next tokens of several texts, chosen where the logits are: nothing waits for the host.

The same settings in the same order as ``core.sampling``, which chooses for one text and may look at
the numbers as it goes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.core.sampling import Sampling
from quantkit.runtime.device import sent


class Draw:
    """Chooses tokens int64 [texts] from logits [texts, vocab], step after step; those of the first
    texts follow the prompts ``ids``. Every text has settings and chances of its own, so that its
    seed gives the same tokens whatever runs beside it."""

    def __init__(
        self, sampling: Sequence[Sampling], ids: Sequence[Iterable[int]], device: torch.device
    ) -> None:
        self._device = device
        self._texts: list[_Text] = []
        self._plan: _Plan | None = None
        self.join(sampling, ids)

    def join(self, sampling: Sequence[Sampling], ids: Sequence[Iterable[int]]) -> None:
        """More texts, below the others."""
        self._texts += [_Text(one, self._device, prompt) for one, prompt in zip(sampling, ids)]
        self._plan = None

    def keep(self, texts: Sequence[int]) -> None:
        """Only these go on, in this order."""
        self._texts = [self._texts[i] for i in texts]
        self._plan = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self._plan is None:
            self._plan = _Plan(self._texts, logits.shape[1], self._device)
        plan = self._plan
        if plan.penal is not None:
            logits = plan.penal.applied(logits)
        token = logits.argmax(-1)
        if plan.chance is not None:
            token = plan.chance.drawn(logits, token)
        if plan.penal is not None:
            plan.penal.saw(token)
        return token


class _Text:
    """Settings of a text, its chances, and the tokens that it has seen, bool [vocab], or None as
    long as nobody has looked; the latter two where its settings ask for them."""

    def __init__(self, sampling: Sampling, device: torch.device, prompt: Iterable[int]) -> None:
        self.sampling = sampling
        self.prompt = sorted(set(prompt)) if self.penal else []
        self.seen: Tensor | None = None
        self.random: torch.Generator | None = None
        if not sampling.greedy:
            self.random = torch.Generator(device)
            if sampling.seed is None:
                self.random.seed()
            else:
                self.random.manual_seed(sampling.seed)

    @property
    def penal(self) -> bool:
        return self.sampling.repetition_penalty != 1


class _Plan:
    """What is done as long as the texts are the same; None: for no text."""

    def __init__(self, texts: list[_Text], vocab: int, device: torch.device) -> None:
        penal = [i for i, text in enumerate(texts) if text.penal]
        chance = [i for i, text in enumerate(texts) if text.random is not None]
        self.penal = _Penal(texts, penal, vocab, device) if penal else None
        self.chance = _Chance(texts, chance, device) if chance else None


class _Penal:
    """Texts whose repetitions are made less likely."""

    def __init__(
        self, texts: list[_Text], which: list[int], vocab: int, device: torch.device
    ) -> None:
        self._rows = sent(torch.tensor(which), device)
        some = [texts[i] for i in which]
        for text in some:
            if text.seen is None:
                text.seen = torch.zeros(vocab, dtype=torch.bool, device=device)
                text.seen[sent(torch.tensor(text.prompt, dtype=torch.long), device)] = True
        self._seen = torch.stack([text.seen for text in some if text.seen is not None])
        for row, text in enumerate(some):
            text.seen = self._seen[row]  # and it goes on with them
        each = torch.tensor([text.sampling.repetition_penalty for text in some])
        self._penalty = sent(each, device)[:, None]

    def applied(self, logits: Tensor) -> Tensor:
        wide = logits.float()
        some, penalty = wide[self._rows], self._penalty
        less = torch.where(some < 0, some * penalty, some / penalty)
        return wide.index_copy(0, self._rows, torch.where(self._seen, less, some))

    def saw(self, token: Tensor) -> None:
        self._seen.scatter_(1, token[self._rows, None], True)


class _Chance:
    """Texts whose tokens are drawn."""

    def __init__(self, texts: list[_Text], which: list[int], device: torch.device) -> None:
        self._rows = None if len(which) == len(texts) else sent(torch.tensor(which), device)
        self._random = [texts[i].random for i in which]
        self._limits = Limits.of([texts[i].sampling for i in which], device)

    def drawn(self, logits: Tensor, token: Tensor) -> Tensor:
        """``token`` with those of these texts in their place."""
        some = logits if self._rows is None else logits[self._rows]
        shares, ids = candidates(some, self._limits)
        # argmax(p / e) with e exponential is a draw from p; as many e in every case, so that what
        # is drawn for a text does not depend on the settings of others
        noise = torch.empty_like(some, dtype=torch.float32)
        for row, random in zip(noise, self._random):
            row.exponential_(generator=random)
        if ids is None:
            found = (shares / noise).argmax(-1)
        else:
            best = (shares / noise.gather(1, ids)).argmax(-1, keepdim=True)
            found = ids.gather(1, best)[:, 0]
        return found if self._rows is None else token.index_copy(0, self._rows, found)


@dataclass(frozen=True)
class Limits:
    """Settings of several texts as float32 [texts, 1], None where no text has one.

    top_k   None also where all have the same
    few     the largest top_k, if every text has one
    """

    temperature: Tensor
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    few: int | None

    @classmethod
    def of(cls, sampling: Sequence[Sampling], device: torch.device) -> "Limits":
        counts = [one.top_k or torch.inf for one in sampling]
        # shares that are summed up may come to a little more than 1
        sums = [one.top_p if one.top_p < 1 else 2 for one in sampling]
        least = [one.min_p for one in sampling]
        heat = [one.temperature for one in sampling]
        each = sent(torch.tensor([heat, counts, sums, least]), device)[..., None]
        return cls(
            each[0],
            each[1] if min(counts) < max(counts) else None,
            each[2] if min(sums) < 1 else None,
            each[3] if max(least) > 0 else None,
            int(max(counts)) if max(counts) < torch.inf else None,
        )


def candidates(logits: Tensor, limits: Limits) -> tuple[Tensor, Tensor | None]:
    """float32 shares [texts, n], 0 for what is out and not scaled to a sum of 1, and the tokens
    that they belong to, int64 of the same shape, or None for the whole vocabulary in its order."""
    scaled, ids = logits.float() / limits.temperature, None
    if limits.few is not None and limits.few < scaled.shape[1]:
        scaled, ids = scaled.topk(limits.few, -1)
    elif limits.top_k is not None or limits.top_p is not None:
        scaled, ids = scaled.sort(-1, descending=True)
    if limits.top_k is not None:
        place = torch.arange(scaled.shape[1], device=scaled.device)
        scaled = scaled.where(place < limits.top_k, -torch.inf)
    shares = torch.softmax(scaled, -1)
    if limits.top_p is not None:
        before = shares.cumsum(-1) - shares
        shares = shares.where(before < limits.top_p, 0)
    if limits.min_p is not None:
        shares = shares.where(shares >= limits.min_p * shares.amax(-1, keepdim=True), 0)
    return shares, ids
