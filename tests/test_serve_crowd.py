"""Texts that come and go as they like, in batches of both torch engines: each is what it is alone.

Chance decides who comes when, how long all are, how they are drawn, who asks for numbers and who
leaves; seeds make it the same every time."""

import random

import pytest
import torch
from backends import GREEDY, Reader, alone, prompt, served, turn

from quantkit.core.sampling import Sampling
from quantkit.runtime.kernels import small
from quantkit.runtime.load import load
from quantkit.runtime.stretches import Stretches
from quantkit.serve.engine import Job
from quantkit.serve.engines import captured
from quantkit.serve.engines import torch as plain
from quantkit.serve.engines.captured import CapturedBackend
from quantkit.serve.engines.logprobs import with_logprobs
from quantkit.serve.engines.torch import TorchBackend

PIECE, CONTEXT, PLACES = 16, 48, 100
ENDS = frozenset([27, 282])  # tokens that come often
LENGTHS = (1, 1, 2, 3, 7, PIECE - 1, PIECE, PIECE + 1, PIECE + 2, 2 * PIECE, 2 * PIECE + 1, 40)
SETTINGS = (
    GREEDY,
    GREEDY,
    Sampling(temperature=0, repetition_penalty=1.5),
    Sampling(temperature=1.5, top_p=0.9, seed=7),
    Sampling(temperature=2, seed=8, repetition_penalty=1.2),
    Sampling(temperature=1, top_k=5, min_p=0.1, seed=9),
)


@pytest.fixture(scope="module")
def net():
    return load("demo", dtype="float32")[0]


@pytest.fixture(params=[CapturedBackend, TorchBackend])
def made(request, net, monkeypatch):
    """Makes a backend."""

    def keep(key, value, keys, values, at):  # Triton's interpreter would take most of the time
        for held, new in ((keys, key), (values, value)):
            held.index_copy_(1, at, new[:, :, 0].transpose(0, 1))

    monkeypatch.setattr(small, "keep", keep)
    monkeypatch.setattr(captured, "PIECE", PIECE)
    monkeypatch.setattr(plain, "_PIECE", PIECE)

    def make(ends: frozenset[int], rows: int = 5, places: int = PLACES):
        return request.param(net, ends, context=CONTEXT, rows=rows, places=places)

    return make


def some(chance: random.Random) -> Reader:
    length = chance.choice(LENGTHS)
    most = chance.choice([1, 2, chance.randint(1, CONTEXT - length), CONTEXT - length])
    ids, settings = prompt(length, chance.randint(0, 2)), chance.choice(SETTINGS)
    return Reader(
        Job(ids, settings, min(most, CONTEXT - length), chance.choice([None, None, 0, 3]))
    )


def crowd(backend, chance: random.Random, count: int) -> list[Reader]:
    """They come one by one or several at once, and some leave: before their first token, at any
    other, or when the last one is on its way."""
    waiting, here, found = [some(chance) for _ in range(count)], [], []
    while waiting or backend.busy:
        while waiting and backend.admits(waiting[0].job) and chance.random() < 0.6:
            here.append(waiting.pop(0))
            backend.add(here[-1])
        if here and chance.random() < 0.08:
            chance.choice(here).cancelled = True
        if backend.busy:
            turn(backend)
        found += [reader for reader in here if reader.finish]
        here = [reader for reader in here if not reader.finish]
    assert not here
    return found


@pytest.mark.parametrize("seed", range(2))
def test_a_crowd(net, made, seed, monkeypatch):
    moved, move = [], Stretches.move
    monkeypatch.setattr(Stretches, "move", lambda s, *w: (moved.append(w), move(s, *w))[1])
    backend = made(ENDS)
    readers = crowd(backend, random.Random(seed), 30)
    assert len(readers) == 30 and backend.load().kv_used == 0
    assert moved or isinstance(backend, TorchBackend)
    for reader in readers:
        job = reader.job
        ids = lonely(net, made, job)
        at = next((i for i, token in enumerate(ids) if token in ENDS), None)
        meant = (ids, "length") if at is None else (ids[:at], "stop")
        if reader.cancelled and (reader.ids, reader.finish) != meant:
            meant = (meant[0][: len(reader.ids)], "stop")
        assert (reader.ids, reader.finish) == meant
        numbers(net, reader)


def lonely(net, made, job: Job) -> list[int]:
    """Its tokens, whatever ends a text: by transformers, or where they are drawn, with nobody
    beside it."""
    if job.sampling == GREEDY:
        return alone(net, job)
    backend, reader = made(frozenset(), rows=1, places=CONTEXT), Reader(job)
    served(backend, [reader])
    return reader.ids


def numbers(net, reader: Reader) -> None:
    """Those of the last token are of its place."""
    job = reader.job
    if job.logprobs is None or not reader.tokens:
        assert all(token.logprob is None for token in reader.tokens)
        return
    ids = torch.tensor([job.prompt + reader.ids[:-1]])
    with torch.inference_mode():
        meant = with_logprobs(reader.ids[-1], net(ids).logits[0, -1], job.logprobs)
    assert reader.tokens[-1].logprob == pytest.approx(meant.logprob, abs=1e-4)
    assert [log for _, log in reader.tokens[-1].top] == pytest.approx(
        [log for _, log in meant.top], abs=1e-4
    )
