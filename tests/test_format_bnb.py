"""The bitsandbytes format reads what bitsandbytes writes, and gives back the same bytes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantkit.core.checkpoint import Checkpoint, TensorSpec
from quantkit.core.qweight import LEVELS, QWeight, Scheme
from quantkit.errors import QuantkitError
from quantkit.formats import bnb

GOLDEN = Path(__file__).parent / "golden" / "bnb"
FOUR_BITS = ["nf4", "nf4-nested", "nf4-half-128", "nf4-row-2048", "fp4", "fp4-nested"]
READABLE = [*FOUR_BITS, "nf4-storage", "int8"]
STATE = "weight.quant_state.bitsandbytes__nf4"


class Held(dict):
    """Tensors by name, as a Checkpoint has them."""

    def spec(self, name):
        return TensorSpec.of(self[name])

    def get(self, name):
        return self[name]


def golden(file):
    found = Checkpoint(GOLDEN, [f"{file}.safetensors"])
    return Held({name: found.get(name) for name in found})


def mine(held):
    return {n.removeprefix("x."): t for n, t in held.items() if n.startswith("x.")}


def same_bytes(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# what bitsandbytes wrote


@pytest.mark.parametrize("file", [*FOUR_BITS, "nf4-storage"])
def test_four_bits_mean_what_bitsandbytes_says(file):
    held = golden(file)
    assert bnb.linears(held, {}) == ["x"]
    assert set(bnb.names(held, "x")) == {name for name in held if name.startswith("x.")}
    q = bnb.read(held, "x", {})
    assert (*q.shape, q.scheme) == bnb.describe(held, "x", {})
    assert torch.equal(q.dequantize(), held["foreign.weight"])
    dtype = bnb.dtype_of(held, "x")
    assert held["foreign.cast"].dtype == dtype
    assert torch.equal(q.dequantize(dtype), held["foreign.cast"])


def test_eight_bits_mean_what_bitsandbytes_says():
    """bitsandbytes multiplies by float32(1 / 127) in two steps, which rounds a little more."""
    held = golden("int8")
    q = bnb.read(held, "x", {})
    assert (*q.shape, q.scheme) == (9, 200, Scheme(8, -1)) == bnb.describe(held, "x", {})
    torch.testing.assert_close(q.dequantize(), held["foreign.weight"], rtol=3e-7, atol=0)


@pytest.mark.parametrize("file", [*FOUR_BITS, "int8"])
def test_reading_and_packing_gives_back_the_same_bytes(file):
    held = golden(file)
    q, nested = bnb.read(held, "x", {}), bnb.read_nested(held, "x")
    assert (nested is not None) == ("nested" in file)
    packed = bnb.pack(q, nested, bnb.dtype_of(held, "x"))
    assert set(packed) == set(mine(held))
    for suffix, tensor in mine(held).items():
        assert same_bytes(packed[suffix], tensor), suffix


def test_wide_storage_is_packed_into_bytes_again():
    held = golden("nf4-storage")
    assert held["x.weight"].dtype == torch.bfloat16
    packed = bnb.pack(bnb.read(held, "x", {}), bnb.read_nested(held, "x"), torch.bfloat16)
    assert raw(packed["weight"]) == raw(held["x.weight"])


@pytest.mark.parametrize("file", READABLE)
def test_codes_can_be_left_unread(file):
    held = golden(file)
    whole, quick = bnb.read(held, "x", {}), bnb.read(held, "x", {}, codes=False)
    assert quick.shape == whole.shape
    assert torch.equal(quick.scale, whole.scale)
    assert not quick.codes.any()
    assert whole.codes.any()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_levels_are_those_of_bitsandbytes(kind):
    assert same_bytes(torch.tensor(LEVELS[kind]), golden("maps")[kind])


@pytest.mark.parametrize(
    ("name", "scheme", "options"),
    [
        ("nf4-nested", Scheme(4, 64, grid="nf4"), {"double_quant": True, "dtype": torch.bfloat16}),
        ("fp4", Scheme(4, 64, grid="fp4"), {}),
        ("int8", Scheme(8, -1), {}),
    ],
)
def test_the_configuration_is_what_transformers_writes(name, scheme, options):
    dense = ["a.b"] if name == "nf4-nested" else []
    made = bnb.configuration(scheme, dense, "quantkit", **options)
    written = json.loads((GOLDEN / "config.json").read_text())[name]
    assert made == {"quantization_config": written}
    assert bnb.beside({}, "model") == {}


@pytest.mark.parametrize("file", ["nf4-ragged", "nf4-odd"])
def test_blocks_that_cross_rows_are_refused(file):
    with pytest.raises(QuantkitError, match=r"^x has blocks of 64 weights in rows of .* ends"):
        bnb.describe(golden(file), "x", {})


# packing


def make(grid="nf4", block=64, out=6, width=256, seed=0):
    g = torch.Generator().manual_seed(seed)
    scheme = Scheme(4, block, grid=grid)
    codes = torch.randint(0, 16, (out, width), generator=g).to(torch.uint8)
    return QWeight(scheme, codes, torch.rand(out, scheme.groups(width), generator=g))


def as_tensors(packed, prefix="a.b"):
    return Held({f"{prefix}.{suffix}": tensor for suffix, tensor in packed.items()})


@pytest.mark.parametrize("grid", ["nf4", "fp4"])
@pytest.mark.parametrize(("block", "width"), [(32, 96), (64, 320), (1024, 1024), (-1, 4096)])
def test_read_inverts_pack(grid, block, width):
    q = make(grid, block, 5, width)
    packed = bnb.pack(q, dtype=torch.bfloat16)
    assert bnb.read(as_tensors(packed), "a.b", {}).identical(q)
    assert bnb.dtype_of(as_tensors(packed), "a.b") == torch.bfloat16


@pytest.mark.parametrize("q", [make(), make("fp4", 32), make(block=-1, width=128)])
def test_specs_are_what_pack_returns(q):
    planned = bnb.specs(*q.shape, q.scheme, torch.float32)
    assert {suffix: TensorSpec.of(t) for suffix, t in bnb.pack(q).items()} == planned


def test_a_byte_drawn_by_hand():
    q = make()
    q.codes[1, 2:4] = torch.tensor([0xA, 0x3])
    assert bnb.pack(q)["weight"].flatten()[(256 + 2) // 2] == 0xA3


def eight(scale, seed=0):
    codes = torch.randint(0, 256, (len(scale), 48), generator=torch.Generator().manual_seed(seed))
    return QWeight(Scheme(8, -1), codes.to(torch.uint8), scale[:, None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_eight_bits_with_short_scales_are_packed_exactly(dtype):
    q = eight(torch.rand(1000).to(dtype))
    packed = bnb.pack(q)
    assert {suffix: TensorSpec.of(t) for suffix, t in packed.items()} == bnb.specs(
        *q.shape, q.scheme
    )
    again = bnb.read(as_tensors(packed), "a.b", {})
    assert torch.equal(again.codes, q.codes)
    assert torch.equal(again.scale, q.scale.double())


def test_eight_bits_with_scales_that_would_be_rounded_are_not_packed():
    with pytest.raises(ValueError, match="127 times"):
        bnb.pack(eight(torch.rand(1000)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scale": torch.ones(6, 4).half()}, "float16"),
        ({"scheme": Scheme(4, 64)}, "NF4"),
        ({"scheme": Scheme(8, 64)}, "NF4"),
        ({"group_of": torch.zeros(256, dtype=torch.int32)}, "neighbours"),
    ],
)
def test_what_the_format_cannot_hold_is_not_packed(change, said):
    with pytest.raises(ValueError, match=said):
        bnb.pack(replace(make(), **change))


@pytest.mark.parametrize(
    ("width", "scheme", "said"),
    [
        (256, Scheme(4, 128), "NF4"),
        (256, Scheme(8, -1, False), "zero points"),
        (256, Scheme(8, 64), "one scale a row"),
        (256, Scheme(4, 16, grid="nf4"), "blocks of 32 to 4096, not 16"),
        (96, Scheme(4, -1, grid="nf4"), "not 96"),
        (96, Scheme(4, 64, grid="fp4"), "do not divide"),
        (256, Scheme(8, -1), None),
        (256, Scheme(8, 256), None),
        (2048, Scheme(4, -1, grid="nf4"), None),
        (192, Scheme(4, 64, grid="fp4"), None),
    ],
)
def test_refusals_tell_the_reason(width, scheme, said):
    found = bnb.refusal(8, width, scheme)
    assert found is None if said is None else said in found


def test_nested_scales_of_another_weight_are_not_packed():
    held = golden("nf4-nested")
    q, nested = bnb.read(held, "x", {}), bnb.read_nested(held, "x")
    with pytest.raises(ValueError, match="nested"):
        bnb.pack(q, replace(nested, offset=nested.offset * 1.01))


# tensors from strangers


def refused(held, prefix="x"):
    assert bnb.linears(held, {}) == [prefix]
    with pytest.raises(QuantkitError) as caught:
        bnb.read(held, prefix, {})
    assert prefix in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("file", READABLE)
def test_every_tensor_but_weight_format_is_needed(file):
    for name in bnb.names(golden(file), "x"):
        held = golden(file)
        del held[name]
        if name == "x.weight_format":
            bnb.read(held, "x", {})
        elif name != "x.SCB":  # a plain int8 tensor is nobody's linear
            assert "no tensor" in refused(held)


@pytest.mark.parametrize("file", READABLE)
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.reshape(-1)[:-1],
        lambda t: t[None],
        lambda t: t.double(),
        lambda t: t.reshape(-1)[:0],
        lambda t: torch.cat([t.reshape(-1), t.reshape(-1)]),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(file, change):
    for name in bnb.names(golden(file), "x"):
        held = golden(file)
        held[name] = change(held[name])
        refused(held)


def with_state(change, file="nf4-nested"):
    held = golden(file)
    content = json.loads(raw(held[f"x.{STATE}"]))
    change(content)
    held[f"x.{STATE}"] = as_text(json.dumps(content))
    return held


def as_text(text):
    return torch.tensor(list(text if isinstance(text, bytes) else text.encode())).to(torch.uint8)


SIZES = (None, True, 0, -1, 1.5, "64", [], {}, 2**31, 10**30, float("nan"))
HOSTILE = [
    *(("quant_type", v) for v in (None, 1, "fp4", "int8", [], {})),
    *(("blocksize", v) for v in (*SIZES, 16, 48, 8192)),
    *(("dtype", v) for v in (None, 1, "int8", "float64", "load", "__class__", [], {})),
    *(("shape", v) for v in (None, 7, "ab", [], [1], [33, 256, 1], [256, "33"], {"a": 1, "b": 2})),
    *(("shape", [33, v]) for v in SIZES),
    *(("shape", v) for v in ([33, 255], [32, 256], [2**30, 2**30])),
    *(("nested_blocksize", v) for v in (*SIZES, 2**30, 128)),
    *(("nested_dtype", v) for v in (None, "float16", 1)),
    *(("nested_offset", v) for v in (None, "1", True, [], float("nan"), float("inf"))),
]


@pytest.mark.parametrize(("key", "value"), HOSTILE)
def test_hostile_states_are_refused(key, value):
    refused(with_state(lambda content: content.update({key: value})))


@pytest.mark.parametrize(
    "key",
    ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype"],
)
def test_states_that_lack_a_field_are_refused(key):
    refused(with_state(lambda content: content.pop(key)))


def test_a_state_that_does_not_speak_of_nested_scales_is_refused():
    refused(with_state(lambda content: [content.pop(k) for k in [*content] if "nested" in k]))
    message = refused(
        with_state(lambda c: c.update(nested_blocksize=256, nested_dtype="float32"), "nf4")
    )
    assert "nested_offset" in message


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"{", b"[]", b"1", b"null", b"\xff\xfe", b"[" * 4000, b'{"a":' * 800, b"1" * 4096),
        b'{"blocksize":' + b"9" * 4070 + b"}",
    ],
    ids=range(10),
)
def test_texts_that_are_no_state_are_refused(text):
    held = golden("nf4")
    held[f"x.{STATE}"] = as_text(text)
    refused(held)


def test_a_text_of_absurd_length_is_refused():
    held = golden("nf4")
    held[f"x.{STATE}"] = as_text(raw(held[f"x.{STATE}"]) + b" " * 5000)
    assert "no JSON text" in refused(held)


def test_true_is_no_size():
    packed = bnb.pack(make(out=1))
    packed[STATE] = as_text(raw(packed[STATE]).replace(b"[1, 256]", b"[true, 256]"))
    assert "shape" in refused(as_tensors(packed, "x"))


def test_two_states_are_refused():
    held = golden("nf4")
    held["x.weight.quant_state.bitsandbytes__fp4"] = held[f"x.{STATE}"]
    assert "two tensors" in refused(held)


def test_nested_scales_beside_plain_ones_are_refused():
    held = golden("nf4")
    held["x.weight.nested_absmax"] = torch.ones(1)
    assert "nested_absmax" in refused(held)


def test_another_map_is_refused():
    held = golden("nf4")
    held["x.weight.quant_map"] = held["x.weight.quant_map"] * 2
    assert "quant_map" in refused(held)


def test_old_layouts_of_int8_are_refused():
    held = golden("int8")
    held["x.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    assert "old GPU" in refused(held)


def test_blocks_larger_than_a_scheme_are_refused():
    packed = bnb.pack(make(block=-1, out=3, width=2048))
    text = raw(packed[STATE]).decode()
    packed[STATE] = as_text(re.sub(r"\[3, 2048\]", "[1, 6144]", text))
    packed["weight.absmax"] = packed["weight.absmax"].reshape(3)
    assert "blocks of 2048" in refused(as_tensors(packed, "x"))


def test_dense_tensors_are_nobodys_linear():
    held = Held({"x.weight": torch.ones(4, 4), "x.bias": torch.ones(4), "y.absmax": torch.ones(4)})
    assert bnb.linears(held, {}) == []
