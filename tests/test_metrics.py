"""KL, agreement, perplexity and their errors equal an independent float64 computation."""

import numpy as np
import pytest
import torch

from quantkit.core import metrics
from quantkit.core.metrics import Comparison, Estimate


def row(tokens, vocabulary=40, seed=0, difference=0.5):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (tokens,), generator=g)
    reference = 3 * torch.randn(tokens, vocabulary, generator=g)
    other = reference + difference * torch.randn(tokens, vocabulary, generator=g)
    return ids, reference, other


def log_softmax(logits):
    x = logits.double().numpy()
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def by_hand(ids, reference, other):
    """KL, agreement and both mean negative log-likelihoods of a row."""
    p, q, ids = log_softmax(reference), log_softmax(other), ids.numpy()
    kl = (np.exp(p) * (p - q)).sum(1).mean()
    top1 = (p.argmax(1) == q.argmax(1)).mean()
    steps = np.arange(len(ids) - 1)
    return kl, top1, -p[steps, ids[1:]].mean(), -q[steps, ids[1:]].mean()


# 512 tokens are treated at a time; 513 leaves a chunk of one, whose next token does not exist
@pytest.mark.parametrize("tokens", [2, 7, 511, 512, 513, 1100])
def test_one_row(tokens):
    parts = row(tokens)
    comparison = Comparison()
    comparison.add("en", *parts)
    found = comparison.sets()["en"]
    kl, top1, before, after = by_hand(*parts)
    assert found.kl.mean == pytest.approx(kl, rel=1e-5)
    assert found.top1.mean == pytest.approx(top1, abs=1e-6)
    assert found.reference_perplexity == pytest.approx(np.exp(before), rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(after), rel=1e-5)
    assert found.kl.error is None


def test_rows_weigh_the_same_and_give_a_standard_error():
    rows = [row(tokens, seed=seed) for seed, tokens in enumerate((9, 30, 700, 51))]
    comparison = Comparison()
    for parts in rows:
        comparison.add("ja", *parts)
    found = comparison.sets()["ja"]
    kl, top1, before, after = np.array([by_hand(*parts) for parts in rows]).T
    for estimate, values in ((found.kl, kl), (found.top1, top1)):
        assert estimate.mean == pytest.approx(values.mean(), rel=1e-5)
        assert estimate.error == pytest.approx(values.std(ddof=1) / np.sqrt(4), rel=1e-4)
    assert found.reference_perplexity == pytest.approx(np.exp(before.mean()), rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(after.mean()), rel=1e-5)


def test_sets_weigh_the_same():
    comparison = Comparison()
    for seed in range(3):
        comparison.add("en", *row(40, seed=seed))
    for seed in range(2):
        comparison.add("ja", *row(40, seed=10 + seed, difference=1.5))
    en, ja = comparison.sets()["en"], comparison.sets()["ja"]
    kl, top1 = comparison.overall()
    assert kl.mean == pytest.approx((en.kl.mean + ja.kl.mean) / 2)
    assert kl.error == pytest.approx(np.hypot(en.kl.error, ja.kl.error) / 2)
    assert top1.mean == pytest.approx((en.top1.mean + ja.top1.mean) / 2)
    assert top1.error == pytest.approx(np.hypot(en.top1.error, ja.top1.error) / 2)


def test_the_divergence_is_of_the_model_from_the_reference():
    """KL is not symmetric: swapped, it is another number."""
    ids, reference, other = row(50, difference=2.0)
    found = []
    for pair in ((reference, other), (other, reference)):
        comparison = Comparison()
        comparison.add("en", ids, *pair)
        found.append(comparison.sets()["en"].kl.mean)
        assert found[-1] == pytest.approx(by_hand(ids, *pair)[0], rel=1e-5)
    assert found[0] != pytest.approx(found[1], rel=1e-2)


def test_a_model_is_no_distance_from_itself():
    ids, reference, _ = row(60)
    comparison = Comparison()
    comparison.add("en", ids, reference, reference + 5)  # a constant changes no probability
    found = comparison.sets()["en"]
    assert found.kl.mean == pytest.approx(0, abs=1e-6)
    assert found.top1.mean == 1
    assert found.perplexity == pytest.approx(found.reference_perplexity)


def test_half_precision_logits_are_compared_in_float32():
    ids, reference, other = row(80)
    reference, other = reference.bfloat16(), other.bfloat16()
    comparison = Comparison()
    comparison.add("en", ids, reference, other)
    kl, _, before, _ = by_hand(ids, reference, other)
    assert comparison.sets()["en"].kl.mean == pytest.approx(kl, rel=1e-4)
    assert comparison.sets()["en"].reference_perplexity == pytest.approx(np.exp(before), rel=1e-4)


