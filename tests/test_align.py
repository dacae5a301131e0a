"""Aligned targets and corrected biases are what their formulas say, and do what they are for."""

import pytest
import torch
from tools import multiply_in

from quantkit.core.qweight import Scheme
from quantkit.core.stats import Moments
from quantkit.methods import align, factor, products, rtn
from quantkit.methods.gptq import relative_error

OUT, WIDTH, TOKENS = 12, 48, 400


def data():
    """A weight, inputs, and output differences that depend on the inputs in part (float64)."""
    g = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = normal(TOKENS, 16) @ normal(16, WIDTH) + 0.3 * normal(TOKENS, WIDTH) + 0.5 * normal(WIDTH)
    weight = normal(OUT, WIDTH)
    missing = 0.1 * x @ normal(WIDTH, OUT) + 0.5 * normal(TOKENS, OUT) + normal(OUT)
    return weight, x, missing


def moments(x, missing, centred=False):
    mean, drift = x.mean(0), missing.mean(0)
    if centred:
        x, missing = x - mean, missing - drift
    return Moments(x.T @ x / len(x), mean, missing.T @ x / len(x), drift)


def aligned_target(weight, stats, fraction, damp):
    """What a weight is rounded towards, as gptq.solve makes it; inputs in any order."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(7)).to(
        weight.device
    )
    before = stats.gram.clone()
    factor.permute(stats.gram, order)
    with factor.factored(stats.gram, damp) as (energy, _):
        lost = align.Lost(stats.cross, fraction)
        change = align.correction(lost, stats.gram, energy, order)
    factor.permute(stats.gram, torch.argsort(order))
    assert torch.equal(stats.gram, before)  # given back whole
    return weight + change[torch.argsort(order)].T


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("damp", [0.001, 0.01, 0.5])
def test_target_is_the_regularised_least_squares_correction(fraction, damp):
    weight, x, missing = data()
    gram = x.T @ x / TOKENS
    regularised = gram + damp * gram.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    correction = (missing.T @ x / TOKENS) @ torch.linalg.inv(regularised)
    found = aligned_target(weight, moments(x, missing), fraction, damp)
    torch.testing.assert_close(found, weight + fraction * correction, rtol=1e-9, atol=1e-11)


def test_inputs_that_are_always_zero_change_nothing():
    weight, x, missing = data()
    found = aligned_target(weight, moments(torch.zeros_like(x), missing), 0.5, 0.01)
    assert torch.equal(found, weight)


@pytest.mark.parametrize("block", [16, 20, 48, 64])
def test_a_gpu_solves_in_blocks(monkeypatch, block):
    """A GPU's way, with the CPU's products: as near as 17 bits are."""
    weight, x, missing = data()
    stats = moments(x, missing)
    expected = aligned_target(weight, stats, 0.5, 0.01)
    before = stats.cross.clone()
    multiply_in(torch.float64, monkeypatch)
    monkeypatch.setattr(products, "splits", lambda matrix: True)
    monkeypatch.setattr(factor, "_GPU_BLOCK", block)
    monkeypatch.setattr(factor, "_SMALL", 6)
    found = aligned_target(weight, stats, 0.5, 0.01)
    assert torch.equal(stats.cross, before)
    off = float((found - expected).norm() / (expected - weight).norm())
    assert 0 < off < 1e-3


def test_fraction_zero_leaves_the_weight():
    weight, x, missing = data()
    assert torch.equal(aligned_target(weight, moments(x, missing), 0.0, 0.01), weight)


def test_target_gives_back_what_the_inputs_can_explain():
    weight, x, _ = data()
    lost = torch.randn(OUT, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    target = aligned_target(weight, moments(x, x @ lost.T), 1.0, 1e-9)
    torch.testing.assert_close(target, weight + lost, rtol=1e-4, atol=1e-4)


def test_target_brings_outputs_nearer_to_the_wanted_ones():
    weight, x, missing = data()
    squared = []
    for fraction in (0.0, 0.5, 1.0):
        target = aligned_target(weight, moments(x, missing), fraction, 0.01)
        squared.append(float(((missing - x @ (target - weight).T) ** 2).sum()))
    assert squared[2] < squared[1] < squared[0]


def test_statistics_are_left_as_they_were():
    weight, x, missing = data()
    stats = moments(x, missing)
    before = [t.clone() for t in (stats.gram, stats.mean, stats.cross, stats.drift)]
    aligned_target(weight, stats, 0.5, 0.01)
    align.corrected_bias(torch.zeros(OUT), weight, weight * 0.9, stats, 0.5)
    for tensor, old in zip((stats.gram, stats.mean, stats.cross, stats.drift), before):
        assert torch.equal(tensor, old)


def test_corrected_bias_keeps_the_mean_output():
    weight, x, _ = data()
    bias = torch.linspace(-1, 1, OUT).double()
    quantized = rtn.quantize(weight, Scheme(3, 16)).dequantize().double()
    stats = Moments(x.T @ x / TOKENS, x.mean(0))
    corrected = align.corrected_bias(bias, weight, quantized, stats, 0.5)
    wanted = (x @ weight.T + bias).mean(0)
    torch.testing.assert_close((x @ quantized.T + corrected).mean(0), wanted)
    assert float((x @ quantized.T + bias - wanted).mean(0).abs().max()) > 0.01


def test_corrected_bias_takes_up_the_mean_of_what_was_missing():
    weight, x, missing = data()
    bias = torch.linspace(-1, 1, OUT).double()
    quantized = rtn.quantize(weight, Scheme(3, 16)).dequantize().double()
    for fraction in (0.5, 1.0):
        corrected = align.corrected_bias(bias, weight, quantized, moments(x, missing), fraction)
        wanted = (x @ weight.T + bias).mean(0) + fraction * missing.mean(0)
        torch.testing.assert_close((x @ quantized.T + corrected).mean(0), wanted)


def test_centred_target_and_bias_together_are_a_regression_with_intercept():
    """With everything given back and next to no damping, the layer is the best affine map."""
    weight, x, missing = data()
    stats = moments(x, missing, centred=True)
    target = aligned_target(weight, stats, 1.0, 1e-12)
    bias = align.corrected_bias(torch.zeros(OUT).double(), weight, target, stats, 1.0)
    wanted = x @ weight.T + missing
    inputs = torch.cat([x, torch.ones(TOKENS, 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(inputs, wanted).solution
    torch.testing.assert_close(torch.cat([target, bias[:, None]], 1).T, best, rtol=1e-6, atol=1e-6)


def test_centred_gram_measures_the_error_that_a_bias_cannot_take_up():
    weight, x, missing = data()
    quantized = rtn.quantize(weight, Scheme(3, 16)).dequantize().double()
    stats = moments(x, missing, centred=True)
    centred = x - x.mean(0)
    expected = ((centred @ (weight - quantized).T) ** 2).sum() / ((centred @ weight.T) ** 2).sum()
    error, _ = relative_error(weight, quantized, stats.gram)
    assert float(error) == pytest.approx(float(expected))
