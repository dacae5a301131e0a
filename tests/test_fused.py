"""The Triton kernels of the solver beside the torch functions that they stand for.

They run under Triton's interpreter (conftest.py); on a GPU when QUANTKIT_TEST_GPU is set.
"""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def kernels_for_everything(monkeypatch):
    """What a CPU tensor would be kept from, outside of the interpreter."""
    from quantkit.methods import fused

    if INTERPRETED:
        monkeypatch.setattr(fused, "usable", lambda tensor: tensor.dtype == torch.float32)


# on a GPU large enough that what follows a flipped tie averages out
OUT, WIDTH, NEAR = (4096, 768, 1e-3) if DEVICE == "cuda" else (24, 96, 5e-3)
# codes: there errors are passed on, and scales compared, with 11 bits (0.969 on an H200)
SAME = 0.95 if DEVICE == "cuda" else 0.97


def problem(out=OUT, width=WIDTH, tokens=1024):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    x = torch.randn(tokens, width, generator=generator) @ mixing
    weight = torch.randn(out, width, generator=generator) / width**0.5
    return weight.to(DEVICE), (x.T @ x / tokens).to(DEVICE)


def objective(weight, hessian, q):
    error = (weight - q.dequantize()).double()
    return float(((error @ hessian.double()) * error).sum())


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "act_order", "rounds"),
    [
        (4, 32, True, "static", 0),
        (4, 32, False, "group", 2),
        (3, 48, True, "static", 1),
        (8, 96, False, "static", 0),
        (4, -1, True, "group", 1),
        (4, 24, False, "static", 2),  # groups begin and end between the columns of a step
    ],
)
def test_solver_reaches_the_objective_of_float64(bits, group, symmetric, act_order, rounds):
    from quantkit.core.qweight import Scheme
    from quantkit.methods.gptq import Options, solve

    weight, hessian = problem()
    scheme, options = Scheme(bits, group, symmetric), Options(act_order, rounds=rounds)
    fused = solve(weight, hessian, scheme, options).qweight
    exact = solve(weight.double(), hessian.double(), scheme, options).qweight
    found, expected = (objective(weight, hessian, q) for q in (fused, exact))
    assert found == pytest.approx(expected, rel=NEAR)
    assert (fused.codes == exact.codes).float().mean() > SAME