def test_a_row_of_one_token_is_left_out():
    comparison = Comparison()
    comparison.add("en", *row(30))
    alone = comparison.sets()["en"]
    comparison.add("en", *row(1, seed=1))
    assert comparison.sets()["en"] == alone


def test_the_size_of_chunks_changes_nothing(monkeypatch):
    parts = row(100)
    results = []
    for chunk in (512, 7, 1):
        monkeypatch.setattr(metrics, "_CHUNK", chunk)
        comparison = Comparison()
        comparison.add("en", *parts)
        found = comparison.sets()["en"]
        results.append((found.kl.mean, found.top1.mean, found.perplexity))
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert results[2] == pytest.approx(results[0], rel=1e-5)


def test_estimate_of_values():
    values = [0.1, 0.4, 0.25, 0.3]
    found = Estimate.of(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.error == pytest.approx(np.std(values, ddof=1) / 2)
    assert Estimate.of([0.7]) == Estimate(0.7, None)


def test_every_measure_against_numpy():
    """Rows of several lengths; single tokens count for percentiles, rows for means and errors."""
    rows = [row(tokens, seed=seed, difference=1.0) for seed, tokens in enumerate((40, 25, 520))]
    comparison = Comparison()
    for parts in rows:
        comparison.add("en", *parts)
    kl, top5, lost, rise = [], [], [], []
    for ids, reference, other in rows:
        p, q, ids = log_softmax(reference), log_softmax(other), ids.numpy()
        kl.append((np.exp(p) * (p - q)).sum(1))
        five = np.argsort(-q, axis=1)[:, :5]
        top5.append((five == p.argmax(1)[:, None]).any(1).mean())
        steps = np.arange(len(ids) - 1)
        before, after = p[steps, ids[1:]], q[steps, ids[1:]]
        lost.append((np.exp(before) - np.exp(after)).mean())
        rise.append((before - after).mean())
    found = comparison.described()["sets"]["en"]
    tokens = np.concatenate(kl)
    assert found["tokens"] == 585 and found["rows"] == 3
    for key, share in (("kl_p95", 0.95), ("kl_p99", 0.99), ("kl_max", 1.0)):
        assert found[key] == pytest.approx(np.quantile(tokens, share), rel=1e-4)
    means = {"kl": [x.mean() for x in kl], "top5": top5, "probability_lost": lost}
    for key, values in means.items():
        assert found[key] == pytest.approx(np.mean(values), rel=1e-4, abs=1e-7)
        error = np.std(values, ddof=1) / np.sqrt(3)
        assert found[f"{key}_error"] == pytest.approx(error, rel=1e-3)
    assert found["perplexity_ratio"] == pytest.approx(np.exp(np.mean(rise)), rel=1e-5)
    error = np.exp(np.mean(rise)) * np.std(rise, ddof=1) / np.sqrt(3)
    assert found["perplexity_ratio_error"] == pytest.approx(error, rel=1e-4)
    ratio = found["perplexity"] / found["reference_perplexity"]
    assert found["perplexity_ratio"] == pytest.approx(ratio, rel=1e-6)
    histogram = comparison.histogram()
    edges, counts = histogram["edges"], histogram["counts"]["en"]
    assert np.allclose(edges, np.logspace(-6, 1, 71))
    assert counts == np.histogram(np.clip(tokens, edges[0], edges[-1]), edges)[0].tolist()


def test_the_ratio_of_several_sets_is_their_geometric_mean():
    comparison = Comparison()
    for seed in range(4):
        comparison.add(("en", "ja")[seed % 2], *row(40, seed=seed, difference=1 + seed))
    found = comparison.described()
    ratios = [one["perplexity_ratio"] for one in found["sets"].values()]
    assert found["perplexity_ratio"] == pytest.approx(np.sqrt(np.prod(ratios)))


def test_one_row_has_no_error_and_says_so():
    comparison = Comparison()
    comparison.add("en", *row(40))
    found = comparison.described()
    assert found["kl_error"] is None
    assert all(found["sets"]["en"][f"{key}_error"] is None for key in ("kl", "top1", "top5"))
    assert metrics.shown(found["kl"], found["kl_error"]).endswith("± -")


def test_what_is_no_number_stays_none():
    """Neither model's logits: nothing agrees, nothing is counted in the histogram."""
    ids, reference, other = row(40)
    other[7] = float("nan")
    comparison = Comparison()
    kl = comparison.add("en", ids, reference, other)
    assert torch.isnan(kl).nonzero().flatten().tolist() == [7]
    found = comparison.described()["sets"]["en"]
    assert all(np.isnan(found[key]) for key in ("kl", "kl_p99", "kl_max", "perplexity_ratio"))
    assert sum(comparison.histogram()["counts"]["en"]) == 39
    alone = Comparison()
    alone.add("en", ids[:2], reference[7:9], other[[7, 7]])
    assert alone.described()["top5"] == 0
