"""The worst passages: the right ones, in whole characters, with both models' candidates."""

import random

import pytest
import torch

from quantkit.workflows.passages import Passages

TEXT = "霧の深い朝、漁師は𠮷野家の前で鰻を食べた。The café is 🍣🍵 closed! 鱧も鮪も鯱もいる。" * 6


def logits(count, vocabulary=8192, seed=0):
    return torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(seed))


def seen(tokenizer, ids, kl, label="ja"):
    passages = Passages(tokenizer)
    passages.see(label, torch.tensor(ids), kl, logits(len(ids)), logits(len(ids), seed=1))
    return passages.described()


def test_the_worst_come_first_and_do_not_overlap(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert len(ids) > 200
    kl = torch.full((len(ids),), 0.01)
    for at, value in ((150, 3.0), (151, 2.9), (60, 5.0)):
        kl[at] = value
    found = seen(tokenizer, ids, kl)
    assert [passage["kl"] for passage in found[:2]] == [5.0, 3.0]
    assert all(passage["kl"] < 2.9 for passage in found[2:])
    for passage in found[:2]:
        assert passage["tokens"][passage["at"]]["kl"] == pytest.approx(passage["kl"])
        assert passage["set"] == "ja"


def test_only_so_many_are_kept_of_many_rows(tokenizer):
    ids = tokenizer.encode(TEXT)[:30]
    passages = Passages(tokenizer)
    values = [float(value) for value in range(1, 31)]
    random.Random(0).shuffle(values)
    for value in values:
        kl = torch.zeros(30)
        kl[11] = value
        passages.see("en", torch.tensor(ids), kl, logits(30), logits(30))
    assert [one["kl"] for one in passages.described()] == [30.0 - i for i in range(8)]


@pytest.mark.parametrize("at", range(0, 120, 7))
def test_text_is_never_cut_inside_a_character(tokenizer, at):
    ids = tokenizer.encode(TEXT)
    kl = torch.rand(len(ids), generator=torch.Generator().manual_seed(at)) / 100
    kl[at] = 1.0
    passage = seen(tokenizer, ids, kl)[0]
    text = "".join(token["text"] for token in passage["tokens"])
    assert text in TEXT
    assert passage["tokens"][passage["at"]]["kl"] == 1.0
    assert all(token["text"] for token in passage["tokens"])
    assert 20 < len(passage["tokens"]) + 24 - min(at, 24) <= 49


def test_candidates_are_both_models_likeliest_tokens(tokenizer):
    ids = tokenizer.encode("The capital of the country")
    reference, other = logits(len(ids)), logits(len(ids), seed=1)
    word = tokenizer.encode(" city")[0]
    reference[3, word] = 30.0
    passages = Passages(tokenizer)
    passages.see("en", torch.tensor(ids), torch.tensor([0, 0, 0, 2.0, 0]), reference, other)
    (passage,) = passages.described()
    assert passage["reference"][0] == [" city", pytest.approx(1.0, abs=1e-3)]
    assert len(passage["reference"]) == len(passage["model"]) == 5
    expected = other[3].softmax(-1).topk(5).values.tolist()
    assert [p for _, p in passage["model"]] == pytest.approx(expected)


def test_what_is_no_number_is_worst(tokenizer):
    ids = tokenizer.encode(TEXT)[:100]
    kl = torch.full((100,), 0.5)
    kl[90] = float("nan")
    found = seen(tokenizer, ids, kl)
    assert found[0]["kl"] != found[0]["kl"]


def test_models_that_agree_have_none(tokenizer):
    ids = tokenizer.encode(TEXT)[:50]
    assert seen(tokenizer, ids, torch.zeros(50)) == []
