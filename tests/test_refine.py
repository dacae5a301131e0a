"""Scale refits and code polishing only ever lower the objective, and end where they should."""

from itertools import pairwise

import pytest
import torch

from quantkit.core.qweight import Scheme
from quantkit.methods import refine, scales
from quantkit.methods.gptq import Options, solve

OUT, WIDTH = 8, 192


def problem(out=OUT, width=WIDTH):
    """A weight and a positive definite Hessian, float64."""
    g = torch.Generator().manual_seed(11)
    x = torch.randn(500, width // 4, generator=g, dtype=torch.float64)
    x = x @ torch.randn(width // 4, width, generator=g, dtype=torch.float64)
    x = x / 8 + 0.3 * torch.randn(500, width, generator=g, dtype=torch.float64)
    weight = torch.randn(out, width, generator=g, dtype=torch.float64)
    hessian = x.T @ x / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    return weight, hessian


def start(scheme):
    """Rounded to nearest, in the conventions of refine: columns, hessian, codes, scale, zero."""
    weight, hessian = problem()
    columns = weight.T.contiguous()
    width = scheme.width(WIDTH)
    grids = [scales.from_range(part, scheme) for part in columns.split(width)]
    codes = [
        scales.encode(part, grid, scheme.max_code)
        for part, grid in zip(columns.split(width), grids)
    ]
    zero = float(scheme.midpoint) if scheme.symmetric else torch.stack([g.zero for g in grids])
    return columns, hessian, torch.cat(codes), torch.stack([g.scale for g in grids]), zero


def spread(per_group, codes):
    """[groups, out] -> [in, out]; a number stays one."""
    if isinstance(per_group, float):
        return per_group
    return per_group.repeat_interleave(len(codes) // len(per_group), 0)


def decoded(codes, scale, zero):
    return (codes - spread(zero, codes)) * spread(scale, codes)


def row_objectives(columns, hessian, codes, scale, zero):
    error = columns - decoded(codes, scale, zero)
    return (error * (hessian @ error)).sum(0)


def assert_not_worse(after, before):
    assert bool((after <= before * (1 + 1e-9)).all())
    assert float(after.sum()) < float(before.sum())


every_scheme = pytest.mark.parametrize(
    "scheme",
    [
        Scheme(bits, group, symmetric)
        for bits in (2, 3, 4, 8)
        for group in (16, 96, -1)
        for symmetric in (True, False)
    ],
    ids=str,
)


@pytest.mark.parametrize("act_order", ["static", "none", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 16), (4, 96), (4, -1), (8, 32)])
def test_every_round_lowers_the_objective(bits, group, symmetric, act_order):
    weight, hessian = problem()
    reached = []
    for rounds in range(4):
        options = Options(act_order, damp=1e-9, rounds=rounds)
        q = solve(weight, hessian, Scheme(bits, group, symmetric), options).qweight
        error = weight - q.dequantize().double()
        reached.append(((error @ hessian) * error).sum(1))
    for before, after in pairwise(reached):
        assert bool((after <= before * (1 + 1e-7)).all())
    assert float(reached[1].sum()) < float(reached[0].sum())


@every_scheme
def test_refit_makes_no_row_worse(scheme):
    columns, hessian, codes, scale, zero = start(scheme)
    before = row_objectives(columns, hessian, codes, scale, zero)
    fitted = refine.refit(columns, hessian, codes, scale, zero, scheme)
    assert_not_worse(row_objectives(columns, hessian, codes, fitted, zero), before)


@every_scheme
def test_refit_finds_the_least_squares_scales(scheme):
    """Against an explicit least-squares problem a row, rounded to float16 afterwards."""
    columns, hessian, codes, scale, zero = start(scheme)
    fitted = refine.refit(columns, hessian, codes, scale, zero, scheme)
    root = torch.linalg.cholesky(hessian, upper=True)
    levels = codes - spread(zero, codes)
    groups = len(scale)
    changed = 0
    for row in range(OUT):
        design = torch.zeros(WIDTH, groups, dtype=torch.float64)
        for g, part in enumerate(levels[:, row].split(WIDTH // groups)):
            design[g * len(part) : (g + 1) * len(part), g] = part
        best = torch.linalg.lstsq(root @ design, root @ columns[:, row]).solution
        if not torch.equal(fitted[:, row], scale[:, row]):
            changed += 1
            # the ridge, and half a unit in the last place of float16
            torch.testing.assert_close(fitted[:, row], best, rtol=1e-3, atol=1e-6)
    assert changed > OUT // 2


def test_refit_keeps_old_scales_that_float16_makes_better():
    """Rounding each of the best scales by itself is not the best choice of float16 numbers."""
    scheme = Scheme(4, 16)
    columns, hessian, codes, scale, zero = start(scheme)
    rounded = refine.refit(columns, hessian, codes, scale, zero, scheme)
    better = rounded.clone()
    for g in range(len(scale)):
        for step in (-1, 1):  # one unit in the last place
            other = better.clone()
            other[g] = (better[g].half().view(torch.int16) + step).view(torch.float16).double()
            gain = row_objectives(columns, hessian, codes, other, zero)
            gain = gain < row_objectives(columns, hessian, codes, better, zero) * (1 - 1e-9)
            better = torch.where(gain, other, better)
    improved = (better != rounded).any(0)
    assert int(improved.sum()) > OUT // 2
    again = refine.refit(columns, hessian, codes, better, zero, scheme)
    assert torch.equal(again[:, improved], better[:, improved])


def test_refit_is_the_same_in_pieces(monkeypatch):
    scheme = Scheme(4, 16, False)
    parts = start(scheme)
    whole = refine.refit(*parts, scheme)
    monkeypatch.setattr(refine, "_SYSTEM_BYTES", 4 * 12 * 12 * 3)  # three rows at a time
    torch.testing.assert_close(refine.refit(*parts, scheme), whole)


@every_scheme
def test_polish_makes_no_row_worse(scheme):
    columns, hessian, codes, scale, zero = start(scheme)
    before = row_objectives(columns, hessian, codes, scale, zero)
    refine.polish(columns, hessian, codes, scale, zero, scheme)
    assert_not_worse(row_objectives(columns, hessian, codes, scale, zero), before)
    assert float(codes.min()) >= 0
    assert float(codes.max()) <= scheme.max_code


@every_scheme
def test_polish_is_coordinate_descent(scheme):
    """Against a loop that works out the best code of every column from scratch."""
    columns, hessian, codes, scale, zero = start(scheme)
    expected = codes.clone()
    for i in range(WIDTH):
        error = columns - decoded(expected, scale, zero)
        error[i] = 0
        wanted = columns[i] + (hessian[i] @ error) / hessian[i, i]
        s = spread(scale, codes)[i]
        z = zero if scheme.symmetric else spread(zero, codes)[i]
        expected[i] = (wanted / s + z).round().clamp(0, scheme.max_code)
    refine.polish(columns, hessian, codes, scale, zero, scheme)
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_after_enough_polish_no_single_code_can_improve(symmetric):
    scheme = Scheme(3, 32, symmetric)
    columns, hessian, codes, scale, zero = start(scheme)
    for _ in range(50):
        before = codes.clone()
        refine.polish(columns, hessian, codes, scale, zero, scheme)
        if torch.equal(codes, before):
            break
    else:
        pytest.fail("polish does not come to rest")
    best = row_objectives(columns, hessian, codes, scale, zero)
    for i in range(WIDTH):
        for step in (-1, 1):
            other = codes.clone()
            other[i] = (other[i] + step).clamp(0, scheme.max_code)
            changed = row_objectives(columns, hessian, other, scale, zero)
            assert bool((changed >= best * (1 - 1e-9)).all())
