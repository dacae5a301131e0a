"""The compressed-tensors format only moves bits, and refuses tensors that do not fit together."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.core.checkpoint import Checkpoint, TensorSpec
from quantkit.core.qweight import QWeight, Scheme
from quantkit.errors import QuantkitError
from quantkit.formats import compressed_tensors as ct

GOLDEN = Path(__file__).parent / "golden" / "compressed_tensors"
NAME = "model.layers.3.mlp.down_proj"
BITS = [2, 3, 4, 5, 6, 8]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


class Held(dict):
    """Tensors in memory, in the way of a Checkpoint."""

    def spec(self, name):
        return TensorSpec.of(self[name])

    def get(self, name):
        return self[name]


def held(packed):
    return Held({f"{NAME}.{suffix}": tensor for suffix, tensor in packed.items()})


def make(scheme, out=12, width=192, zeros=None, dtype=torch.float16, seed=0):
    """``zeros`` is the only zero point, or None for all of them."""
    g = torch.Generator().manual_seed(seed)
    groups = scheme.groups(width)
    low, high = (0, scheme.max_code) if zeros is None else (zeros, zeros)
    zero = torch.randint(low, high + 1, (out, groups), generator=g).to(torch.uint8)
    zero[0, 0] = low  # not all of them are the midpoint by chance
    return QWeight(
        scheme,
        torch.randint(0, scheme.max_code + 1, (out, width), generator=g).to(torch.uint8),
        torch.randn(out, groups, generator=g).to(dtype),
        None if scheme.symmetric else zero,
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 32, 96, -1])
@pytest.mark.parametrize("bits", BITS)
def test_read_inverts_pack(bits, group, symmetric):
    scheme = Scheme(bits, group, symmetric)
    for out, width in ((1, 192), (12, 96 * 5), (13, 192), (33, 288)):
        if group == width:
            continue
        for dtype in DTYPES:
            q = make(scheme, out, width, dtype=dtype)
            assert ct.read(held(ct.pack(q)), NAME, {}).identical(q)


@pytest.mark.parametrize("bits", BITS)
def test_zero_points_at_the_ends_and_in_the_middle(bits):
    scheme = Scheme(bits, 32, False)
    for zero in (0, scheme.max_code):
        q = make(scheme, 13, zeros=zero)
        assert ct.read(held(ct.pack(q)), NAME, {}).identical(q)
    q = make(scheme, 13, zeros=scheme.midpoint)
    found = ct.read(held(ct.pack(q)), NAME, {})
    assert found.identical(make(Scheme(bits, 32), 13))
    assert torch.equal(found.dequantize(), q.dequantize())


@pytest.mark.parametrize("group", [17, 51, -1])
@pytest.mark.parametrize(("bits", "width"), [(2, 51), (4, 51), (4, 85), (8, 51), (8, 102)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_widths_that_do_not_fill_words(bits, width, group, symmetric):
    if group == width or width % group:
        group = -1
    q = make(Scheme(bits, group, symmetric), 7, width)
    assert ct.refusal(7, width, q.scheme) is None
    packed = ct.pack(q)
    assert packed["weight_packed"].shape == (7, -(-width * bits // 32))
    assert ct.read(held(packed), NAME, {}).identical(q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_specs_are_what_pack_returns(bits, symmetric, dtype):
    scheme = Scheme(bits, 32, symmetric)
    packed = ct.pack(make(scheme, 13, dtype=dtype))
    planned = ct.specs(13, 192, scheme, dtype)
    assert {suffix: TensorSpec.of(tensor) for suffix, tensor in packed.items()} == planned
    assert all(tensor.is_contiguous() for tensor in packed.values())
    assert ct.describe(held(packed), NAME, {}) == (13, 192, scheme)
    assert ct.linears(held(packed), {}) == [NAME]
    assert ct.names(held(packed), NAME) == [f"{NAME}.{suffix}" for suffix in packed]


# the documented layout, read without quantkit's help


def fields(words, bits, count):
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(stream >> (bits * k)) & (2**bits - 1) for k in range(count)]


@pytest.mark.parametrize("bits", BITS)
def test_rows_and_zero_points_are_streams_of_bits(bits):
    q = make(Scheme(bits, 32, False), 13, 96)
    packed = ct.pack(q)
    for row, codes in zip(packed["weight_packed"].tolist(), q.codes.tolist()):
        assert fields(row, bits, 96) == codes
    columns = packed["weight_zero_point"].T.tolist()
    for column, zeros in zip(columns, q.zero.T.tolist()):
        assert fields(column, bits, 13) == zeros
        assert sum((w & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(column)) < 2 ** (13 * bits)
    assert packed["weight_shape"].tolist() == [13, 96]


# what compressed-tensors wrote


def golden():
    tensors = Checkpoint(GOLDEN, ["pack_quantized.safetensors"])
    prefixes = ct.linears(tensors, {"quant_method": "compressed-tensors"})
    assert len(prefixes) == 14
    return tensors, prefixes


def test_it_is_read_to_the_weights_that_the_library_reads():
    tensors, prefixes = golden()
    for prefix in prefixes:
        q = ct.read(tensors, prefix, {"format": "pack-quantized"})
        theirs = tensors.get(f"{prefix}.dequantized")
        assert torch.equal(q.dequantize(theirs.dtype), theirs)
        bits, group, kind = re.fullmatch(r"b(\d)\.g(-?\d+)\.(a?sym)", prefix).groups()
        assert q.scheme == Scheme(int(bits), int(group), kind == "sym")


def test_it_is_written_as_the_library_writes_it():
    tensors, prefixes = golden()
    for prefix in prefixes:
        packed = ct.pack(ct.read(tensors, prefix, {}))
        assert ct.names(tensors, prefix) == [f"{prefix}.{suffix}" for suffix in packed]
        for suffix, tensor in packed.items():
            theirs = tensors.get(f"{prefix}.{suffix}")
            assert TensorSpec.of(tensor) == TensorSpec.of(theirs)
            assert torch.equal(tensor, theirs)


# groups for every input


def with_index(index):
    packed = ct.pack(make(Scheme(4, 32, False)))
    return held({**packed, "weight_g_idx": index})


def test_a_group_for_every_input_is_read_and_not_written():
    index = torch.arange(192, dtype=torch.int32).flip(0) // 32
    q = ct.read(with_index(index), NAME, {})
    assert torch.equal(q.group_of, index)
    assert torch.equal(
        q.dequantize(), replace(make(Scheme(4, 32, False)), group_of=index).dequantize()
    )
    with pytest.raises(ValueError, match="contiguous"):
        ct.pack(q)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_index_that_says_nothing_is_none(dtype):
    for index in (torch.arange(192, dtype=dtype) // 32, torch.full((192,), -1, dtype=dtype)):
        assert ct.read(with_index(index), NAME, {}).identical(make(Scheme(4, 32, False)))


@pytest.mark.parametrize("wrong", [-1, 6, 2**31 - 1, -(2**31)])
def test_groups_that_do_not_exist_are_refused(wrong):
    index = torch.arange(192, dtype=torch.int32) // 32
    index[7] = wrong
    with pytest.raises(QuantkitError, match=f"{re.escape(NAME)}.weight_g_idx"):
        ct.read(with_index(index), NAME, {})


# what the configuration says


def groups(*weights):
    return {"config_groups": {f"group_{i}": {"weights": w} for i, w in enumerate(weights)}}


def test_bits_of_narrow_weights_are_those_of_the_configuration():
    """Of two inputs, 2 to 8 bits all take one word."""
    q = make(Scheme(4, -1), 5, 2)
    tensors = held(ct.pack(q))
    said = groups({"num_bits": 4, "group_size": None}, {"num_bits": 16})
    assert ct.read(tensors, NAME, said).identical(q)
    for config in ({}, groups({"num_bits": 4}, {"num_bits": 8}), {"config_groups": ["x"]}):
        with pytest.raises(QuantkitError, match=re.escape(NAME)):
            ct.read(tensors, NAME, config)


def test_shapes_win_over_a_configuration_that_says_something_else():
    q = make(Scheme(8, 32))
    said = groups({"num_bits": 4, "group_size": 128, "symmetric": True})
    assert ct.read(held(ct.pack(q)), NAME, said).identical(q)


@pytest.mark.parametrize("group", [32, -1])
def test_zero_points_that_the_configuration_promises_are_missed(group):
    packed = held(ct.pack(make(Scheme(4, group))))
    size = None if group == -1 else group
    asymmetric = {"num_bits": 4, "group_size": size, "symmetric": False}
    with pytest.raises(QuantkitError, match=f"{re.escape(NAME)} has no tensor weight_zero_point"):
        ct.read(packed, NAME, groups(asymmetric))
    # the other group of the configuration has such weights as well
    ct.read(packed, NAME, groups(asymmetric, {**asymmetric, "symmetric": True}))


def test_config_has_the_keys_that_loaders_read():
    config = ct.configuration(Scheme(4, 128), ["model.layers.0.mlp.gate"], "quantkit")
    config = config["quantization_config"]
    (group,) = config["config_groups"].values()
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == group["format"] == "pack-quantized"
    assert config["quantization_status"] == "compressed"
    assert config["ignore"] == ["lm_head", "model.layers.0.mlp.gate"]
    assert group["targets"] == ["Linear"]
    weights = group["weights"]
    assert (weights["num_bits"], weights["type"], weights["symmetric"]) == (4, "int", True)
    assert (weights["strategy"], weights["group_size"]) == ("group", 128)
    assert ct.beside(config, "owner/name") == {}


def test_config_of_one_scale_a_row():
    config = ct.configuration(Scheme(8, -1, False), ["lm_head"], "quantkit")["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert config["ignore"] == ["lm_head"]
    assert (weights["strategy"], weights["group_size"]) == ("channel", None)
    assert weights["symmetric"] is False
    q = make(Scheme(8, -1, False))
    assert ct.read(held(ct.pack(q)), NAME, config).identical(q)


# refusals


def refused(tensors, config=None):
    for ask in (ct.describe, ct.read):
        with pytest.raises(QuantkitError) as caught:
            ask(tensors, NAME, config or {})
        assert NAME in caught.value.message
    return caught.value.message


COMPRESSED = {"quant_method": "compressed-tensors"}


@pytest.mark.parametrize(
    ("form", "dtype"), [("int-quantized", torch.int8), ("float-quantized", torch.float8_e4m3fn)]
)
def test_formats_that_do_not_pack_are_refused_by_their_name(form, dtype):
    tensors = held({"weight": torch.zeros(4, 8).to(dtype), "weight_scale": torch.ones(4, 1)})
    assert ct.linears(tensors, {}) == []
    config = {**COMPRESSED, "format": form}
    assert ct.linears(tensors, config) == [NAME]
    assert form in refused(tensors, config)
    assert "weight_packed" in refused(tensors, {**COMPRESSED, "format": "pack-quantized"})


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        (
            "nvfp4-pack-quantized",
            {
                "weight_packed": torch.zeros(12, 96, dtype=torch.uint8),
                "weight_global_scale": torch.ones(1),
            },
        ),
        ("mxfp4-pack-quantized", {"weight_packed": torch.zeros(12, 96, dtype=torch.uint8)}),
        ("marlin-24", {"meta": torch.zeros(12, 6, dtype=torch.int16)}),
        ("marlin-24", {"scale_packed": torch.zeros(12, 6).half()}),
    ],
    ids=["nvfp4", "mxfp4", "marlin-24 meta", "marlin-24 scales"],
)
def test_other_packed_formats_are_refused_by_their_name(form, changes):
    tensors = held({**ct.pack(make(Scheme(4, 32))), **changes})
    assert ct.linears(tensors, COMPRESSED) == [NAME]
    assert form in refused(tensors, {"format": "mixed-precision"})


def test_an_unknown_format_and_transforms_are_refused():
    tensors = held(ct.pack(make(Scheme(4, 32))))
    assert "pack-quantized-2" in refused(tensors, {"format": "pack-quantized-2"})
    assert "transforms" in refused(tensors, {"transform_config": {"config_groups": {"R1": {}}}})
    ct.read(tensors, NAME, {"format": "mixed-precision", "transform_config": {}})


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_words_padded_by_old_writers_are_refused(bits):
    """They began every word anew."""
    packed = ct.pack(make(Scheme(bits, 32)))
    packed["weight_packed"] = torch.zeros(12, -(-192 // (32 // bits)), dtype=torch.int32)
    refused(held(packed))


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_widths_that_old_writers_packed_otherwise_are_refused(bits):
    scheme = Scheme(bits, -1)
    assert "100 inputs" in ct.refusal(12, 100, scheme)
    with pytest.raises(ValueError, match="100 inputs"):
        ct.pack(make(scheme, width=100))
    packed = ct.pack(make(scheme, width=128))
    packed["weight_packed"] = packed["weight_packed"][:, : -(-100 * bits // 32)]
    packed["weight_shape"] = torch.tensor([12, 100])
    assert "100 inputs" in refused(held(packed))


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_shape"])
def test_a_missing_tensor_is_refused(suffix):
    packed = ct.pack(make(Scheme(4, 32, False)))
    del packed[suffix]
    assert suffix in refused(held(packed))


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        ("weight_packed", lambda t: t[:-1]),
        ("weight_packed", lambda t: t[:, :-1]),
        ("weight_packed", lambda t: t[0]),
        ("weight_packed", lambda t: t[:0]),
        ("weight_packed", lambda t: t[:, :0]),
        ("weight_packed", lambda t: t[None]),
        ("weight_scale", lambda t: t[:-1]),
        ("weight_scale", lambda t: t[:, :0]),
        ("weight_scale", lambda t: t[:, :5]),
        ("weight_scale", lambda t: t[0]),
        ("weight_scale", lambda t: t[0, 0]),
        ("weight_scale", lambda t: t.repeat(1, 32)),
        ("weight_scale", lambda t: t[:, :1].repeat(1, 100_000)),
        ("weight_shape", lambda t: t[:1]),
        ("weight_shape", lambda t: t[None]),
        ("weight_shape", lambda t: t.flip(0)),
        ("weight_shape", lambda t: -t),
        ("weight_shape", lambda t: t * 0),
        ("weight_shape", lambda t: t * torch.tensor([1, 0])),
        ("weight_shape", lambda t: t * torch.tensor([1, 2**40])),
        ("weight_shape", lambda t: t * torch.tensor([1, 2])),
        ("weight_zero_point", lambda t: t[:-1]),
        ("weight_zero_point", lambda t: t[:, :-1]),
        ("weight_zero_point", lambda t: t.T),
        ("weight_zero_point", lambda t: t[0, 0]),
    ],
)
def test_wrong_shapes_are_refused(suffix, change):
    packed = ct.pack(make(Scheme(4, 32, False)))
    packed[suffix] = change(packed[suffix])
    refused(held(packed))


@pytest.mark.parametrize("shape", [(11, 192), (13, 192), (12, 0), (12, -192), (0, 0)])
def test_a_weight_shape_that_cannot_be_is_refused(shape):
    packed = ct.pack(make(Scheme(4, 32)))
    packed["weight_shape"] = torch.tensor(shape)
    assert f"weight_shape says {shape[0]} x {shape[1]}" in refused(held(packed))


@pytest.mark.parametrize("groups", [7, 24, 192, 384, 100_000])
def test_absurd_numbers_of_groups_are_refused(groups):
    packed = ct.pack(make(Scheme(4, 32)))
    packed["weight_scale"] = torch.ones(12, groups).half()
    assert f"{groups} groups" in refused(held(packed))


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        ("weight_packed", torch.int64),
        ("weight_packed", torch.int8),
        ("weight_packed", torch.float32),
        ("weight_scale", torch.int32),
        ("weight_scale", torch.float64),
        ("weight_shape", torch.float32),
        ("weight_zero_point", torch.int8),
        ("weight_zero_point", torch.float16),
        ("weight_g_idx", torch.float32),
    ],
)
def test_wrong_dtypes_are_refused(suffix, dtype):
    packed = ct.pack(make(Scheme(4, 32, False)))
    packed["weight_g_idx"] = torch.arange(192, dtype=torch.int32) // 32
    packed[suffix] = packed[suffix].to(dtype)
    message = refused(held(packed))
    assert str(dtype) in message
    assert suffix in message


def test_an_index_of_another_length_is_refused():
    for index in (torch.arange(191), torch.arange(192)[None]):
        assert "weight_g_idx" in refused(with_index(index // 32))


def test_what_compressed_tensors_cannot_hold_is_not_packed():
    q = make(Scheme(4, 32, False))
    with pytest.raises(ValueError, match="minimums"):
        ct.pack(replace(q, zero=None, minimum=q.scale))
    with pytest.raises(ValueError, match="float64"):
        ct.pack(replace(q, scale=q.scale.double()))
    nf4 = Scheme(4, 32, grid="nf4")
    assert "nf4" in ct.refusal(12, 192, nf4)
    with pytest.raises(ValueError, match="nf4"):
        ct.pack(make(nf4))


def test_it_is_read_from_a_folder(tmp_path):
    q = make(Scheme(4, 32, False))
    save_file(held(ct.pack(q)), tmp_path / "model.safetensors")
    assert ct.read(Checkpoint(tmp_path), NAME, {}).identical(q)


def test_it_is_read_without_codes():
    q = make(Scheme(3, 32, False))
    found = ct.read(held(ct.pack(q)), NAME, {}, codes=False)
    assert found.identical(replace(q, codes=torch.zeros_like(q.codes)))
