"""Kernels for GPUs, in Triton's interpreter: they compute what the codes mean, however the work is
divided."""

import os

import pytest
import torch
from kernels import random_weight
from torch.nn import functional

from quantkit.core.qweight import Scheme
from quantkit.runtime.kernels import attend, choose, dense, skinny, small, tune, unpacking
from quantkit.runtime.kernels.fragments import Fragments, arrange, restore
from quantkit.runtime.kernels.skinny import Config
from quantkit.runtime.kernels.support import GPU, gpu_why_not, scheme_why_not

pytestmark = pytest.mark.skipif(
    bool(os.environ.get("QUANTKIT_TEST_GPU")), reason="for Triton's interpreter"
)

WEIGHTS = {
    "4": (Scheme(4, 64), ""),
    "4 zero": (Scheme(4, 64, symmetric=False), "zero"),
    "4 minimum": (Scheme(4, 32, symmetric=False), "minimum"),
    "3 in 4": (Scheme(3, -1), ""),
    "2 in 4 zero": (Scheme(2, 64, symmetric=False), "zero"),
    "8": (Scheme(8, 64), ""),
    "8 zero": (Scheme(8, 64, symmetric=False), "zero"),
    "5 in 8 minimum": (Scheme(5, 32, symmetric=False), "minimum"),
}
each_weight = pytest.mark.parametrize("name", WEIGHTS)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b).norm() / b.norm())


def counters(count: int = 64) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)


@each_weight
@pytest.mark.parametrize("out", [64, 100])  # whole tiles, and a last one that is filled up
def test_layout_is_undone(name, out):
    scheme, kind = WEIGHTS[name]
    q = random_weight(scheme, out, 128, kind)
    found = restore(arrange(q))
    assert torch.equal(found.codes, q.codes)
    assert torch.equal(found.scale, q.scale)
    if q.zero is not None:
        assert torch.equal(found.zero, q.zero)
    if q.minimum is not None:
        assert torch.allclose(found.minimum, q.minimum.float(), atol=1e-6)


def test_two_neighbours_lie_in_the_halves_of_a_word():
    """What the PTX relies on: four bits from place 4 i on are input 2 i, 16 above them 2 i + 1."""
    q = random_weight(Scheme(4, 32), 32, 32)
    words = arrange(q).words
    for lane, word, pair in ((0, 0, 0), (5, 1, 2), (31, 3, 3)):
        g, t = divmod(lane, 4)
        held = int(words[0, 0, lane, word]) >> (4 * pair)
        row, column = 8 * word + g, 8 * t + 2 * pair
        assert held & 15 == q.codes[row, column]
        assert held >> 16 & 15 == q.codes[row, column + 1]


@each_weight
def test_product(name):
    scheme, kind = WEIGHTS[name]
    q = random_weight(scheme, 128, 128, kind)
    weight, meant = arrange(q), q.dequantize()
    for tokens, config in (
        (3, Config(tiles=2, split=3, step=32)),
        (8, Config(split=2, step=32, parts=2)),
        (19, Config(split=2, step=32, warps=4, tokens=16)),
    ):
        assert config.fits(weight)
        x, bias = torch.randn(tokens, 128).half(), torch.randn(128).half()
        arrived = counters()
        found = skinny.matmul(x, weight, bias, arrived, config)
        assert relative(found, x.float() @ meant.T + bias.float()) < 5e-4
        assert not arrived.any()  # ready for the next launch


def test_product_of_an_odd_shape():
    """Outputs that fill no tile, steps that the parts do not divide, and rows with gaps."""
    q = random_weight(Scheme(4, 32), 70, 96)
    x = torch.randn(2, 128).half()[:, :96]
    found = skinny.matmul(x, arrange(q), None, counters(), Config(step=32, parts=2))
    assert relative(found, x.float() @ q.dequantize().T) < 5e-4


@each_weight
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_multiplied_out(name, dtype):
    scheme, kind = WEIGHTS[name]
    q = random_weight(scheme, 100, 256, kind)
    weight = arrange(q)
    found, meant = dense.dequantize(weight, dtype), q.dequantize(dtype)
    assert torch.equal(found, meant) or torch.allclose(found, meant, rtol=1e-3, atol=1e-6)
    part = dense.dequantize(weight, dtype, 1, 2)
    assert torch.equal(part, found[weight.rows : 3 * weight.rows])


