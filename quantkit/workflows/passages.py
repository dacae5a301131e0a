"""Where in the text two models disagree most."""

import heapq
from typing import Any

import torch
from torch import Tensor

_KEPT = 8  # passages in all
_BEFORE, _BEHIND = 24, 16  # tokens of a passage around its worst one
_CONTEXT = 8  # more tokens on both sides, so that the first and last characters are whole
_CANDIDATES = 5
_BROKEN = "�"  # what a tokenizer shows for a part of a character


class Passages:
    """Keeps the worst passages of all rows that it sees; no two of them overlap."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._heap: list[tuple[float, int, dict[str, Any]]] = []
        self._seen = 0

    def see(self, label: str, ids: Tensor, kl: Tensor, reference: Tensor, other: Tensor) -> None:
        """A row of set ``label``: ``ids`` and ``kl`` [tokens], logits [tokens, vocabulary]. The KL
        of a token is that of the predictions behind it."""
        left = torch.where(kl.isnan(), torch.inf, kl)  # what cannot be compared is worst
        for _ in range(_KEPT):
            at = int(left.argmax())
            worst = float(left[at])
            full = len(self._heap) == _KEPT
            if worst <= 0 or (full and worst <= self._heap[0][0]):
                return
            passage = self._passage(label, ids, kl, at, reference[at], other[at])
            self._seen += 1
            push = heapq.heapreplace if full else heapq.heappush
            push(self._heap, (worst, -self._seen, passage))
            left[max(0, at - _BEFORE - _BEHIND) : at + _BEFORE + _BEHIND + 1] = 0

    def described(self) -> list[dict[str, Any]]:
        """Worst first."""
        return [passage for *_, passage in sorted(self._heap, key=lambda e: e[:2], reverse=True)]

    def _passage(
        self, label: str, ids: Tensor, kl: Tensor, at: int, reference: Tensor, other: Tensor
    ) -> dict[str, Any]:
        tokens, place = self._spans(ids.tolist(), kl.tolist(), at)
        context = ids[max(0, at - _CONTEXT) : at + 1].tolist()
        return {
            "set": label,
            "kl": float(kl[at]),
            "tokens": tokens,
            "at": place,
            "reference": self._candidates(context, reference),
            "model": self._candidates(context, other),
        }

    def _spans(self, ids: list[int], kl: list[float], at: int) -> tuple[list[dict[str, Any]], int]:
        """Text around ``at`` in pieces that are whole characters: tokens that only together make
        one are one piece, with the largest of their KLs -> pieces, and which of them has ``at``."""
        first = max(0, at - _BEFORE)
        start, stop = max(0, first - _CONTEXT), min(len(ids), at + _BEHIND + 1)
        spans: list[dict[str, Any]] = []
        place = 0
        done, begin = "", start
        for end in range(start + 1, min(len(ids), stop + _CONTEXT) + 1):
            text = self._decode(ids[start:end])
            whole = text.startswith(done) and not text.endswith(_BROKEN)
            if not whole and not (begin <= at < end == len(ids)):
                continue
            if end > first:
                if begin <= at < end:
                    place = len(spans)
                spans.append({"text": text[len(done) :], "kl": _largest(kl[begin:end])})
            if end >= stop:
                break
            done, begin = text, end
        return spans, place

    def _candidates(self, context: list[int], logits: Tensor) -> list[list[Any]]:
        """The likeliest next tokens, as they would read behind ``context``."""
        probabilities = logits.float().softmax(-1)
        count = min(_CANDIDATES, len(probabilities))
        values, tokens = probabilities.topk(count)
        before = self._decode(context).rstrip(_BROKEN)
        found = []
        for value, token in zip(values.tolist(), tokens.tolist()):
            text = self._decode([*context, token])
            same = text.startswith(before)
            found.append([text[len(before) :] if same else self._decode([token]), value])
        return found

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def _largest(values: list[float]) -> float:
    """NaN where one of them is."""
    return max(values, key=lambda value: (value != value, value))
