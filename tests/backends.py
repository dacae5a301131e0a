"""Texts that a backend of a server makes, without a server, and what they are alone."""

from dataclasses import dataclass, field

import torch

from quantkit.core.sampling import Sampling
from quantkit.serve.engine import Job, Token

GREEDY = Sampling(temperature=0)


@dataclass(eq=False)
class Reader:
    """As much of an engine.Stream as a backend sees, and what came."""

    job: Job
    cancelled: bool = False
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


def prompt(length: int, seed: int = 0) -> list[int]:
    random = torch.Generator().manual_seed(seed + 1000 * length)
    return torch.randint(10, 8000, (length,), generator=random).tolist()


def asked(length: int, new: int, seed: int = 0, sampling=GREEDY, logprobs=None) -> Reader:
    return Reader(Job(prompt(length, seed), sampling, new, logprobs))


def turn(backend) -> None:
    for reader, tokens, finish in backend.turn():
        assert reader.finish is None, "something came behind the end"
        reader.tokens += tokens
        reader.finish = finish


def served(backend, readers: list[Reader]) -> None:
    """All of them, each taken up as soon as there is room, up to the end."""
    waiting = list(readers)
    while waiting or backend.busy:
        while waiting and backend.admits(waiting[0].job):
            backend.add(waiting.pop(0))
        turn(backend)


def alone(net, job: Job) -> list[int]:
    """By transformers."""
    ids = torch.tensor([job.prompt], device=net.device)
    found = net.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=job.max_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return found[0, len(job.prompt) :].tolist()
