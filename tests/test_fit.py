"""Numbers moved into another format's form mean exactly what they meant, or are refused."""

import itertools
from dataclasses import replace

import pytest
import torch

from quantkit.core.form import Form
from quantkit.core.qweight import LEVELS, QWeight, Scheme
from quantkit.formats import awq, bnb, compressed_tensors, gguf, gptq, gptq_v2, mlx
from quantkit.methods import fit, rtn
from quantkit.methods.fit import CannotHold, Fitted

FORMS = {
    "gptq": gptq.FORM,
    "gptq_v2": gptq_v2.FORM,
    "awq": awq.FORM,
    "compressed_tensors": compressed_tensors.FORM,
    "bnb": bnb.FORM,
    "mlx": mlx.FORM,
    **{type.lower(): form for type, form in gguf.FORMS.items()},
}
OUT, WIDTH = 12, 256
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def integers(low, high, *shape, seed=0):
    return torch.randint(low, high + 1, shape, generator=generator(seed)).to(torch.uint8)


def make(bits=4, group=64, zero=None, dtype=F16, order=None, minimum=None, out=OUT, width=WIDTH):
    """Random codes and scales of both signs; ``zero`` is (lowest, highest) zero point."""
    scheme = Scheme(bits, group, zero is None and minimum is None)
    groups = scheme.groups(width)
    scale = torch.randn(out, groups, generator=generator(1)).to(dtype)
    zeros = None if zero is None else integers(*zero, out, groups, seed=2)
    codes = integers(0, scheme.max_code, out, width, seed=3)
    return QWeight(scheme, codes, scale, zeros, order, minimum)


def exactly(q):
    """The weight in float64, in which all of this is exact."""
    index = q.group_index()
    scale, codes = q.scale.double()[:, index], q.codes.double()
    if q.scheme.grid != "int":
        return torch.tensor(LEVELS[q.scheme.grid], dtype=F64)[q.codes.long()] * scale
    if q.minimum is not None:
        return codes * scale + q.minimum.double()[:, index]
    zero = q.scheme.midpoint if q.zero is None else q.zero.double()[:, index]
    return (codes - zero) * scale


def assert_in(q, form):
    """Whether the numbers are where the form has a place for them."""
    assert q.scheme.grid == "int" and q.scheme.bits in form.bits
    assert q.scale.dtype in form.scales
    assert not form.groups or q.scheme.group_size in form.groups
    assert form.ordered or q.group_of is None
    assert int(q.codes.max()) <= q.scheme.max_code
    if form.offset == "symmetric":
        assert q.scheme.symmetric
    elif form.offset == "minimum":
        assert q.minimum is not None and q.minimum.dtype == q.scale.dtype
    else:
        assert q.minimum is None and (q.zero is None or int(q.zero.min()) >= form.zero_min)


def sources():
    """A weight as each format would give it, several for each."""
    for name, form in FORMS.items():
        for bits, group, dtype in itertools.product(
            form.bits, form.groups or (16, 32, 128, -1), form.scales
        ):
            top = (1 << bits) - 1
            if form.offset == "minimum":
                scale = torch.randn(OUT, Scheme(bits, group).groups(WIDTH), generator=generator(5))
                q = make(bits, group, minimum=scale.to(dtype), dtype=dtype)
                yield name, "minimums", q
                wanted = integers(1, top, *q.scale.shape, seed=6)
                low = -(q.scale.double() * wanted.double()).to(dtype)
                yield name, "rounded zero points", replace(q, minimum=low)
                power = replace(q, scale=torch.full_like(q.scale, -0.125))
                yield name, "whole zero points", replace(power, minimum=(0.125 * wanted).to(dtype))
                yield name, "midpoints", replace(q, minimum=q.scale * -q.scheme.midpoint)
                continue
            yield name, "symmetric", make(bits, group, dtype=dtype)
            if form.offset == "zero":
                for zero in ((form.zero_min, top), (form.zero_min,) * 2, (top, top)):
                    yield name, f"zero {zero}", make(bits, group, zero, dtype)