@pytest.mark.parametrize(("tile", "out"), [(32, 70), (48, 5)])
@pytest.mark.parametrize("ranged", [True, False])
def test_one_tile_is_rounded_as_torch_does(tile, out, ranged, monkeypatch):
    from quantkit.methods import fused, gptq
    from quantkit.methods.scales import Grid

    generator = torch.Generator().manual_seed(1)
    passed, columns = (torch.randn(tile, out, generator=generator).to(DEVICE) for _ in range(2))
    unit = torch.randn(tile, tile, generator=generator).to(DEVICE) / 8
    scale = (torch.rand(out, generator=generator).to(DEVICE) + 0.5) / 4
    low = torch.randint(-9, -5, (out,), generator=generator).float().to(DEVICE)
    grid = Grid(scale, low, low + 15) if ranged else Grid(scale, -8.0, 7.0)
    results = []
    for kernels in (True, False):
        monkeypatch.setattr(fused, "usable", lambda tensor, on=kernels: on)
        levels, errors = torch.empty_like(columns), torch.empty_like(columns)
        gptq._round_tile(passed, 0, columns, unit, grid, slice(0, tile), levels, errors)
        results.append((levels, errors))
    same = (results[0][0] == results[1][0]).all(0)  # rows without a tie that fell otherwise
    assert same.float().mean() > 0.9
    torch.testing.assert_close(results[0][1][:, same], results[1][1][:, same], rtol=0, atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_search_finds_scales_as_good(symmetric, monkeypatch):
    from quantkit.core.qweight import Scheme
    from quantkit.methods import fused, scales, search

    weight, hessian = problem(out=70, width=32)
    target, curvature = weight.T.contiguous(), hessian + 0.01 * torch.eye(32, device=DEVICE)
    root = torch.linalg.cholesky(curvature, upper=True)
    scheme = Scheme(4, 32, symmetric)

    def cost(grid):
        error = target - scales.nearest(target, grid) * grid.scale
        return (error * (curvature @ error)).sum(0)

    found = cost(search.search(target, root, scheme, 1))
    monkeypatch.setattr(fused, "usable", lambda tensor: False)
    expected = cost(search.search(target, root, scheme, 1))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_equations_are_those_of_torch(monkeypatch):
    from quantkit.methods import fused, products

    if INTERPRETED:  # which has no bfloat16 products
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())
        monkeypatch.setattr(
            products, "split", lambda x: (x.round(decimals=1), x - x.round(decimals=1))
        )
    monkeypatch.setattr(fused, "_SYSTEM_GROUPS", 2)  # at a time
    weight, hessian = problem(out=40, width=160)
    levels = (weight.T * 20).round().clamp(-8, 7).contiguous()
    found = fused.equations(hessian, levels, 5)
    high, low = products.split(hessian)
    parts = (high.float() + low.float()).reshape(5, 32, 5, 32)
    grouped = levels.reshape(5, 32, -1)
    expected = torch.einsum("gir,gihj,hjr->ghr", grouped, parts, grouped)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "width", "every"), [(1100, 300, 1), (64, 128, 1), (1500, 40, 3), (1, 5, 1)]
)
def test_activations_about_a_shift(dtype, tokens, width, every):
    """A token in so many, as thinned statistics take them."""
    from quantkit.core import launch, shifting

    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(tokens, width, generator=generator) + 3).to(DEVICE, dtype)[::every]
    shift = x.float().mean(0).to(dtype)
    moved, sums = shifting._fused(x, shift)
    assert torch.equal(moved, x - shift) and moved.is_contiguous()
    expected = (x - shift).double().sum(0)
    assert sums.dtype == torch.float32
    assert float((sums - expected).abs().max()) < 1e-5 * len(x)
    if not INTERPRETED:
        assert launch.compiles(x)


@pytest.mark.parametrize(("rows", "columns"), [(5, 40), (11, 1030), (1, 1)])
def test_a_matrix_in_two_parts(rows, columns):
    from quantkit.methods import products

    # the interpreter's bfloat16 is a guess
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    whole = torch.randn(rows + 2, columns + 3, generator=torch.Generator().manual_seed(0))
    x = whole.to(DEVICE)[1:-1, 2:-1]
    parts = torch.zeros(2, rows + 1, columns + 4, dtype=dtype, device=DEVICE)
    high, low = parts[:, :-1, :-4].unbind()
    products._split_at_once(x, high, low)
    assert torch.equal(high, x.to(dtype))
    assert torch.equal(low, (x - x.to(dtype).float()).to(dtype))
    assert not parts[:, -1:].any() and not parts[:, :, -4:].any()  # nothing else was written


def test_parts_of_another_layout_are_filled_in_place():
    from quantkit.methods import products

    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    parts = torch.zeros(2, 9, 8, dtype=torch.bfloat16, device=DEVICE)
    high, low = parts[:, :, 1:7].mT
    products.split(x, (high, low))
    assert torch.equal(high, x.bfloat16()) and torch.equal(low, (x - high).bfloat16())
    assert not parts[:, :, [0, 7]].any()


@pytest.mark.parametrize("turned", [False, True])
def test_parts_lie_as_the_matrix_does(turned):
    from quantkit.methods import products

    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x = x.T if turned else x
    high, low = products.split(x)
    assert high.stride() == low.stride() == x.stride()
    assert torch.equal(high, x.bfloat16())
    assert torch.equal(low, (x - x.bfloat16()).bfloat16())
