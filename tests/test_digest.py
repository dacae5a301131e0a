"""A digest tells two weights apart that mean different numbers, and no two that mean the same."""

from dataclasses import replace

import pytest
import torch

from quantkit.core.qweight import QWeight, Scheme
from quantkit.formats import awq, compressed_tensors, gguf, gptq, mlx
from quantkit.methods import digest, fit

OUT, WIDTH = 12, 384


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(bits=4, group=128, zero=None, order=None, dtype=torch.float16, width=WIDTH):
    scheme = Scheme(bits, group, zero is None)
    shape = (OUT, scheme.groups(width))
    scale = torch.randn(shape, generator=generator(1)).to(dtype)
    zeros = None
    if zero is not None:
        zeros = torch.randint(zero[0], zero[1] + 1, shape, generator=generator(2)).to(torch.uint8)
    codes = torch.randint(0, scheme.max_code + 1, (OUT, width), generator=generator(3))
    return QWeight(scheme, codes.to(torch.uint8), scale, zeros, order)


FORMS = {
    "awq": awq.FORM,
    "gptq": gptq.FORM,
    "compressed_tensors": compressed_tensors.FORM,
    "mlx": mlx.FORM,
    **gguf.FORMS,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zero", [None, (1, 15), (8, 8)])
@pytest.mark.parametrize("group", [32, 64, 96, 128, -1])
def test_every_form_of_a_weight_has_its_digest(group, zero, form):
    q = make(group=group, zero=zero)
    try:
        found = fit.fit(q, FORMS[form])
    except fit.CannotHold:
        assert form == "Q4_0" and zero == (1, 15)
        return
    assert (digest.of(found.qweight) == digest.of(q)) == found.exact
    if not found.exact:
        assert FORMS[form].offset == "minimum" and zero == (1, 15)


@pytest.mark.parametrize("group", [48, 96, 128, -1])
@pytest.mark.parametrize("size", [16, 32, 48, 64, 96, 128])
def test_the_size_of_groups_does_not_matter(group, size):
    q = make(group=group, zero=(0, 15))
    divided = q.regrouped(size)
    if divided is not None:
        assert digest.of(divided) == digest.of(q)
    else:
        assert group != -1 and group % size


def test_groups_of_one_scale_are_one_whatever_their_zero_points():
    """What becomes of the zero points is in the levels."""
    q = make(4, 32, (5, 9))
    q = replace(q, scale=q.scale[:, :1].expand_as(q.scale).contiguous())
    symmetric = fit.fit(q, gguf.FORMS["Q5_0"]).qweight
    whole = symmetric.regrouped(-1)
    assert whole is not None and q.regrouped(-1) is None
    assert len({digest.of(one) for one in (q, symmetric, whole)}) == 1


def test_the_number_of_bits_does_not_matter():
    for q in (make(3), make(3, zero=(1, 7))):
        forms = (compressed_tensors.FORM, awq.FORM, gptq.FORM, gguf.FORMS["Q8_0"])
        assert {digest.of(fit.fit(q, form).qweight) for form in forms} == {digest.of(q)}


def test_the_dtype_of_scales_does_not_matter():
    q = make()
    wide = replace(q, scale=q.scale.double())
    assert digest.of(wide) == digest.of(replace(q, scale=q.scale.float())) == digest.of(q)


def test_an_order_that_changes_nothing_does_not_matter():
    blocks = torch.tensor([2, 0, 1, 1, 0, 2], dtype=torch.int32).repeat_interleave(64)
    for zero in (None, (1, 15)):
        q = make(zero=zero, order=blocks)
        assert digest.of(q.regrouped(64)) == digest.of(q)
    plain = make()
    spelled = replace(plain, group_of=plain.group_index().to(torch.int32))
    assert digest.of(spelled) == digest.of(plain)
    shuffled = torch.randperm(WIDTH, generator=generator(5)) // 128
    q = make(zero=(1, 15), order=shuffled.to(torch.int32))
    renamed = torch.tensor([2, 0, 1])  # the same groups in another order
    other = replace(
        q,
        scale=q.scale[:, renamed],
        zero=q.zero[:, renamed],
        group_of=renamed.argsort()[shuffled].to(torch.int32),
    )
    assert torch.equal(other.dequantize(), q.dequantize())
    assert digest.of(other) == digest.of(q)


def test_zero_and_minus_zero_are_the_same():
    q = make(zero=(0, 15))
    scale = q.scale.clone()
    scale[0] = 0.0
    a = digest.of(replace(q, scale=scale))
    assert digest.of(replace(q, scale=torch.where(scale == 0, -scale, scale))) == a


def changed(tensor, by=1):
    """The same with one number changed by the smallest step."""
    new = tensor.clone()
    if new.is_floating_point():
        new[3, 1] = torch.nextafter(new[3, 1], torch.tensor(torch.inf, dtype=new.dtype))
    else:
        new[3, 1] = new[3, 1] ^ by
    return new


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_number_matters(dtype):
    q = make(zero=(0, 15), dtype=dtype)
    low = torch.randn(q.scale.shape, generator=generator(4)).to(dtype)
    ordered = torch.randperm(WIDTH, generator=generator(5)).div(128, rounding_mode="floor")
    seen = set()
    for one in (
        q,
        make(dtype=dtype),
        replace(q, zero=None, minimum=low),
        replace(q, group_of=ordered.to(torch.int32)),
    ):
        names = [n for n in ("codes", "scale", "zero", "minimum") if getattr(one, n) is not None]
        others = [replace(one, **{n: changed(getattr(one, n))}) for n in names]
        if one.group_of is not None:
            swapped = one.group_of.clone()
            first = int((swapped != swapped[0]).nonzero()[0])
            swapped[0], swapped[first] = one.group_of[first], one.group_of[0]
            others.append(replace(one, group_of=swapped))
        found = [digest.of(x) for x in (one, *others)]
        assert len(set(found)) == len(found)
        seen.update(found)
    assert len(seen) == 4 + 3 + 2 + 3 + 4  # no two of all these are the same


def test_shape_and_grid_matter():
    q = make(group=-1)
    tables = {digest.of(replace(q, scheme=Scheme(4, -1, True, grid))) for grid in ("nf4", "fp4")}
    assert len(tables | {digest.of(q)}) == 3
    flat = QWeight(q.scheme, q.codes.reshape(4, -1), q.scale[:4])
    tall = QWeight(q.scheme, q.codes.reshape(-1, 96), q.scale[:1].expand(48, 1))
    assert len({digest.of(q), digest.of(flat), digest.of(tall)}) == 3


def test_levels_of_nine_bits():
    """A zero point at one end and a code at the other: not to be mistaken for a small level."""
    q = make(8, zero=(0, 0))
    q = replace(q, codes=torch.full_like(q.codes, 255))
    down = replace(q, codes=torch.zeros_like(q.codes), zero=torch.ones_like(q.zero))  # -1
    assert digest.of(q) != digest.of(down)
    up = replace(q, codes=torch.full_like(q.codes, 100))
    assert digest.of(up) == digest.of(replace(up, codes=up.codes + 100, zero=up.zero + 100))


def test_minimums_that_are_no_zero_points_are_taken_as_they_are():
    low = torch.rand(OUT, 3, generator=generator(4)).half() + 20
    q = replace(make(zero=(1, 15)), zero=None, minimum=low)
    assert digest.of(q) == digest.of(q.regrouped(32))
    assert digest.of(q) == digest.of(fit.fit(q, mlx.FORM).qweight)


def test_a_scale_that_is_no_number_is_the_same_as_itself():
    q = make()
    scale = q.scale.clone()
    scale[2, 1] = torch.nan
    q = replace(q, scale=scale)
    assert digest.of(q) == digest.of(q.regrouped(32)) != digest.of(make())


def test_together_goes_by_names():
    a, b = {"x": "1", "y": "2"}, {"y": "2", "x": "1"}
    assert digest.together(a) == digest.together(b)
    others = [{"x": "2", "y": "1"}, {"x": "1"}, {"x": "1", "z": "2"}, {}]
    assert len({digest.together(d) for d in (a, *others)}) == 5
