"""AWQ's mathematics: scales that lower what rounding loses, under any Hessian."""

import pytest
import torch

from quantkit.core.qweight import Scheme
from quantkit.methods import awq, gptq, rtn, scales

OUT, IN = 48, 64
SCHEME = Scheme(4, 32, symmetric=False)


def problem(outliers: float = 20.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Hessian of inputs a few of which are much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator)
    x = torch.randn(512, IN, generator=generator) @ (
        torch.eye(IN) + 0.1 * torch.randn(IN, IN, generator=generator)
    )
    x[:, ::16] *= outliers
    return weight, x.T @ x / len(x)


def nearest(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    return awq.rounded(weight, hessian, SCHEME).dequantize()


def by_gptq(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    options = gptq.Options(rounds=0)
    return gptq.solve(weight, hessian, SCHEME, options).qweight.dequantize()


EACH = torch.arange(IN)


@pytest.mark.parametrize("rounding", [nearest, by_gptq])
def test_large_inputs_are_scaled_up_and_lose_less(rounding):
    weight, hessian = problem()
    choice = awq.choose(weight, hessian, EACH, rounding, lambda s: s)
    assert choice.scale is not None and choice.loss < 0.95
    assert choice.scale[::16].min() > choice.scale[1::16].max()
    # the loss is the one of the linear: |x W^T - (x / s) Q(W s)^T|^2, by hand
    lost = (
        weight
        - rounding(weight * choice.scale, awq.scaled_hessian(hessian, choice.scale)) / choice.scale
    )
    plain = weight - rounding(weight, hessian)
    by_hand = torch.trace(lost @ hessian @ lost.T) / torch.trace(plain @ hessian @ plain.T)
    assert choice.loss == pytest.approx(float(by_hand), rel=1e-3)


def test_the_identity_wins_where_nothing_helps():
    weight, hessian = problem()

    def spoiled(w, h):
        return w * (0.9 if torch.equal(w, weight) else 0.5)

    choice = awq.choose(weight, hessian, EACH, spoiled, lambda s: s)
    assert (choice.scale, choice.energy, choice.peak, choice.loss) == (None, 0.0, 0.0, 1.0)


def test_tied_inputs_get_one_scale():
    weight, hessian = problem()
    source = EACH // 4
    scales_of = awq.family(weight, hessian, source)
    for pair in ((0.5, 0.0), (0.0, 0.5), (0.8, 0.35)):
        scale = scales_of(*pair)
        assert torch.equal(scale, scale[::4].repeat_interleave(4))


def test_what_is_stored_is_what_is_tried():
    """Scales that the stored inverse rounds off are compared as they will be."""
    weight, hessian = problem()
    tried = []

    def stored(scale):
        tried.append(1 / (1 / scale).half().float())
        return tried[-1]

    choice = awq.choose(weight, hessian, EACH, nearest, stored)
    assert 2 * len(awq.EXPONENTS) - 2 <= len(tried) < len(awq.EXPONENTS) ** 2
    assert any(choice.scale is scale for scale in tried)


def test_dead_inputs_and_empty_columns_do_no_harm():
    weight, hessian = problem()
    hessian[3] = hessian[:, 3] = 0
    weight[:, 5] = 0
    for rounding in (nearest, by_gptq):
        choice = awq.choose(weight, hessian, EACH, rounding, lambda s: s)
        assert choice.scale is not None and bool(choice.scale.isfinite().all())
        assert choice.loss < 1
    nothing = awq.choose(torch.zeros(OUT, IN), torch.zeros(IN, IN), EACH, nearest, lambda s: s)
    assert nothing.scale is None


@pytest.mark.parametrize("symmetric", [True, False])
def test_searched_ranges_lose_less_than_whole_ones(symmetric):
    weight, hessian = problem()
    scheme = Scheme(3, 32, symmetric)
    q, plain = awq.rounded(weight, hessian, scheme), rtn.quantize(weight, scheme)
    assert q.scheme == plain.scheme == scheme
    lost = [gptq.relative_error(weight, found.dequantize(), hessian)[0] for found in (q, plain)]
    assert lost[0] < 0.95 * lost[1]
    # every code is the nearest in its group's grid
    width = scheme.width(IN)
    for group in range(IN // width):
        part = slice(group * width, (group + 1) * width)
        zero = scheme.midpoint if q.zero is None else q.zero[:, group, None].float()
        wanted = (weight[:, part] / q.scale[:, group, None].float() + zero).round()
        wanted = wanted.clamp(0, scheme.max_code)
        assert float((wanted == q.codes[:, part]).float().mean()) > 0.99


def test_zero_points_start_where_the_format_allows():
    weight = problem()[0].abs()  # its groups would have zero points of 0
    assert int(awq.rounded(weight, torch.eye(IN), SCHEME).zero.min()) == 0
    assert int(awq.rounded(weight, torch.eye(IN), SCHEME, zero_min=1).zero.min()) == 1
    assert awq.rounded(weight, torch.eye(IN), SCHEME).scale.dtype == scales.SCALE_DTYPE
