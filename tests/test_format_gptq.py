"""The GPTQ format only moves bits, and refuses tensors that do not fit together."""

import re

import pytest
import torch
from safetensors.torch import save_file

from quantkit.core.checkpoint import Checkpoint, TensorSpec
from quantkit.core.qweight import QWeight, Scheme
from quantkit.errors import QuantkitError
from quantkit.formats import gptq
from quantkit.formats.gptq import Declared

NAME = "model.layers.3.mlp.down_proj"


def make(scheme, out=96, width=256, shuffled=False, smallest_zero=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    groups = scheme.groups(width)

    def integers(low, *shape):
        return torch.randint(low, scheme.max_code + 1, shape, generator=g).to(torch.uint8)

    group_of = None
    if shuffled:
        order = torch.randperm(width, generator=g)
        group_of = (order // scheme.width(width)).to(torch.int32)
    return QWeight(
        scheme,
        integers(0, out, width),
        torch.randn(out, groups, generator=g).half(),
        None if scheme.symmetric else integers(smallest_zero, out, groups),
        group_of,
    )


every_case = pytest.mark.parametrize(
    ("scheme", "convention", "shuffled"),
    [
        (Scheme(bits, group, symmetric), convention, shuffled)
        for bits in (2, 3, 4, 8)
        for group in (16, 32, 128, -1)
        for symmetric in (True, False)
        for convention in ("v1", "v2")
        for shuffled in (False, True)
    ],
    ids=str,
)


@every_case
def test_unpack_inverts_pack(scheme, convention, shuffled):
    q = make(scheme, shuffled=shuffled)
    packed = gptq.pack(q, convention)
    assert gptq.unpack(packed, scheme, convention).identical(q)


@pytest.mark.parametrize(
    ("bits", "out", "width"),
    [(2, 16, 48), (3, 32, 96), (3, 224, 160), (4, 8, 16), (4, 40, 304), (8, 4, 16), (8, 12, 80)],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_shapes_that_are_no_powers_of_two(bits, out, width, symmetric):
    scheme = Scheme(bits, 16, symmetric)
    q = make(scheme, out, width, shuffled=True)
    assert gptq.packable(out, width, bits)
    assert gptq.unpack(gptq.pack(q, "v1"), scheme, "v1").identical(q)


@every_case
def test_specs_are_what_pack_returns(scheme, convention, shuffled):
    packed = gptq.pack(make(scheme, shuffled=shuffled), convention)
    planned = gptq.specs(96, 256, scheme, bias=False)
    assert {suffix: TensorSpec.of(tensor) for suffix, tensor in packed.items()} == planned
    assert all(tensor.is_contiguous() for tensor in packed.values())


def test_specs_of_a_bias():
    with_bias = gptq.specs(96, 256, Scheme(), bias=True)
    assert with_bias.pop("bias") == TensorSpec(torch.float16, (96,))
    assert with_bias == gptq.specs(96, 256, Scheme(), bias=False)


# the documented layout, read without quantkit's help


def fields(words, bits):
    """The numbers in a list of words: one stream of bits, the first number in the lowest."""
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(stream >> (bits * k)) & (2**bits - 1) for k in range(len(words) * 32 // bits)]


def decoded(tensors, bits, convention):
    """w[k, n] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n]), number by number."""
    qweight, scales = tensors["qweight"], tensors["scales"].double()
    g_idx = tensors["g_idx"].tolist()
    codes = [fields(column, bits) for column in qweight.T.tolist()]  # packed along the inputs
    zeros = [fields(row, bits) for row in tensors["qzeros"].tolist()]  # along the outputs
    if convention == "v1":
        zeros = [[(zero + 1) % 2**bits for zero in row] for row in zeros]
    out, width = qweight.shape[1], len(g_idx)
    weight = torch.empty(out, width, dtype=torch.float64)
    for n in range(out):
        for k in range(width):
            group = g_idx[k]
            weight[n, k] = float(scales[group, n]) * (codes[n][k] - zeros[group][n])
    return weight


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("convention", ["v1", "v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_files_mean_what_the_layout_says(bits, group, symmetric, convention, shuffled):
    q = make(Scheme(bits, group, symmetric), 32, 96, shuffled)
    slow = decoded(gptq.pack(q, convention), bits, convention)
    assert torch.equal(q.dequantize().double(), slow)


def test_a_word_of_codes_drawn_by_hand():
    codes = torch.zeros(8, 16, dtype=torch.uint8)
    codes[3, :8] = torch.arange(1, 9)  # output 3, inputs 0 to 7
    packed = gptq.pack(QWeight(Scheme(4, 16), codes, torch.ones(8, 1).half()), "v2")
    assert packed["qweight"][0, 3].item() & 0xFFFFFFFF == 0x87654321
    assert int((packed["qweight"] != 0).sum()) == 1


def test_a_word_of_zeros_drawn_by_hand():
    zero = torch.arange(1, 9, dtype=torch.uint8)[:, None]  # outputs 0 to 7
    q = QWeight(
        Scheme(4, 16, False),
        torch.zeros(8, 16, dtype=torch.uint8),
        torch.ones(8, 1).half(),
        zero,
    )
    assert gptq.pack(q, "v2")["qzeros"].item() & 0xFFFFFFFF == 0x87654321
    assert gptq.pack(q, "v1")["qzeros"].item() & 0xFFFFFFFF == 0x76543210


@pytest.mark.parametrize(
    ("bits", "convention", "word"),
    [
        (4, "v1", 0x77777777),
        (4, "v2", 0x88888888),
        (2, "v1", 0x55555555),
        (2, "v2", 0xAAAAAAAA),
        (8, "v1", 0x7F7F7F7F),
        (8, "v2", 0x80808080),
    ],
)
def test_symmetric_words_of_zeros(bits, convention, word):
    qzeros = gptq.pack(make(Scheme(bits, 32)), convention)["qzeros"]
    assert {value & 0xFFFFFFFF for value in qzeros.flatten().tolist()} == {word}


def test_contiguous_groups_are_spelled_out_in_the_file():
    packed = gptq.pack(make(Scheme(4, 32)), "v1")
    assert packed["g_idx"].tolist() == [k // 32 for k in range(256)]
    assert gptq.unpack(packed, Scheme(4, 32), "v1").group_of is None
    del packed["g_idx"]  # very old files have none
    assert gptq.unpack(packed, Scheme(4, 32), "v1").identical(make(Scheme(4, 32)))


def test_v1_refuses_to_write_a_zero_point_of_0():
    q = make(Scheme(4, 32, False), smallest_zero=0)
    assert int(q.zero.min()) == 0
    with pytest.raises(ValueError, match="v1"):
        gptq.pack(q, "v1")
    assert gptq.unpack(gptq.pack(q, "v2"), q.scheme, "v2").identical(q)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_v1_reads_a_zero_point_that_wrapped_around_as_0(bits):
    scheme = Scheme(bits, 32, False)
    packed = gptq.pack(make(scheme), "v1")
    packed["qzeros"].fill_(-1)  # all bits set: what others write for 0 - 1
    assert set(gptq.unpack(packed, scheme, "v1").zero.flatten().tolist()) == {0}


def test_scales_that_are_not_float16_are_not_written():
    q = make(Scheme(4, 32))
    with pytest.raises(ValueError, match="bfloat16"):
        gptq.pack(QWeight(q.scheme, q.codes, q.scale.bfloat16()), "v1")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_float_dtypes_are_read(dtype):
    q = make(Scheme(4, 32))
    packed = gptq.pack(q, "v1")
    packed["scales"] = packed["scales"].to(dtype)
    assert gptq.unpack(packed, q.scheme, "v1").scale.dtype == dtype


# refusals


def refusal(packed, scheme, convention="v1"):
    with pytest.raises(QuantkitError) as caught:
        gptq.unpack(packed, scheme, convention, NAME)
    assert NAME in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        ("qweight", lambda t: t[:-1]),
        ("qweight", lambda t: t[:, :-8]),
        ("qweight", lambda t: t[:, :-1]),
        ("qweight", lambda t: t[0]),
        ("qweight", lambda t: t[:0]),
        ("qzeros", lambda t: t[:-1]),
        ("qzeros", lambda t: t[:, :-1]),
        ("qzeros", lambda t: t.T),
        ("scales", lambda t: t[:-1]),
        ("scales", lambda t: t.T),
        ("g_idx", lambda t: t[:-1]),
        ("g_idx", lambda t: t[None]),
    ],
)
@pytest.mark.parametrize("bits", [3, 4])
def test_wrong_shapes_are_refused(bits, suffix, change):
    scheme = Scheme(bits, 32)
    packed = gptq.pack(make(scheme), "v1")
    packed[suffix] = change(packed[suffix])
    assert "shape" in refusal(packed, scheme)


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        ("qweight", torch.int64),
        ("qweight", torch.int16),
        ("qweight", torch.float16),
        ("qzeros", torch.int64),
        ("qzeros", torch.float16),
        ("scales", torch.int32),
        ("g_idx", torch.float32),
    ],
)
def test_wrong_dtypes_are_refused(suffix, dtype):
    """Words of int16 or int64 can have shapes that look like those of other bits."""
    scheme = Scheme(4, 32)
    packed = gptq.pack(make(scheme), "v1")
    packed[suffix] = packed[suffix].to(dtype)
    message = refusal(packed, scheme)
    assert suffix in message
    assert str(dtype) in message


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_a_missing_tensor_is_refused(suffix):
    packed = gptq.pack(make(Scheme(4, 32)), "v1")
    del packed[suffix]
    assert suffix in refusal(packed, Scheme(4, 32))


@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme(4, -1), Scheme(8, 32), Scheme(3, 32)])
def test_another_scheme_is_refused(scheme):
    refusal(gptq.pack(make(Scheme(4, 32)), "v1"), scheme)


def test_a_group_that_does_not_divide_the_inputs_is_refused():
    assert "48" in refusal(gptq.pack(make(Scheme(4, 32)), "v1"), Scheme(4, 48))


@pytest.mark.parametrize("group", [-1, 8, 1000])
def test_groups_that_do_not_exist_are_refused(group):
    packed = gptq.pack(make(Scheme(4, 32)), "v1")
    packed["g_idx"][5] = group
    assert "g_idx" in refusal(packed, Scheme(4, 32))


@pytest.mark.parametrize(("written", "read"), [("v1", "v2"), ("v2", "v1")])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_symmetric_weight_in_the_other_convention_is_refused(bits, written, read):
    packed = gptq.pack(make(Scheme(bits, 32)), written)
    assert read in refusal(packed, Scheme(bits, 32), read)


def test_an_asymmetric_weight_is_not_read_as_a_symmetric_one():
    packed = gptq.pack(make(Scheme(4, 32, False)), "v1")
    assert "qzeros" in refusal(packed, Scheme(4, 32))


def test_weights_that_do_not_fill_words_are_not_packable():
    assert not gptq.packable(96, 100, 4)
    assert not gptq.packable(100, 96, 4)
    assert gptq.packable(104, 96, 4)
    assert not gptq.packable(104, 96, 3)


# what a file says about itself


@pytest.mark.parametrize("convention", ["v1", "v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_convention_is_seen_in_the_data(bits, convention):
    packed = gptq.pack(make(Scheme(bits, 32)), convention)
    assert gptq.convention_of(packed["qzeros"], bits) == convention


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_data_does_not_tell_its_convention(bits):
    packed = gptq.pack(make(Scheme(bits, 32, False)), "v1")
    assert gptq.convention_of(packed["qzeros"], bits) is None


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 32, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_scheme_is_seen_in_the_shapes(bits, group, symmetric):
    scheme = Scheme(bits, group, symmetric)
    found = gptq.specs(96, 256, scheme, bias=False)
    assert gptq.scheme_of(found, symmetric, None) == scheme
    del found["g_idx"]
    assert gptq.scheme_of(found, symmetric, 256) == scheme


def test_shapes_that_make_no_scheme_are_refused():
    def refused(width=None, **changes):
        found = gptq.specs(96, 256, Scheme(4, 32), bias=False)
        for suffix, shape in changes.items():
            found[suffix] = TensorSpec(torch.int32, shape)
        if width is not None:
            del found["g_idx"]
        with pytest.raises(QuantkitError) as caught:
            gptq.scheme_of(found, True, width)
        return caught.value.message

    assert "not known" in refused(width=0)
    assert "33 rows" in refused(qweight=(33, 96))
    assert "40 rows" in refused(qweight=(40, 96))  # 5 bits
    refused(scales=(0, 96))
    refused(scales=(7, 96))
    refused(scales=(32, 96))  # groups of 8


def read_back(folder, q, written, said, without=()):
    packed = gptq.pack(q, written)
    save_file(
        {f"{NAME}.{s}": t for s, t in packed.items() if s not in without},
        folder / "model.safetensors",
    )
    return gptq.read(Checkpoint(folder), NAME, said)


@pytest.mark.parametrize("claimed", ["v1", "v2"])
@pytest.mark.parametrize("written", ["v1", "v2"])
@pytest.mark.parametrize("claimed_bits", [3, 4, 8])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_data_is_believed_before_the_config(
    tmp_path, bits, claimed_bits, written, claimed
):
    """Wrong conventions are common; linears of other bits are GPTQModel's ``dynamic``."""
    q = make(Scheme(bits, 32))
    found, convention = read_back(tmp_path, q, written, Declared(claimed_bits, True, claimed))
    assert found.identical(q)
    assert convention == written


@pytest.mark.parametrize("convention", ["v1", "v2"])
def test_asymmetric_data_is_read_as_the_config_says(tmp_path, convention):
    q = make(Scheme(4, 32, False))
    found, used = read_back(tmp_path, q, convention, Declared(4, False, convention))
    assert found.identical(q)
    assert used == convention


def test_a_file_without_g_idx_is_read(tmp_path):
    q = make(Scheme(3, 32))
    found, _ = read_back(tmp_path, q, "v1", Declared(3, True, "v1"), without=("g_idx",))
    assert found.identical(q)


@pytest.mark.parametrize("suffix", ["qzeros", "scales"])
def test_a_file_without_a_tensor_is_refused(tmp_path, suffix):
    with pytest.raises(QuantkitError, match=f"{re.escape(NAME)} has no tensor {suffix}"):
        read_back(tmp_path, make(Scheme()), "v1", Declared(4, True, "v1"), without=(suffix,))


CONFIG = {"act_order": "static", "damp": 0.01, "dense": [], "quantizer": "quantkit:0.1.0"}


def test_config_has_the_keys_that_loaders_read():
    assert gptq.quantization_config(Scheme(4, 128), "v1", **CONFIG) == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "static_groups": True,
        "true_sequential": False,
        "damp_percent": 0.01,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["quantkit:0.1.0"]},
    }


@pytest.mark.parametrize(
    ("act_order", "desc_act", "static_groups"),
    [("none", False, False), ("static", False, True), ("group", True, False)],
)
def test_config_says_how_columns_were_ordered(act_order, desc_act, static_groups):
    config = gptq.quantization_config(Scheme(), "v1", **{**CONFIG, "act_order": act_order})
    assert (config["desc_act"], config["static_groups"]) == (desc_act, static_groups)


def test_config_of_the_other_convention():
    config = gptq.quantization_config(Scheme(3, -1, False), "v2", **CONFIG)
    assert config["checkpoint_format"] == "gptq_v2"
    assert (config["bits"], config["group_size"], config["sym"]) == (3, -1, False)


def test_config_names_dense_linears_and_no_others():
    dense = ["model.layers.1.mlp.gate"]
    config = gptq.quantization_config(Scheme(), "v1", **{**CONFIG, "dense": dense})
    (rule,) = config["dynamic"]
    assert rule.startswith("-:")
    pattern = re.compile(rule[2:])
    assert pattern.match("model.layers.1.mlp.gate")
    for other in (
        "model.layers.1.mlp.gate_proj",
        "model.layers.11.mlp.gate",
        "modelxlayers.1.mlp.gate",
    ):
        assert not pattern.match(other)


def test_legacy_config_adds_the_names():
    config = gptq.quantization_config(Scheme(), "v1", **CONFIG)
    legacy = gptq.legacy_config(config, "owner/name")
    assert legacy.pop("model_name_or_path") == "owner/name"
    assert legacy.pop("model_file_base_name") == "model"
    assert legacy == config
