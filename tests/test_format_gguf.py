"""GGUF's blocks mean what the gguf package says, bit for bit, and packing only moves bits.

The files in golden/gguf were made by the gguf package; make.py there says how.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit.core.gguf_values import nbytes
from quantkit.core.qweight import QWeight, Scheme
from quantkit.errors import QuantkitError
from quantkit.formats import gguf

GOLDEN = Path(__file__).parent / "golden" / "gguf"
NAME = "blk.3.ffn_down.weight"
K = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
KINDS = {  # what a type is as a scheme
    "Q4_0": Scheme(4, 32, True),
    "Q4_1": Scheme(4, 32, False),
    "Q5_0": Scheme(5, 32, True),
    "Q5_1": Scheme(5, 32, False),
    "Q8_0": Scheme(8, 32, True),
    "Q2_K": Scheme(2, 16, False),
    "Q3_K": Scheme(3, 16, True),
    "Q4_K": Scheme(4, 32, False),
    "Q5_K": Scheme(5, 32, False),
    "Q6_K": Scheme(6, 16, True),
}
every_type = pytest.mark.parametrize("type", gguf.QUANTIZED)
every_written = pytest.mark.parametrize("type", gguf.WRITTEN)


def golden(file, type):
    """(raw, values) as torch tensors."""
    with np.load(GOLDEN / file) as held:
        return torch.from_numpy(held[f"{type}.raw"]), torch.from_numpy(held[f"{type}.values"])


def random_blocks(type):
    return golden("k_blocks.npz" if type in K else "blocks.npz", type)


def same_bits(found, expected):
    """Equal to the sign of zeros; a NaN may have other bits."""
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found[~nan].view(torch.int32), expected[~nan].view(torch.int32))


def make(scheme, out=6, width=96, seed=0):
    """A weight of this scheme in float16, with zero points where it is asymmetric."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, scheme.max_code + 1, (out, width), generator=g).to(torch.uint8)
    shape = (out, scheme.groups(width))
    scale = torch.randn(shape, generator=g).half()  # of both signs
    zero = None
    if not scheme.symmetric:
        zero = torch.randint(0, scheme.max_code + 1, shape, generator=g).to(torch.uint8)
    return QWeight(scheme, codes, scale, zero)


def make_with_minimum(scheme, out=6, width=96):
    q = make(replace(scheme, symmetric=True), out, width)
    minimum = torch.randn(q.scale.shape, generator=torch.Generator().manual_seed(1)).half()
    return replace(q, scheme=replace(q.scheme, symmetric=False), minimum=minimum)


def make_for(type, out=6, width=96):
    scheme = KINDS[type]
    return (make if scheme.symmetric else make_with_minimum)(scheme, out, width)


# what others make of the same bytes


@every_type
def test_random_bytes_mean_what_the_gguf_package_says(type):
    raw, values = random_blocks(type)
    q = gguf.unpack(raw, type, tuple(values.shape))
    assert q.scheme == KINDS[type]
    assert q.scale.dtype == (torch.float32 if type in K else torch.float16)
    same_bits(q.dequantize(), values)


@every_written
def test_ordinary_weights_mean_what_the_gguf_package_says(type):
    raw, values = golden("quantized.npz", type)
    same_bits(gguf.unpack(raw, type, tuple(values.shape)).dequantize(), values)


@every_written
@pytest.mark.parametrize("file", ["blocks.npz", "quantized.npz"])
def test_foreign_bytes_are_written_back_unchanged(type, file):
    raw, values = golden(file, type)
    assert torch.equal(gguf.pack(gguf.unpack(raw, type, tuple(values.shape)), type), raw)


@every_type
def test_scales_of_two_levels_are_exact(type):
    """The product of a float16 and a code of 8 bits has at most 19 digits; float32 has 24."""
    raw, values = random_blocks(type)
    q = gguf.unpack(raw, type, tuple(values.shape))
    finite = q.scale.isfinite()
    mantissa, _ = torch.frexp(q.scale.double()[finite])
    assert torch.equal((mantissa * 2**19).round(), mantissa * 2**19)
    assert bool(finite.any())


# the layout, drawn by hand


def test_a_block_of_q4_0_drawn_by_hand():
    codes = torch.arange(32, dtype=torch.uint8)[None] % 16
    codes[0, 16:] = 15 - codes[0, 16:]
    raw = gguf.pack(QWeight(Scheme(4, 32), codes, torch.tensor([[1.0]]).half()), "Q4_0")
    assert raw[0].tolist() == [0x00, 0x3C, *(((15 - k) << 4) | k for k in range(16))]