def possible(q, form):
    """Whether the form can hold exactly these numbers, found by trying all of its sizes."""
    exact = exactly(q)
    index = q.group_index()
    if form.groups:
        widths = [WIDTH if g == -1 else g for g in form.groups]
        if not any(WIDTH % w == 0 and constant(q, index, w) for w in widths):
            return False
    if not any(torch.equal(q.scale.to(d).double(), q.scale.double()) for d in form.scales):
        return False
    scale = q.scale.double()[:, index]
    if q.minimum is not None and form.offset != "minimum":
        steps = exact / scale
        near = steps.round()
        # the minimum of a zero point may be rounded to its dtype, and the weight with it
        spacing = torch.finfo(q.minimum.dtype).eps
        if not bool(((steps - near).abs() <= spacing * q.scheme.max_code).all()):
            return False
        zero = (-q.minimum.double() / q.scale.double()).round()
        if int(zero.min()) < form.zero_min or int(zero.max()) > q.scheme.max_code:
            return False
    if form.offset == "symmetric":
        steps = (exact / scale).round()
        half = 1 << (form.bits[-1] - 1)
        return -half <= float(steps.min()) and float(steps.max()) < half
    if q.scheme.bits > form.bits[-1]:
        return False
    return form.offset == "minimum" or q.zero is None or int(q.zero.min()) >= form.zero_min


def constant(q, index, width):
    """Whether every ``width`` neighbours have the same scale, zero point and minimum."""
    held = [t for t in (q.scale, q.zero, q.minimum) if t is not None]
    return all(
        bool((part == part[..., :1]).all())
        for part in (t[:, index].reshape(OUT, -1, width) for t in held)
    )


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("source", FORMS)
def test_every_pair_is_exact_or_refused(source, target):
    """Or a minimum was rounded, which is told, and no more than that."""
    form, counts = FORMS[target], {"exact": 0, "rounded": 0, "refused": 0}
    for name, kind, q in sources():
        if name != source:
            continue
        try:
            found = fit.fit(q, form)
        except CannotHold as error:
            assert not possible(q, form), (kind, q.scheme, str(error))
            counts["refused"] += 1
            continue
        assert_in(found.qweight, form)
        before, after = exactly(q), exactly(found.qweight)
        if found.exact:
            assert torch.equal(before, after), (kind, q.scheme)
            counts["exact"] += 1
            continue
        assert not torch.equal(before, after), (kind, q.scheme)
        minimums = [w.minimum for w in (q, found.qweight) if w.minimum is not None]
        eps = max(torch.finfo(m.dtype).eps for m in minimums)
        size = max(float(m.double().abs().max()) for m in minimums)
        assert float((before - after).abs().max()) <= eps / 2 * size
        counts["rounded"] += 1
    if source == target:
        assert counts["refused"] == 0 and counts["rounded"] == 0
    assert (counts["exact"] > 0) == ((source, target) not in NEVER), counts


