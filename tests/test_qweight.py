"""What a QWeight means, and what it and a Scheme refuse."""

import pytest
import torch

from quantkit.core.qweight import QWeight, Scheme
from quantkit.errors import UsageError


def make(scheme, out=6, width=64, group_of=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(width)
    codes = torch.randint(0, scheme.max_code + 1, (out, width), generator=generator)
    scale = torch.randn(out, groups, generator=generator).half()
    zero = torch.randint(0, scheme.max_code + 1, (out, groups), generator=generator)
    return QWeight(
        scheme,
        codes.to(torch.uint8),
        scale,
        None if scheme.symmetric else zero.to(torch.uint8),
        group_of,
    )


def meaning(q):
    """scale * (code - zero), one number at a time."""
    out, width = q.shape
    result = torch.empty(out, width, dtype=torch.float64)
    for n in range(out):
        for k in range(width):
            if q.group_of is not None:
                group = int(q.group_of[k])
            else:
                group = 0 if q.scheme.group_size == -1 else k // q.scheme.group_size
            zero = 2 ** (q.scheme.bits - 1) if q.zero is None else int(q.zero[n, group])
            result[n, k] = float(q.scale[n, group]) * (int(q.codes[n, k]) - zero)
    return result


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantize_is_scale_times_code_minus_zero(bits, group, symmetric):
    q = make(Scheme(bits, group, symmetric))
    # fp16 scale times an integer of 8 bits is exact in float32
    assert torch.equal(q.dequantize().double(), meaning(q))


@pytest.mark.parametrize("symmetric", [True, False])
def test_group_of_decides_which_scale_an_input_has(symmetric):
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(1)) // 16
    q = make(Scheme(4, 16, symmetric), group_of=shuffled.to(torch.int32))
    assert torch.equal(q.dequantize().double(), meaning(q))
    assert not torch.equal(q.dequantize(), make(Scheme(4, 16, symmetric)).dequantize())


def test_dequantize_casts_at_the_end():
    q = make(Scheme(8, 16, False))
    assert torch.equal(q.dequantize(torch.bfloat16), q.dequantize().to(torch.bfloat16))


def test_negative_scales_mean_negative_steps():
    codes = torch.tensor([[0, 15] * 8], dtype=torch.uint8)
    q = QWeight(Scheme(4, 16), codes, torch.tensor([[-0.5]]).half())
    assert q.dequantize()[0, :2].tolist() == [4.0, -3.5]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("regrouped", [True, False])
def test_rows_are_the_same_rows_of_the_weight(symmetric, regrouped):
    group_of = (torch.arange(64) % 4).to(torch.int32) if regrouped else None
    q = make(Scheme(4, 16, symmetric), group_of=group_of)
    part = q.rows(2, 5)
    assert part.shape == (3, 64)
    assert torch.equal(part.dequantize(), q.dequantize()[2:5])


def test_identical_sees_every_difference():
    q = make(Scheme(4, 16, False))
    assert q.identical(make(Scheme(4, 16, False)))
    for other in (
        QWeight(q.scheme, q.codes ^ 1, q.scale, q.zero),
        QWeight(q.scheme, q.codes, q.scale * 2, q.zero),
        QWeight(q.scheme, q.codes, q.scale.float(), q.zero),
        QWeight(q.scheme, q.codes, q.scale, q.zero ^ 1),
        QWeight(q.scheme, q.codes, q.scale, q.zero, (torch.arange(64) % 4).to(torch.int32)),
        QWeight(Scheme(8, 16, False), q.codes, q.scale, q.zero),
    ):
        assert not q.identical(other)


@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (3, 60), (64, 8)])
def test_identical_whatever_the_strides(shape):
    """A single row may have any, and is contiguous; others are copies, parts of something..."""
    out, width = shape
    codes = torch.randint(0, 16, (out + 1, width), dtype=torch.uint8)[1:]
    scale = torch.ones(out, 1, dtype=torch.float16)
    scheme = Scheme(4, -1)
    by_columns = codes.new_empty(width, out).copy_(codes.T).T
    ways = [codes, codes.clone(), by_columns, torch.cat([codes, codes], 1)[:, :width]]
    ways.append(codes.new_zeros(codes.numel() + 3)[3:].view(shape).copy_(codes))
    for one in ways:
        for other in ways:
            assert QWeight(scheme, one, scale).identical(QWeight(scheme, other, scale))
            assert not QWeight(scheme, one, scale).identical(QWeight(scheme, other ^ 1, scale))


def test_a_group_of_that_says_nothing_new_is_identical():
    q = make(Scheme(4, 16))
    spelled_out = QWeight(q.scheme, q.codes, q.scale, None, (torch.arange(64) // 16).int())
    assert q.identical(spelled_out)


def refusal(**changes):
    q = make(Scheme(4, 16, False))
    parts = {"scheme": q.scheme, "codes": q.codes, "scale": q.scale, "zero": q.zero}
    with pytest.raises(ValueError) as caught:
        QWeight(**{**parts, **changes})
    return str(caught.value)


def test_parts_that_do_not_fit_together_are_refused():
    q = make(Scheme(4, 16, False))
    assert "codes" in refusal(codes=q.codes.int())
    assert "scale" in refusal(scale=q.scale[:, :3])
    assert "scale" in refusal(scale=q.scale.T)
    assert "zero" in refusal(zero=q.zero[:3])
    assert "zero" in refusal(zero=None)
    assert "symmetric" in refusal(scheme=Scheme(4, 16, True))
    assert "group_of" in refusal(group_of=torch.zeros(63, dtype=torch.int32))


def test_codes_that_groups_do_not_divide_are_refused():
    q = make(Scheme(4, 16))
    with pytest.raises(UsageError, match="does not divide"):
        QWeight(Scheme(4, 48), q.codes, q.scale)


@pytest.mark.parametrize("bits", [0, 1, 4.0, 7, 9, 16, -4])
def test_scheme_refuses_bits(bits):
    with pytest.raises(UsageError, match=f"{bits} bits"):
        Scheme(bits)


@pytest.mark.parametrize("group", [0, -2, 1, 15, 1025])
def test_scheme_refuses_group_sizes(group):
    with pytest.raises(UsageError, match=f"group size {group}"):
        Scheme(4, group)


def test_scheme_counts_groups():
    assert Scheme(4, 32).groups(96) == 3
    assert Scheme(4, -1).groups(96) == 1
    assert Scheme(4, -1).width(96) == 96
    with pytest.raises(UsageError, match="64 does not divide an input width of 96"):
        Scheme(4, 64).groups(96)


@pytest.mark.parametrize(("bits", "top", "middle"), [(2, 3, 2), (3, 7, 4), (4, 15, 8)])
def test_scheme_levels(bits, top, middle):
    assert (Scheme(bits).max_code, Scheme(bits).midpoint) == (top, middle)