@pytest.mark.parametrize("tokens", [1, 2, 8, 16, 17, 32, 64])
@pytest.mark.parametrize("shape", [(14592, 4864), (4864, 19456), (70, 96), (128, 32), (1536, 512)])
@pytest.mark.parametrize("group", [32, 96, 128, -1])
def test_every_weight_can_be_divided(tokens, shape, group):
    out, width = shape
    if width % (group if group > 0 else width):
        return
    scheme = Scheme(4, group)
    words = torch.empty(-(-out // 32), width // 32, 32, 4, device="meta")
    weight = Fragments(scheme, out, width, words, words, None, False)
    for config in choose.ways(weight, tokens, 132):
        assert config.fits(weight)
        assert all(one.fits(weight) for one in tune.around(config, weight))


def texts_of(firsts: list[int], lengths: list[int], heads: int) -> attend.Texts:
    arrived = counters(len(firsts) * heads)
    return attend.Texts(torch.tensor(firsts), torch.tensor(lengths), 200, arrived)


@pytest.mark.parametrize("heads, key_heads, width", [(4, 4, 64), (8, 2, 80)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("split", [1, 8])
def test_attention_of_a_step(heads, key_heads, width, dtype, split, monkeypatch):
    """Stretches in any order, of one token up to several blocks, divided or not; what lies outside
    of them is never read."""
    monkeypatch.setattr(attend, "shares", lambda *_: split)
    torch.manual_seed(0)
    query = torch.randn(4, heads, 1, width).to(dtype)
    keys, values = (torch.randn(key_heads, 400, width).to(dtype) for _ in range(2))
    firsts, lengths = [203, 5, 399, 130], [190, 94, 0, 63]
    outside = torch.ones(400, dtype=torch.bool)
    for first, length in zip(firsts, lengths):
        outside[first : first + length + 1] = False
    keys[:, outside] = values[:, outside] = float("nan")
    texts = texts_of(firsts, lengths, key_heads)
    found = attend.attend(query, keys, values, texts, None)
    assert not texts.arrived.any()  # ready for the next launch
    for row, (first, length) in enumerate(zip(firsts, lengths)):
        own = (t[:, first : first + length + 1].float() for t in (keys, values))
        wide = [t.repeat_interleave(heads // key_heads, 0) for t in own]
        meant = functional.scaled_dot_product_attention(query[row].float(), *wide)
        assert relative(found[row, 0], meant[:, 0]) < (1e-3 if dtype == torch.float16 else 1e-5)


def test_attention_that_the_kernel_does_not_compute():
    keys = torch.randn(2, 9, 16)

    def attended(query, texts, held=keys, **others):
        with attend.computing(texts):
            attend.attention(None, query, held[None], held[None], None, **others)

    query = torch.randn(1, 2, 1, 16)
    for wrong, said in (
        ({"query": query.double()}, "float64"),
        ({"query": query.half()}, "several dtypes"),
        ({"query": torch.randn(1, 2, 2, 16)}, "more tokens"),
        ({"held": torch.randn(4, 9, 16)}, "more heads"),
        ({"held": torch.randn(2, 9, 257)}, "wider"),
        ({"held": keys.transpose(1, 2)}, "lie apart"),
        ({"softcap": 50.0}, "softcap"),
        ({"dropout": 0.1}, "dropout"),
    ):
        texts = texts_of([0], [3], 2)
        with pytest.raises(attend.Unfit, match=said):
            attended(**{"query": query, "texts": texts, **wrong})


def test_keys_and_values_are_written_where_each_text_is():
    keys, values = torch.zeros(2, 9, 16), torch.zeros(2, 9, 24)
    key, value = torch.randn(3, 1, 2, 16).transpose(1, 2), torch.randn(3, 2, 1, 24)
    small.keep(key, value, keys, values, torch.tensor([7, 0, 4]))
    for row, place in enumerate((7, 0, 4)):
        assert torch.equal(keys[:, place], key[row, :, 0])
        assert torch.equal(values[:, place], value[row, :, 0])
    assert int((keys != 0).any(-1).sum()) == int((values != 0).any(-1).sum()) == 6


@pytest.mark.parametrize("bits, middle", [(4, 8), (4, 4), (8, 128)])
def test_ptx_takes_away_the_middle(bits, middle):
    """The constants: what a code of 0 becomes in float16 before the middle is taken away."""
    text = unpacking.ptx(bits, middle, torch.float16)
    half = torch.tensor([1024 + middle], dtype=torch.float16).view(torch.int16).item()
    assert f"{half << 16 | half:#x}" in text


def test_reasons():
    ampere, turing = GPU("A100", 108, (8, 0)), GPU("T4", 40, (7, 5))
    assert gpu_why_not(ampere) is None
    assert "8.0" in gpu_why_not(turing)
    assert scheme_why_not(Scheme(4, 128), 512) is None
    assert "nf4" in scheme_why_not(Scheme(4, 64, grid="nf4"), 512)
    assert "16" in scheme_why_not(Scheme(4, 16), 512)
