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
    """Rounded to nearest, in the conventions of refine: columns, hessian, levels, grid."""
    weight, hessian = problem()
    columns = weight.T.contiguous()
    parts = columns.split(scheme.width(WIDTH))
    grids = [scales.from_range(part, scheme) for part in parts]
    levels = torch.cat([scales.nearest(part, grid) for part, grid in zip(parts, grids)])
    return columns, hessian, levels, scales.together(grids, torch.stack)


def spread(per_group):
    """[groups, out] -> [in, out]; a number stays one."""
    if isinstance(per_group, float):
        return per_group
    return per_group.repeat_interleave(WIDTH // len(per_group), 0)


def row_objectives(columns, hessian, levels, grid):
    error = columns - levels * spread(grid.scale)
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


def refit(columns, hessian, levels, grid):
    return refine.refit(hessian @ columns, hessian, levels, grid)


@every_scheme
def test_refit_makes_no_row_worse(scheme):
    columns, hessian, levels, grid = start(scheme)
    before = row_objectives(columns, hessian, levels, grid)
    fitted = refit(columns, hessian, levels, grid)
    assert_not_worse(row_objectives(columns, hessian, levels, fitted), before)


@every_scheme
def test_refit_finds_the_least_squares_scales(scheme):
    """Against an explicit least-squares problem a row, rounded to float16 afterwards."""
    columns, hessian, levels, grid = start(scheme)
    scale = grid.scale
    fitted = refit(columns, hessian, levels, grid).scale
    root = torch.linalg.cholesky(hessian, upper=True)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_systems_are_solved_alike_on_every_device(dtype):
    columns, hessian, levels, grid = start(Scheme(4, 16))
    hessian, levels = hessian.to(dtype), levels.to(dtype)
    wanted = hessian @ columns.to(dtype)
    system, right = refine._normal_equations(wanted, hessian, levels, len(grid.scale))
    found, expected = (way(system, right) for way in (refine._by_cholesky, refine._by_elimination))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("way", ["_by_cholesky", "_by_elimination"])
def test_a_row_without_a_solution_keeps_its_scales(monkeypatch, way):
    """Levels that are all zero leave nothing to solve for; others are solved as ever."""
    columns, hessian, levels, grid = start(Scheme(4, 16))
    whole = refit(columns, hessian, levels, grid)
    levels[:, 3] = 0
    levels[32:, 5] = 0
    monkeypatch.setattr(refine, "_by_elimination", getattr(refine, way))
    monkeypatch.setattr(refine, "_RIDGE", -2.0)  # no system is positive definite any more
    spoiled = refit(columns, hessian, levels, grid)
    assert spoiled.scale.isfinite().all()
    before = row_objectives(columns, hessian, levels, grid)
    after = row_objectives(columns, hessian, levels, spoiled)
    assert bool((after <= before * (1 + 1e-9)).all())
    monkeypatch.setattr(refine, "_RIDGE", 1e-6)
    fitted = refit(columns, hessian, levels, grid)
    assert torch.equal(fitted.scale[:, 3], grid.scale[:, 3])
    others = [row for row in range(OUT) if row not in (3, 5)]
    torch.testing.assert_close(fitted.scale[:, others], whole.scale[:, others])


def test_refit_keeps_old_scales_that_float16_makes_better():
    """Rounding each of the best scales by itself is not the best choice of float16 numbers."""
    scheme = Scheme(4, 16)
    columns, hessian, levels, grid = start(scheme)
    rounded = refit(columns, hessian, levels, grid).scale
    better = rounded.clone()
    for g in range(len(better)):
        for step in (-1, 1):  # one unit in the last place
            other = better.clone()
            other[g] = (better[g].half().view(torch.int16) + step).view(torch.float16).double()
            gain = row_objectives(columns, hessian, levels, grid._replace(scale=other))
            now = row_objectives(columns, hessian, levels, grid._replace(scale=better))
            gain = gain < now * (1 - 1e-9)
            better = torch.where(gain, other, better)
    improved = (better != rounded).any(0)
    assert int(improved.sum()) > OUT // 2
    again = refit(columns, hessian, levels, grid._replace(scale=better)).scale
    assert torch.equal(again[:, improved], better[:, improved])


def test_refit_is_the_same_in_pieces(monkeypatch):
    scheme = Scheme(4, 16, False)
    parts = start(scheme)
    whole = refit(*parts)
    monkeypatch.setattr(refine, "_SYSTEM_BYTES", 4 * 12 * 12 * 3)  # three rows at a time
    torch.testing.assert_close(refit(*parts).scale, whole.scale)


@every_scheme
def test_polish_makes_no_row_worse(scheme):
    columns, hessian, levels, grid = start(scheme)
    before = row_objectives(columns, hessian, levels, grid)
    refine.polish(columns, hessian, levels, grid)
    assert_not_worse(row_objectives(columns, hessian, levels, grid), before)
    assert bool((levels >= spread(grid.low)).all())
    assert bool((levels <= spread(grid.high)).all())


@every_scheme
def test_polish_is_coordinate_descent(scheme):
    """Against a loop that works out the best code of every column from scratch."""
    columns, hessian, levels, grid = start(scheme)
    expected = levels.clone()
    scale, low = spread(grid.scale), torch.as_tensor(spread(grid.low)).expand_as(levels)
    for i in range(WIDTH):
        error = columns - expected * scale
        error[i] = 0
        wanted = columns[i] + (hessian[i] @ error) / hessian[i, i]
        code = (wanted / scale[i] - low[i]).round().clamp(0, scheme.max_code)
        expected[i] = code + low[i]
    refine.polish(columns, hessian, levels, grid)
    assert torch.equal(levels, expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_after_enough_polish_no_single_code_can_improve(symmetric):
    scheme = Scheme(3, 32, symmetric)
    columns, hessian, levels, grid = start(scheme)
    for _ in range(50):
        before = levels.clone()
        refine.polish(columns, hessian, levels, grid)
        if torch.equal(levels, before):
            break
    else:
        pytest.fail("polish does not come to rest")
    best = row_objectives(columns, hessian, levels, grid)
    low, high = (torch.as_tensor(spread(x)).expand_as(levels) for x in (grid.low, grid.high))
    for i in range(WIDTH):
        for step in (-1, 1):
            other = levels.clone()
            other[i] = torch.clamp(other[i] + step, low[i], high[i])
            changed = row_objectives(columns, hessian, other, grid)
            assert bool((changed >= best * (1 - 1e-9)).all())
