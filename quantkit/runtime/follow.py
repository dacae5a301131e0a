"""The one loop that makes text: draw a token, compute what follows it, and again.

Where a step is replayed on a GPU (decode.py), the host would only be in the way: the next token is
chosen there and fed to the next step, and a copy of it comes to the host when it is ready, while
the following steps run already. So the end of a text is noticed a few steps late, and what came
behind it is dropped. Everywhere else a step begins when the token before it was given out.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit.core.sampling import Sampler, Sampling
from quantkit.runtime.draw import Draw

Choice = Callable[[Tensor], Tensor]  # of tokens int64 [texts] from logits [texts, vocab]


class Runner(Protocol):
    """A model with the keys and values of some texts.

    ahead  steps that may run before their tokens are looked at; if any, tokens stay on the device
    turn   another number when other texts have taken the place of these
    """

    ahead: int
    turn: int

    def begin(self, texts: Sequence[list[int]], more: int) -> Tensor:
        """Logits [texts, vocab] behind ``texts``, which up to ``more`` tokens will follow. The
        lists are kept: who appends the tokens as they come to be known lets a later text that
        begins alike go on from them."""

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [texts, vocab] behind one more token of each, int64 [texts]. They are good until
        the next step."""


@torch.inference_mode()
def follow(
    runner: Runner, prompts: Sequence[Sequence[int]], sampling: Sequence[Sampling], most: int
) -> Generator[list[int], object, None]:
    """Tokens that follow ``prompts``, one for each at every step, ``most`` times; who reads them
    knows when a text ends. Others may use ``runner`` in between: the texts are then read again."""
    texts = [list(ids) for ids in prompts]
    logits = runner.begin(texts, most)
    device = logits.device
    choose = Draw(sampling, prompts, device) if runner.ahead else _host(sampling, prompts, device)
    tokens = choose(logits)
    turn, begun, coming = runner.turn, 1, deque([Arriving(tokens)])
    for count in range(most):
        while begun < min(most, count + 1 + runner.ahead):
            if runner.turn == turn:
                logits = runner.step(tokens)
            else:
                known = zip(*(one.numbers() for one in coming)) if coming else [()] * len(texts)
                logits = runner.begin([text + list(more) for text, more in zip(texts, known)], most)
                turn = runner.turn
            tokens = choose(logits)
            coming.append(Arriving(tokens))
            begun += 1
        found = coming.popleft().numbers()
        for text, token in zip(texts, found):
            text.append(token)
        yield found


def _host(
    sampling: Sequence[Sampling], prompts: Sequence[Sequence[int]], device: torch.device
) -> Choice:
    samplers = [Sampler(one, ids, device) for one, ids in zip(sampling, prompts)]
    return lambda logits: torch.tensor([s.next(row) for s, row in zip(samplers, logits)])


class Arriving:
    """A tensor on its way from the device."""

    def __init__(self, tensor: Tensor) -> None:
        self._event = None
        self._here = tensor
        if tensor.device.type == "cuda":
            self._here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._here.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def numbers(self) -> list[Any]:
        """Its numbers, as soon as they are here."""
        if self._event is not None:
            self._event.synchronize()
        found: list[Any] = self._here.tolist()
        return found