# pairs of which no example is held exactly: too many bits, whole rows or blocks of other sizes
NEVER = (
    {(s, "bnb") for s in ("mlx", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")}
    | {(s, t) for s in ("q8_0", "bnb") for t in ("awq", "q4_0", "q4_1", "q5_0", "q5_1")}
    | {(s, t) for s in ("q5_0", "q5_1") for t in ("awq", "q4_1")}
    | {("q5_0", "q4_0"), ("q5_1", "q4_0")}
)


def test_four_bits_with_zero_points_fit_into_five_without():
    q = make(4, 128, (0, 15))
    for type in ("q5_0", "q8_0"):
        found = fit.fit(q, FORMS[type])
        assert found.exact and found.qweight.scheme.symmetric
        assert torch.equal(exactly(found.qweight), exactly(q))


def test_as_few_bits_as_the_codes_need():
    form = Form((4, 5, 8), "symmetric")
    assert fit.fit(make(4, 32, (8, 8)), form).qweight.scheme.bits == 4
    assert fit.fit(make(4, 32, (7, 8)), form).qweight.scheme.bits == 5
    assert fit.fit(make(5, 32, (7, 8)), form).qweight.scheme.bits == 8


@pytest.mark.parametrize("bits", [2, 3])
def test_more_room_moves_the_midpoint(bits):
    q = make(bits, 32)
    found = fit.fit(q, FORMS["awq"]).qweight
    assert found.scheme == Scheme(4, 32)
    assert torch.equal(found.codes, q.codes + 8 - q.scheme.midpoint)
    assert torch.equal(exactly(found), exactly(q))


def test_more_room_leaves_zero_points_where_they_are():
    q = make(3, 32, (0, 7))
    found = fit.fit(q, FORMS["awq"]).qweight
    assert torch.equal(found.zero, q.zero) and torch.equal(found.codes, q.codes)


# groups


def test_groups_are_divided_into_the_largest_that_fit():
    q = make(4, 128)
    for type, size in (("q4_0", 32), ("mlx", 128)):
        found = fit.fit(q, FORMS[type]).qweight
        assert found.scheme.group_size == size
        assert torch.equal(exactly(found), exactly(q))
    assert fit.fit(make(4, 64), FORMS["mlx"]).qweight.scheme.group_size == 64
    assert fit.fit(make(4, -1), FORMS["mlx"]).qweight.scheme.group_size == 128
    assert fit.fit(make(4, 96, width=288), FORMS["mlx"]).qweight.scheme.group_size == 32


def test_equal_groups_are_joined():
    narrow = make(4, 128).regrouped(16)
    found = fit.fit(narrow, FORMS["mlx"]).qweight
    assert found.scheme.group_size == 128
    assert torch.equal(exactly(found), exactly(narrow))
    with pytest.raises(CannotHold, match="groups of 16 cannot be made groups of 32 or 64 or 128"):
        fit.fit(make(4, 16), FORMS["mlx"])
    with pytest.raises(CannotHold, match="groups of 64 cannot be made groups of a whole row"):
        fit.fit(make(8, 64), FORMS["bnb"])


def test_groups_stay_as_they_are_where_any_size_will_do():
    for size in (16, 48, 96, -1):
        q = make(4, size, width=288)
        assert fit.fit(q, FORMS["awq"]) == Fitted(q, True)


def in_order(blocks, size=32):
    """A g_idx that puts blocks of ``size`` inputs into groups, in this order."""
    return torch.tensor(blocks, dtype=torch.int32).repeat_interleave(size)


@pytest.mark.parametrize("zero", [None, (1, 15)])
def test_an_order_that_keeps_groups_together_is_undone(zero):
    q = make(4, 64, zero, order=in_order([2, 0, 3, 1], 64))
    found = fit.fit(q, FORMS["awq"])
    assert found.exact and found.qweight.scheme.group_size == 64
    assert found.qweight.group_of is None
    assert torch.equal(exactly(found.qweight), exactly(q))
    halves = make(4, 64, zero, order=in_order([2, 0, 3, 1, 1, 0, 2, 3]))
    found = fit.fit(halves, FORMS["awq"])
    assert found.qweight.scheme.group_size == 32
    assert torch.equal(exactly(found.qweight), exactly(halves))
    blocks = fit.fit(halves, FORMS["q8_0"]).qweight
    assert torch.equal(exactly(blocks), exactly(halves))


def test_an_order_within_groups_is_refused():
    order = (torch.randperm(WIDTH, generator=generator(7)) // 64).to(torch.int32)
    q = make(4, 64, order=order)
    for name in ("awq", "compressed_tensors", "mlx", "q4_0", "q8_0"):
        with pytest.raises(CannotHold, match="follow the activations"):
            fit.fit(q, FORMS[name])
    for name in ("gptq", "gptq_v2"):
        found = fit.fit(q, FORMS[name])
        assert found.exact and found.qweight.identical(q)


# refusals


@pytest.mark.parametrize(
    ("q", "target", "reason"),
    [
        (make(4, 32, (0, 15)), "gptq", "zero points of 0"),
        (make(8, 32), "awq", "8 bits, and the target at most 4"),
        (make(8, 32), "q5_1", "8 bits, and the target at most 5"),
        (make(8, 32), "q4_0", "reach -128 to 127"),
        (make(4, 32, (0, 15)), "q4_0", "symmetric codes of 4 bits"),
        (make(4, 32, dtype=F32), "gptq", "scales do not fit into float16 without"),
        (
            replace(make(4, 32), scale=torch.rand(OUT, 8, dtype=F64)),
            "mlx",
            "into float16 or bfloat16 or float32 without",
        ),
        (make(4, 32, minimum=torch.rand(OUT, 8).half() + 9), "awq", "not those of whole zero"),
        (make(4, 32, minimum=torch.rand(OUT, 8).half() + 9), "q8_0", "not those of whole zero"),
    ],
)
def test_what_has_no_place_is_refused_with_the_reason(q, target, reason):
    with pytest.raises(CannotHold, match=reason):
        fit.fit(q, FORMS[target])


@pytest.mark.parametrize("grid", ["nf4", "fp4"])
@pytest.mark.parametrize("target", FORMS)
def test_tables_of_levels_are_refused(grid, target):
    q = replace(make(4, 64, dtype=F32), scheme=Scheme(4, 64, grid=grid))
    with pytest.raises(CannotHold, match=f"levels of {grid} are not evenly spaced"):
        fit.fit(q, FORMS[target])


def test_minimums_that_overflow_are_refused():
    q = make(8, 32, (200, 255))
    q = replace(q, scale=torch.full_like(q.scale, 500.0))
    with pytest.raises(CannotHold, match="too large"):
        fit.fit(q, FORMS["mlx"])


def test_scales_take_another_dtype_where_they_fit():
    q = make(4, 32)
    wide = replace(q, scale=q.scale.to(F32))
    assert fit.fit(wide, FORMS["gptq"]).qweight.identical(q)
    bits = torch.randn(OUT, 8, generator=generator(8)).to(BF16)
    for dtype, target, wanted in ((BF16, "gptq", F16), (F64, "mlx", F16), (F32, "bnb", F16)):
        group = -1 if target == "bnb" else 32
        q = make(8, group)
        q = replace(q, scale=bits[:, : q.scale.shape[1]].to(dtype))
        found = fit.fit(q, FORMS[target])
        assert found.exact and found.qweight.scale.dtype == wanted
        assert torch.equal(exactly(found.qweight), exactly(q))
    small = replace(make(4, 32, dtype=F64), scale=torch.full((OUT, 8), 2.0**-60, dtype=F64))
    assert fit.fit(small, FORMS["mlx"]).qweight.scale.dtype == BF16


def test_a_rounded_minimum_is_told():
    q = make(4, 32, (1, 15))
    found = fit.fit(q, FORMS["q4_1"])
    assert not found.exact
    assert torch.equal(found.qweight.codes, q.codes) and torch.equal(found.qweight.scale, q.scale)
    again = fit.fit(found.qweight, FORMS["gptq"])  # and back again
    assert not again.exact and again.qweight.identical(q)
    eights = fit.fit(found.qweight, FORMS["q8_0"])
    assert not eights.exact
    assert torch.equal(exactly(eights.qweight), exactly(q))


def test_float32_products_are_not_taken_for_exact():
    """A scale of 24 bits times a zero point needs more than float32."""
    q = make(8, 32, (255, 255), dtype=F32)
    found = fit.fit(q, FORMS["mlx"])
    assert not found.exact
    assert not torch.equal(exactly(found.qweight), exactly(q))


@pytest.mark.parametrize("wanted", ["whole", "midpoint", "none", "no scale"])
def test_zero_points_are_found_in_minimums(wanted):
    q = make(4, 32, (0, 15))
    if wanted == "midpoint":
        q = replace(q, zero=torch.full_like(q.zero, 8))
    scale = q.scale.clone()
    if wanted == "no scale":
        scale[3] = 0
    low = -(scale.float() * q.zero.float()).half()
    if wanted == "none":
        low[0, 0] += 0.3 * scale[0, 0].abs()
    q = replace(q, scale=scale, zero=None, minimum=low)
    if wanted == "none":
        assert not fit.is_product(q)
        with pytest.raises(CannotHold):
            fit.zero_pointed(q)
        return
    found = fit.zero_pointed(q)
    assert found.minimum is None and found.scheme.symmetric == (wanted == "midpoint")
    assert fit.is_product(q) == torch.equal(exactly(found), exactly(q))
    assert torch.allclose(exactly(found), exactly(q), atol=1e-2)


def test_a_minimum_without_a_scale_is_no_zero_point():
    q = make(4, 32, minimum=torch.ones(OUT, 8).half())
    with pytest.raises(CannotHold):
        fit.zero_pointed(replace(q, scale=torch.zeros_like(q.scale)))


def test_midpoints_as_zero_points():
    q = make(4, 32)
    found = fit.with_zeros(q)
    assert not found.scheme.symmetric and set(found.zero.flatten().tolist()) == {8}
    assert torch.equal(found.dequantize(), q.dequantize())


# rounding


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("kind", ["nf4", "8 bits", "g_idx", "zero 0"])
def test_nearest_is_rounding_every_weight(kind, target):
    form = FORMS[target]
    order = (torch.randperm(WIDTH, generator=generator(7)) // 64).to(torch.int32)
    q = {
        "nf4": replace(make(4, 64, dtype=F32), scheme=Scheme(4, 64, grid="nf4")),
        "8 bits": make(8, 64),
        "g_idx": make(4, 64, order=order),
        "zero 0": make(4, 64, (0, 0)),
    }[kind]
    found = fit.nearest(q, form)
    assert_in(found, form)
    scheme = fit.nearest_scheme(q.scheme, form)
    assert (found.scheme.bits, found.scheme.group_size) == (scheme.bits, scheme.group_size)
    # no weight is further away than half a step (its end levels reach as far as the range)
    step = found.scale.double().abs()[:, found.group_index()]
    away = (exactly(found) - exactly(q)).abs() / step
    limit = 0.51 + 2.0 ** -(11 - found.scheme.bits)
    if kind == "zero 0" and form.zero_min:  # the range has to begin a step lower
        limit += 0.5
    assert float(away.max()) <= limit
    again = fit.fit(rtn.quantize(q.dequantize(), scheme, form.zero_min), form).qweight
    assert found.identical(again)


@pytest.mark.parametrize("target", ["q4_0", "q4_1", "q5_0", "q8_0", "mlx", "bnb"])
def test_nearest_to_a_plain_weight(target):
    weight = torch.randn(OUT, WIDTH, generator=generator(9))
    found = fit.nearest_to(weight.half(), FORMS[target])
    assert_in(found, FORMS[target])
    step = found.scale.double().abs()[:, found.group_index()]
    assert float(((exactly(found) - weight) / step).abs().max()) < 0.6


def test_nearest_scheme_keeps_what_it_can():
    assert fit.nearest_scheme(Scheme(4, 64, grid="nf4"), FORMS["gptq"]) == Scheme(4, 64, False)
    assert fit.nearest_scheme(Scheme(6, 16), FORMS["gptq"]) == Scheme(8, 16, False)
    assert fit.nearest_scheme(Scheme(8, 64), FORMS["awq"]) == Scheme(4, 64, False)
    assert fit.nearest_scheme(Scheme(8, -1), FORMS["q4_0"]) == Scheme(4, 32)
    assert fit.nearest_scheme(Scheme(4, 16), FORMS["mlx"]) == Scheme(4, 32, False)


def test_relative_error():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert fit.relative_error(a, b) == pytest.approx(0.25 / 25)
    assert fit.relative_error(a, a) == 0
    assert fit.relative_error(torch.zeros(2), torch.zeros(2)) == 0