def test_a_block_of_q5_1_drawn_by_hand():
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 0], codes[0, 9], codes[0, 17] = 0x13, 0x10, 0x1A
    scheme = Scheme(5, 32, False)
    scale, minimum = torch.tensor([[1.0]]).half(), torch.tensor([[-2.0]]).half()
    raw = gguf.pack(QWeight(scheme, codes, scale, minimum=minimum), "Q5_1")
    nibbles = [0x03, 0xA0, *[0] * 14]
    assert raw[0].tolist() == [0x00, 0x3C, 0x00, 0xC0, 0x01, 0x02, 0x02, 0x00, *nibbles]


def test_a_block_of_q8_0_drawn_by_hand():
    codes = torch.full((1, 32), 128, dtype=torch.uint8)
    codes[0, :3] = torch.tensor([0, 127, 255])
    raw = gguf.pack(QWeight(Scheme(8, 32), codes, torch.tensor([[-1.0]]).half()), "Q8_0")
    assert raw[0].tolist() == [0x00, 0xBC, 0x80, 0xFF, 0x7F, *[0] * 29]  # -128, -1, 127


# packing


@every_written
@pytest.mark.parametrize(("out", "width"), [(1, 32), (6, 96), (5, 288)])
def test_unpack_inverts_pack(type, out, width):
    q = make_for(type, out, width)
    raw = gguf.pack(q, type)
    assert raw.dtype == torch.uint8
    assert raw.shape == (out, nbytes((width,), type))
    assert gguf.unpack(raw, type, (out, width)).identical(q)


@pytest.mark.parametrize(("bits", "type"), [(4, "Q4_0"), (5, "Q5_0"), (8, "Q8_0")])
@pytest.mark.parametrize("group", [32, 96, -1])
def test_larger_groups_go_over_exactly(bits, type, group):
    q = make(Scheme(bits, group))
    raw = gguf.pack(q.regrouped(32), type)
    assert torch.equal(gguf.unpack(raw, type, q.shape).dequantize(), q.dequantize())


@pytest.mark.parametrize(("bits", "type"), [(4, "Q4_1"), (5, "Q5_1")])
def test_a_symmetric_weight_goes_into_a_type_with_minimums(bits, type):
    q = make(Scheme(bits, 32))
    found = gguf.unpack(gguf.pack(q, type), type, q.shape)
    assert torch.equal(found.dequantize(), q.dequantize())
    assert torch.equal(found.scale, q.scale)


def test_zero_points_go_over_where_their_product_is_exact():
    q = make(Scheme(4, 32, False))
    q = replace(q, scale=(q.scale.float() * 8).round().half() / 8)  # few digits: nothing to round
    found = gguf.unpack(gguf.pack(q, "Q4_1"), "Q4_1", q.shape)
    assert torch.equal(found.dequantize(), q.dequantize())


def test_zero_points_that_would_be_rounded_are_refused():
    q = make(Scheme(4, 32, False), 32)
    assert not torch.equal((q.scale * q.zero).float(), q.scale.float() * q.zero)
    with pytest.raises(ValueError, match="rounded"):
        gguf.pack(q, "Q4_1")


def test_minimums_of_another_dtype_are_packed_where_they_are_float16_s():
    q = make_with_minimum(Scheme(4, 32, False))
    wide = replace(q, minimum=q.minimum.float() + 2**-20)
    with pytest.raises(ValueError, match="rounded"):
        gguf.pack(wide, "Q4_1")
    exact = replace(q, minimum=q.minimum.float())
    assert torch.equal(gguf.pack(exact, "Q4_1"), gguf.pack(q, "Q4_1"))


def test_minimums_that_float16_does_not_reach_are_refused():
    q = make(Scheme(4, 32))
    q = replace(q, scale=torch.full_like(q.scale, 60000.0))
    with pytest.raises(ValueError, match="rounded"):
        gguf.pack(q, "Q4_1")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_that_are_not_float16_are_not_written(dtype):
    q = make(Scheme(4, 32))
    with pytest.raises(ValueError, match=str(dtype)):
        gguf.pack(replace(q, scale=q.scale.to(dtype)), "Q4_0")


