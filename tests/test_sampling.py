"""Sampling: what is kept, what is drawn, what is refused; transformers is the referee."""

import math

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as referee

from quantkit.core import sampling
from quantkit.core.sampling import Sampler, Sampling, chosen
from quantkit.errors import QuantkitError, UsageError

VOCAB = 1000


def logits(seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def expected(scores: torch.Tensor, s: Sampling, seen: list[int]) -> torch.Tensor:
    """Probabilities [vocab] as transformers has them."""
    steps = LogitsProcessorList()
    if s.repetition_penalty != 1:
        steps.append(referee.RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    steps.append(referee.TemperatureLogitsWarper(float(s.temperature)))
    if s.top_k:
        steps.append(referee.TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        steps.append(referee.TopPLogitsWarper(s.top_p))
    if s.min_p:
        steps.append(referee.MinPLogitsWarper(s.min_p))
    return torch.softmax(steps(torch.tensor([seen]), scores[None])[0], 0)


SETTINGS = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(top_k=7),
    Sampling(top_k=5000),
    Sampling(top_p=0.6),
    Sampling(temperature=8.0, top_p=0.97),  # more than is looked at first
    Sampling(top_p=1e-9),
    Sampling(min_p=0.2),
    Sampling(temperature=0.8, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_is_drawn_from_is_what_transformers_draws_from(settings):
    seen = [3, 5, 5, 900]
    for seed in range(5):
        scores = logits(seed)
        penal = settings.repetition_penalty != 1
        given = sampling.penalized(scores, [3, 5, 900], 1.3) if penal else scores
        shares, ids = sampling.candidates(given, settings)
        found = torch.zeros(VOCAB)
        found[torch.arange(VOCAB) if ids is None else ids] = shares / shares.sum()
        torch.testing.assert_close(found, expected(scores, settings, seen), atol=1e-6, rtol=1e-4)


def test_draws_follow_the_distribution():
    settings = Sampling(temperature=1.0, top_k=5, seed=1)
    scores = logits(spread=1.0)
    sampler = Sampler(settings)
    drawn = torch.tensor([sampler.next(scores) for _ in range(20000)])
    found = torch.bincount(drawn, minlength=VOCAB) / len(drawn)
    assert (found - expected(scores, settings, [0])).abs().max() < 0.015


def test_a_seed_repeats_and_none_does_not():
    def drawn(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(seed=seed))
        return [sampler.next(logits(spread=0.1)) for _ in range(20)]

    assert drawn(7) == drawn(7) != drawn(8)
    assert drawn(None) != drawn(None)


def test_temperature_zero_takes_the_likeliest():
    for settings in (Sampling(temperature=0, top_p=0.1), Sampling(top_k=1)):
        assert settings.greedy
        assert Sampler(settings).next(logits()) == int(logits().argmax())
    assert not Sampling().greedy


def test_a_penalty_holds_for_the_prompt_and_for_what_was_drawn():
    scores = torch.tensor([1.0, 0.9, 0.8, -1.0])
    assert Sampler(Sampling(temperature=0, repetition_penalty=2.0), [0]).next(scores) == 1
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2.0))
    assert [sampler.next(scores) for _ in range(4)] == [0, 1, 2, 0]
    assert sampling.penalized(scores, [3], 2.0)[3] == -2
    assert torch.equal(scores, torch.tensor([1.0, 0.9, 0.8, -1.0]))


def test_a_share_that_float32_does_not_have_leaves_the_likeliest():
    scores = logits()
    assert Sampler(Sampling(top_p=1e-300, seed=1)).next(scores) == int(scores.argmax())


@pytest.mark.parametrize("settings", [Sampling(temperature=0), Sampling(top_p=0.5), Sampling()])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_predictions_that_are_no_numbers_are_told(settings, value):
    scores = logits()
    scores[3] = value
    with pytest.raises(QuantkitError, match="predictions are not numbers"):
        Sampler(settings).next(scores)


def test_settings_that_are_not_given_are_the_model_s():
    model = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None}
    assert chosen(model, {}) == Sampling(0.6, 0.9)
    assert chosen(model, {"top_p": None, "temperature": 1.2}) == Sampling(1.2, 0.9)
    assert chosen(model, {"temperature": 0, "seed": 3}) == Sampling(0, 0.9, seed=3)
    greedy = {"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}
    assert chosen(greedy, {}) == Sampling(0.0, repetition_penalty=1.1)
    assert chosen(greedy, {"top_p": 0.5}) == Sampling(0.6, 0.5, repetition_penalty=1.1)
    assert chosen({}, {}).greedy
    assert chosen({}, {"repetition_penalty": 1.5}).greedy
    assert not chosen({}, {"min_p": 0.1}).greedy


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-1, math.inf, math.nan]),
        ("top_p", [0, 1.5, math.nan]),
        ("top_k", [-3]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("repetition_penalty", [0, -1, 1e-39, 1e10, math.inf, math.nan]),
        ("seed", [-1, 2**63]),
    ],
)
def test_values_out_of_range_are_refused(name, values):
    for value in values:
        with pytest.raises(UsageError, match="--" + name.replace("_", "-")):
            Sampling(**{name: value})
