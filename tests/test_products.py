"""Products of the solvers: what a split into two bfloat16 parts keeps, and that a CPU does plain
float32 products."""

from types import SimpleNamespace

import pytest
import torch
from tools import multiply_in

from quantkit.core import launch
from quantkit.methods import fused, products
from quantkit.methods.products import Factor


def hessian_and_errors(width=160, out=24):
    """A Hessian with a few large directions, and errors that avoid them."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator).double()).Q
    size = torch.logspace(0, -4, width, dtype=torch.float64)
    hessian = (basis * size) @ basis.T
    errors = basis[:, width // 2 :] @ torch.randn(
        width // 2, out, generator=generator, dtype=torch.float64
    )
    return hessian.float(), errors.float()


@pytest.fixture
def split(monkeypatch):
    """A GPU's way of multiplying, with the CPU's products, in several strips."""
    multiply_in(torch.float32, monkeypatch)
    monkeypatch.setattr(products, "splits", lambda matrix: True)
    monkeypatch.setattr(products, "_STRIP", 48)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_two_parts_keep_what_one_loses(split):
    hessian, errors = hessian_and_errors()
    exact = hessian.double() @ errors.double()
    one = relative(hessian.bfloat16().double() @ errors.double(), exact)
    assert one > 1e-2
    assert relative(products.times(hessian, Factor(errors)), exact) < one / 50


def test_a_factor_is_updated_with_nearly_all_digits(split, monkeypatch):
    """Each product is one of TF32: its factors rounded to 11 bits, as the hardware does it."""
    added = torch.Tensor.addmm_

    def rounded(x):
        return (x.contiguous().view(torch.int32) + 0x1000 & -(1 << 13)).view(torch.float32)

    monkeypatch.setattr(
        torch.Tensor, "addmm_", lambda x, a, b, **how: added(x, rounded(a), rounded(b), **how)
    )
    sums, a, b = torch.randn(100, 30), torch.randn(100, 170), torch.randn(170, 30)
    expected = sums.double() - a.double() @ b.double()
    once = sums.clone().addmm_(a, b, alpha=-1)
    products.subtract(sums, a, b)
    assert relative(once, expected) > 1e-4
    assert relative(sums, expected) < 1e-6


def test_the_parts_of_a_number_are_the_number():
    x = torch.cat([torch.randn(500), torch.tensor([0.0, 1e30, -3e-30])])[None]
    high, low = products.split(x, kept=torch.float32)
    assert torch.equal(high + low, x)
    assert not (high.view(torch.int32) & 0x1FFF).any()  # nothing that TF32 would round away
    odd = torch.tensor([[float("nan"), float("inf"), 1.0]])
    high, low = products.split(odd, kept=torch.float32)
    assert (high + low).isfinite().tolist() == [[False, False, True]]


def test_whole_numbers_are_multiplied_exactly_but_for_the_hessian(split):
    hessian, _ = hessian_and_errors()
    levels = torch.randint(-128, 128, (48, 10)).float()
    columns, rows = slice(32, 80), slice(100)
    found = products.times_whole(hessian[rows, columns], levels)
    torch.testing.assert_close(found, hessian[rows, columns] @ levels, rtol=1e-5, atol=1e-3)


def test_an_update_reaches_the_parts(split):
    _, errors = hessian_and_errors()
    factor, rows = Factor(errors.clone()), slice(16, 64)
    change = torch.randn(48, errors.shape[1])
    factor.update(rows, change)
    changed = errors.clone()
    changed[rows] += change
    assert torch.equal(factor.matrix, changed)
    for part, expected in zip(factor.parts, products.split(changed)):
        assert torch.equal(part, expected)


def test_rows_of_a_factor_are_its_own(split):
    hessian, errors = hessian_and_errors()
    factor = Factor(errors.clone())
    rows = slice(32, 80)
    factor.put(rows, 2 * errors[rows])
    expected = products.times(hessian[:, rows], Factor(2 * errors[rows]))
    assert torch.equal(products.times(hessian[:, rows], factor.of_rows(rows)), expected)


@pytest.mark.parametrize("strip", [2048, 48])
def test_energy_is_the_quadratic_form(monkeypatch, strip):
    hessian, errors = hessian_and_errors()
    expected = float(((errors.T @ hessian) * errors.T).sum())
    monkeypatch.setattr(products, "_STRIP", strip)
    found = products.energy(hessian, errors.T)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_energy_on_a_gpu_is_near(split):
    hessian, errors = hessian_and_errors(320, 256)
    for rows in (errors.T, torch.randn(256, 320, generator=torch.Generator().manual_seed(5))):
        expected = float(((rows.double() @ hessian.double()) * rows.double()).sum())
        assert float(products.energy(hessian, rows)) == pytest.approx(expected, rel=1e-3)
        coarse = float(products.energy(hessian, rows, coarse=True))
        assert coarse == pytest.approx(expected, rel=5e-3)
        assert coarse != float(products.energy(hessian, rows))


def test_an_older_gpu_computes_in_float32(monkeypatch):
    """A T4 has no products of bfloat16, and Triton compiles nothing for it."""
    weight = SimpleNamespace(is_cuda=True, dtype=torch.float32, get_device=lambda: 0)
    for capability, newer in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(launch, "_capability", lambda index, found=capability: found)
        monkeypatch.setattr(launch, "_installed", lambda: True)
        assert products.splits(weight) is newer
        assert fused.usable(weight) is newer
        assert launch.compiles(weight) is newer
        monkeypatch.setattr(launch, "_installed", lambda: False)
        assert not launch.compiles(weight) and products.splits(weight) is newer
        assert not products.splits(SimpleNamespace(is_cuda=True, dtype=torch.float64))
