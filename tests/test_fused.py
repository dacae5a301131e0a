"""The Triton kernels of the solver beside the torch functions that they stand for.

They run under Triton's interpreter (conftest.py); on a GPU when QUANTKIT_TEST_GPU is set.
"""

import os
from threading import Event, Thread

import numpy as np
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
        gptq._round_tile(passed.clone(), 0, columns, unit, grid, slice(0, tile), levels, errors)
        results.append((levels, errors))
    same = (results[0][0] == results[1][0]).all(0)  # rows without a tie that fell otherwise
    assert same.float().mean() > 0.9
    torch.testing.assert_close(results[0][1][:, same], results[1][1][:, same], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("group", "block"), [(32, slice(32, 96)), (24, slice(40, 96))])
@pytest.mark.parametrize("ranged", [True, False])
def test_one_block_is_polished_as_torch_does(group, block, ranged, monkeypatch):
    """Of several, the last."""
    from quantkit.methods import fused, refine
    from quantkit.methods.scales import Grid

    rows = 37 if INTERPRETED else 1037
    weight, hessian = problem(out=rows, width=96)
    hessian.diagonal().add_(0.1)
    factors = torch.rand(96 // group, rows, generator=torch.Generator().manual_seed(1)) + 0.5
    scale = weight.abs().mean() * factors.to(DEVICE) / 3
    low = torch.full_like(scale, -7.0)
    grid = Grid(scale, low, low + 15) if ranged else Grid(scale, -8.0, 7.0)
    step = scale.repeat_interleave(group, 0)
    old = (weight.T / step + 0.7).round().contiguous()
    pulls = hessian[block] @ (weight.T - old * step)
    results = []
    for kernels in (True, False):
        monkeypatch.setattr(fused, "usable", lambda tensor, on=kernels: on)
        levels = old.clone()
        changes = refine._polish_block(pulls.clone(), hessian, levels, grid, block)
        results.append((levels, changes))
    (levels, changes), (their_levels, their_changes) = results
    assert (levels != old).float().mean() > 0.1
    same = (levels == their_levels).all(0)  # rows without a tie that fell otherwise
    assert same.float().mean() > 0.9
    torch.testing.assert_close(changes[:, same], their_changes[:, same], rtol=0, atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_search_finds_scales_as_good(symmetric, monkeypatch):
    from quantkit.core.qweight import Scheme
    from quantkit.methods import factor, fused, scales, search

    weight, hessian = problem(out=70, width=96)
    columns, scheme = weight.T.contiguous(), Scheme(4, 32, symmetric)
    roots = factor.roots(hessian, 32)

    def cost(grid):
        target = columns.reshape(3, 32, -1)
        error = roots @ (target - scales.nearest(target, grid.spread()) * grid.scale[:, None])
        return error.square().sum(1)

    found = search.search_all(columns, roots, scheme, 1)
    monkeypatch.setattr(fused, "usable", lambda tensor: False)
    expected = search.search_all(columns, roots, scheme, 1)
    torch.testing.assert_close(cost(found), cost(expected), rtol=1e-3, atol=0)
    if not symmetric:
        assert torch.equal(found.high - found.low, torch.full_like(found.low, 15))


@pytest.mark.parametrize(("group", "out"), [(32, 70), (64, 37)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_block_is_rounded_as_torch_does(symmetric, group, out, monkeypatch):
    """Of several, behind others that pass errors on to it."""
    from quantkit.core.qweight import Scheme
    from quantkit.methods import fused, gptq, products, scales

    def eleven_bits(x):
        return ((x.contiguous().view(torch.int32) + 4096) & -8192).view(torch.float32)

    if INTERPRETED:  # a GPU's products round their factors
        add = products.add
        monkeypatch.setattr(
            products, "add", lambda sums, a, b: add(sums, eleven_bits(a), eleven_bits(b))
        )
    weight, hessian = problem(out=out, width=5 * group)
    scheme, options = Scheme(4, group, symmetric), gptq.Options(zero_min=1)
    unit, energy = hessian.clone(), hessian.diagonal() * 0.5
    unit /= hessian.diagonal()
    columns, block = weight.T.contiguous(), slice(2 * group, 5 * group)
    results = []
    for kernels in (True, False):
        monkeypatch.setattr(fused, "usable", lambda tensor, on=kernels: on)
        rounding = gptq._Rounding(columns, unit, energy, scheme, options)
        rounding.errors[: block.start] = columns[: block.start] / 4
        grids = rounding._round_block(block)
        results.append((rounding.levels[block], rounding.errors[block], grids))
    (levels, errors, grids), (their_levels, their_errors, their_grids) = results
    grid, their_grid = (scales.together(found, torch.stack) for found in (grids, their_grids))
    # rows without a tie that fell otherwise, of levels or of candidates
    same = (levels == their_levels).all(0) & ((grid.scale / their_grid.scale - 1).abs() < 1e-3).all(
        0
    )
    assert same.float().mean() > 0.9
    torch.testing.assert_close(errors[:, same], their_errors[:, same], rtol=0, atol=2e-3)
    for bound, meant in zip(grid[1:], their_grid[1:], strict=True):
        assert bound == meant if symmetric else torch.equal(bound[:, same], meant[:, same])


@pytest.mark.skipif(not INTERPRETED, reason="a GPU does it by itself")
def test_digits_that_products_cut_off_have_no_direction(monkeypatch):
    """Tensor cores read 11 bits of a number and leave the others: what is passed on in a block is
    rounded before. 0.994 of these codes are those of float64; 0.981 where it is not."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from quantkit.core.qweight import Scheme
    from quantkit.methods.gptq import Options, solve

    exact = InterpreterBuilder.create_dot

    def cut(x):
        kept = x.data.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
        return TensorHandle(kept.view(np.float32), x.dtype)

    def dot(self, a, b, sums, precision, *others):
        if str(precision).endswith("TF32"):
            a, b = cut(a), cut(b)
        return exact(self, a, b, sums, precision, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    weight, hessian = problem(out=64, width=512)
    scheme, options = Scheme(4, 32), Options(rounds=0)
    found = solve(weight, hessian, scheme, options).qweight
    meant = solve(weight.double(), hessian.double(), scheme, options).qweight
    assert (found.codes == meant.codes).float().mean() > 0.988


def test_a_matrix_that_lies_by_columns_is_refused():
    from quantkit.methods import fused
    from quantkit.methods.scales import Grid

    weight, hessian = problem(out=8, width=32)
    tensors = [weight.T.contiguous() for _ in range(2)]
    grid = Grid(torch.ones(1, 8, device=DEVICE), -8.0, 7.0)
    with pytest.raises(ValueError, match="by columns"):
        fused.polish_block(tensors[0], hessian.T, tensors[1], grid, slice(0, 32))


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


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("width", [1, 64, 200])
def test_a_matrix_is_mirrored(width, lower):
    from quantkit.core import mirror

    whole = torch.randn(width + 1, width + 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = whole.clone()
    known = expected[:-1, :-3].tril() if lower else expected[:-1, :-3].triu()
    expected[:-1, :-3] = known + known.T - known.diag().diag()
    mirror._at_once(whole[:-1, :-3], lower)
    assert torch.equal(whole, expected)  # and nothing else was written
    with pytest.raises(ValueError, match="contiguous"):
        mirror._at_once(torch.zeros(4, 3, device=DEVICE).T, lower)


@pytest.mark.parametrize("kept", ["half", "float"])
@pytest.mark.parametrize(("rows", "columns"), [(5, 40), (11, 1030), (1, 1)])
def test_a_matrix_in_two_parts(rows, columns, kept):
    from quantkit.methods import products

    # the interpreter's bfloat16 is a guess
    half = torch.float16 if INTERPRETED else torch.bfloat16
    dtype = half if kept == "half" else torch.float32
    whole = torch.randn(rows + 2, columns + 3, generator=torch.Generator().manual_seed(0))
    x = whole.to(DEVICE)[1:-1, 2:-1]
    parts = torch.zeros(2, rows + 1, columns + 4, dtype=dtype, device=DEVICE)
    high, low = parts[:, :-1, :-4].unbind()
    products._split_at_once(x, high, low)
    first = products._cut(x.contiguous()) if kept == "float" else x.to(dtype)
    assert torch.equal(high, first)
    assert torch.equal(low, (x - first.float()).to(dtype))
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


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_slow_to_compile_is_compiled_ahead(symmetric, monkeypatch):
    from quantkit.core import launch
    from quantkit.core.qweight import Scheme
    from quantkit.methods import fused

    seen, device = [], torch.device(DEVICE)

    def see(kernel, *args, **options):
        assert launch._threads.only_compiles
        seen.append(kernel.fn.__name__)
        launch.launch(kernel, *args, **options)

    monkeypatch.setattr(fused, "launch", see)
    for refines, names in (
        (False, ["round_block"]),
        (True, ["round_block", "polish_block", "equations"]),
    ):
        for call in fused.slow_to_compile(Scheme(4, 32, symmetric), refines, device):
            call()
        assert seen == names
        seen.clear()
    assert fused.slow_to_compile(Scheme(4, -1, symmetric), True, device) == []
    assert not launch._threads.only_compiles


def test_what_is_only_compiled_is_not_run():
    from quantkit.core import launch
    from quantkit.core.qweight import Scheme
    from quantkit.methods import fused

    columns, roots = torch.randn(32, 16, device=DEVICE), torch.randn(1, 32, 32, device=DEVICE)
    levels, errors = columns.clone(), columns.clone()
    given = columns, columns, roots[0], roots, roots, Scheme(4, 32), 0, slice(0, 32)
    with launch.compiling():
        fused.round_block(*given, levels, errors)
    assert torch.equal(levels, columns) and torch.equal(errors, columns)
    fused.round_block(*given, levels, errors)
    assert not torch.equal(levels, columns) and not torch.equal(errors, columns)


def test_a_launch_waits_for_what_is_being_compiled():
    from quantkit.core import launch

    happened, compiling, ready = [], Event(), Event()

    class Slow:
        def warmup(self, number, grid, step):
            compiling.set()
            assert ready.wait(10)
            happened.append(("compiled", number, grid, step))

        def __getitem__(self, grid):
            return lambda number, step: happened.append(("run", number, grid, step))

    kernel = Slow()

    def ahead():
        with launch.compiling():
            launch.launch(kernel, (3,), 5, step=7)

    threads = [Thread(target=ahead), Thread(target=lambda: launch.launch(kernel, (2,), 4, step=7))]
    threads[0].start()
    assert compiling.wait(10)
    threads[1].start()
    launch.launch(kernel, (1,), 4, step=8)  # which is another one
    threads[1].join(0.2)
    assert happened == [("run", 4, (1,), 8)]
    ready.set()
    for thread in threads:
        thread.join()
    assert happened[1:] == [("compiled", 5, (3,), 7), ("run", 4, (2,), 7)]
    assert not launch._compiling