def test_groups_that_are_not_blocks_are_not_written():
    with pytest.raises(ValueError, match="32 neighbours"):
        gguf.pack(make(Scheme(4, 96)), "Q4_0")
    order = torch.arange(96, dtype=torch.int32) % 3
    with pytest.raises(ValueError, match="32 neighbours"):
        gguf.pack(replace(make(Scheme(4, 32)), group_of=order), "Q4_0")


@pytest.mark.parametrize(
    ("width", "scheme", "type", "said"),
    [
        (96, Scheme(4, 32, False), "Q4_0", "no zero points"),
        (96, Scheme(8, 32, False), "Q8_0", "no zero points"),
        (96, Scheme(8, 32), "Q4_0", "4 bits, not 8"),
        (96, Scheme(3, 32), "Q4_1", "4 bits, not 3"),
        (96, Scheme(4, 32, True, "nf4"), "Q4_0", "nf4"),
        (96, Scheme(4, 16), "Q4_0", "groups of 16"),
        (96, Scheme(4, 48), "Q4_0", "groups of 48"),
        (80, Scheme(4, -1), "Q4_0", "rows of 80"),
        (256, Scheme(4, 32), "Q4_K", "does not write Q4_K"),
        (256, Scheme(4, 32), "F16", "does not write F16"),
    ],
)
def test_refusals(width, scheme, type, said):
    assert said in gguf.refusal(8, width, scheme, type)
    q = make(scheme, 8, width)
    with pytest.raises(ValueError, match=said):
        gguf.pack(q, type)


@every_written
def test_what_can_be_written_is_not_refused(type):
    for group in (32, 96, -1):
        assert gguf.refusal(8, 96, replace(KINDS[type], group_size=group), type) is None


# plain tensors


@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "I32", "F64"])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_plain_tensors_come_back(type, shape):
    tensor = (torch.randn(shape) * 100).to(gguf.DENSE[type])
    raw = gguf.pack_dense(tensor, type)
    assert raw.dtype == torch.uint8
    assert raw.nbytes == nbytes(shape, type)
    found = gguf.dense(raw, type, shape)
    assert found.dtype == tensor.dtype
    assert torch.equal(found, tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_plain_tensors_are_widened(dtype):
    tensor = torch.randn(3, 5).to(dtype)
    raw = gguf.pack_dense(tensor, "F32")
    assert torch.equal(gguf.dense(raw, "F32", (3, 5)), tensor.float())


@pytest.mark.parametrize(
    ("dtype", "type"),
    [
        (torch.float32, "F16"),
        (torch.bfloat16, "F16"),
        (torch.float16, "BF16"),
        (torch.int32, "F32"),
        (torch.float32, "I32"),
    ],
)
def test_plain_tensors_are_never_rounded(dtype, type):
    with pytest.raises(ValueError, match=type):
        gguf.pack_dense(torch.ones(2, 2).to(dtype), type)


# refusals of what is read


@pytest.mark.parametrize("type", ["IQ4_NL", "IQ2_XXS", "MXFP4", "TQ1_0", "NVFP4", "Q8_K", "F16"])
def test_types_that_are_not_read_are_refused_by_name(type):
    raw = torch.zeros(2, nbytes((256,), type), dtype=torch.uint8)
    with pytest.raises(QuantkitError, match=type) as caught:
        gguf.unpack(raw, type, (2, 256), NAME)
    assert NAME in caught.value.message


@every_type
def test_bytes_that_do_not_fit_the_shape_are_refused(type):
    raw, values = random_blocks(type)
    rows, width = values.shape
    for bad, shape in [
        (raw[:-1], (rows, width)),
        (raw[:, :-1], (rows, width)),
        (raw.flatten(), (rows, width)),
        (raw, (rows, width - 1)),
        (raw, (rows, width * 2)),
        (raw, (rows + 1, width)),
        (raw.view(torch.int8), (rows, width)),
    ]:
        with pytest.raises(QuantkitError, match=NAME):
            gguf.unpack(bad, type, shape, NAME)


def test_a_quantized_tensor_is_not_a_plain_one():
    raw, values = random_blocks("Q4_0")
    with pytest.raises(QuantkitError, match="Q4_0"):
        gguf.dense(raw, "Q4_0", tuple(values.shape), NAME)


def test_experts_are_a_weight_of_all_their_rows():
    raw, values = golden("quantized.npz", "Q4_0")
    rows, width = values.shape
    q = gguf.unpack(raw, "Q4_0", (rows, 1, width))
    assert q.identical(gguf.unpack(raw, "Q4_0", (rows, width)))
