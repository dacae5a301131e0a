"""The GPTQ format only moves bits, and refuses tensors that do not fit together."""

import re

import pytest
import torch
from safetensors.torch import save_file

from quantkit.core.checkpoint import Checkpoint, TensorSpec
from quantkit.core.qweight import QWeight, Scheme
from quantkit.errors import QuantkitError
from quantkit.formats import gptq

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
    planned = gptq.specs(96, 256, scheme, torch.float16)
    assert {suffix: TensorSpec.of(tensor) for suffix, tensor in packed.items()} == planned
    assert all(tensor.is_contiguous() for tensor in packed.values())


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
    """Whatever the configuration says of bits and groups, which is often wrong."""
    scheme = Scheme(bits, group, symmetric)
    found = gptq.specs(96, 256, scheme)
    assert gptq.scheme_of(found, symmetric, 7, NAME) == scheme
    del found["g_idx"]
    assert gptq.scheme_of(found, symmetric, None, NAME) == scheme
    said = {"bits": 5, "group_size": 7, "sym": symmetric}
    assert gptq.describe(held(found), NAME, said) == (96, 256, scheme)


@pytest.mark.parametrize(
    ("said", "symmetric"),
    [
        ({}, True),
        ({"sym": False}, False),
        ({"sym": True}, True),
        ({"zero_point": True}, False),
        ({"zero_point": False}, True),
        ({"sym": True, "zero_point": True}, True),
    ],
)
def test_symmetric_is_as_declared(said, symmetric):
    scheme = gptq.describe(held(gptq.specs(96, 256, Scheme(4, 32))), NAME, said)[2]
    assert scheme == Scheme(4, 32, symmetric)


def test_shapes_that_make_no_scheme_are_refused():
    def refused(without=(), **changes):
        found = gptq.specs(96, 256, Scheme(4, 32))
        for suffix, shape in changes.items():
            found[suffix] = TensorSpec(found[suffix].dtype, shape)
        for suffix in without:
            del found[suffix]
        with pytest.raises(QuantkitError) as caught:
            gptq.describe(held(found), NAME, {})
        assert NAME in caught.value.message
        return caught.value.message

    for suffix in ("qweight", "qzeros", "scales"):
        assert f"no tensor {suffix}" in refused(without=[suffix])
        assert f"{suffix} has the shape" in refused(**{suffix: (8,)})
        assert f"{suffix} has the shape" in refused(**{suffix: (8, 0)})
    assert "15 words of zero points for 96 outputs" in refused(qzeros=(8, 15))  # 5 bits
    assert "13 words of zero points for 96 outputs" in refused(qzeros=(8, 13))
    assert "33 words of 4 bits hold 264 inputs" in refused(qweight=(33, 96))
    assert "7 groups for 256 inputs" in refused(qzeros=(7, 12), scales=(7, 96))
    assert "32 groups for 256 inputs" in refused(qzeros=(32, 12), scales=(32, 96))
    assert "scales has the shape (16, 96)" in refused(scales=(16, 96))
    assert "scales has the shape (8, 95)" in refused(scales=(8, 95))
    # what g_idx cannot correct, when there is none
    assert "5 groups for 264 inputs" in refused(["g_idx"], qweight=(33, 96), qzeros=(5, 12))


# whose linears these are


class Held(dict):
    """Tensors (or what is known of them) in memory, in the way of a Checkpoint."""

    def spec(self, name):
        found = self[name]
        return found if isinstance(found, TensorSpec) else TensorSpec.of(found)

    def get(self, name):
        return self[name]


def held(packed, prefix=NAME):
    return Held({f"{prefix}.{suffix}": tensor for suffix, tensor in packed.items()})


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, 32, 64, 128, -1])
@pytest.mark.parametrize(("out", "width"), [(32, 128), (256, 256), (1024, 128), (96, 3072)])
def test_its_own_linears_are_known(out, width, group, bits):
    found = held(gptq.specs(out, width, Scheme(bits, group)))
    found["model.embed_tokens.weight"] = TensorSpec(torch.float16, (10, width))
    found[f"{NAME}.bias"] = TensorSpec(torch.float16, (out,))
    assert gptq.linears(found, {}) == [NAME]
    assert sorted(gptq.names(found, NAME)) == [
        f"{NAME}.{suffix}" for suffix in ("g_idx", "qweight", "qzeros", "scales")
    ]
    del found[f"{NAME}.g_idx"]
    assert gptq.linears(found, {}) == [NAME]
    assert f"{NAME}.g_idx" not in gptq.names(found, NAME)


INT, SHORT, HALF = torch.int32, torch.int16, torch.float16
# linears of AWQ's variants whose scales are as wide as their qweight: (dtype, shape) by suffix
LOOKALIKES = {
    "GEMV, 128 inputs in groups of 64": {
        "qweight": (INT, (64, 16)),
        "qzeros": (INT, (64, 2)),
        "scales": (HALF, (64, 16)),
    },
    "GEMV, 256 inputs in groups of 32": {
        "qweight": (INT, (64, 32)),
        "qzeros": (INT, (64, 4)),
        "scales": (HALF, (64, 32)),
    },
    "GEMV_fast, square": {
        "qweight": (SHORT, (64, 256)),
        "qzeros": (HALF, (8, 256)),
        "scales": (HALF, (8, 256)),
    },
    "llm-awq, square": {
        "qweight": (SHORT, (64, 256)),
        "scaled_zeros": (HALF, (8, 256)),
        "scales": (HALF, (8, 256)),
    },
}


@pytest.mark.parametrize("variant", LOOKALIKES)
def test_linears_of_awq_are_not_its_own(variant):
    found = held({suffix: TensorSpec(*spec) for suffix, spec in LOOKALIKES[variant].items()})
    assert gptq.linears(found, {}) == []
    assert gptq.linears(found, {"quant_method": "gptq"}) == []


@pytest.mark.parametrize(("method", "ours"), [(None, True), ("gptq", True), ("awq", False)])
def test_a_qweight_without_scales_is_whose_the_config_says(method, ours):
    found = held({"qweight": TensorSpec(INT, (32, 96))})
    assert bool(gptq.linears(found, {"quant_method": method} if method else {})) == ours


def said(scheme, convention="v1"):
    """What a checkpoint says of itself."""
    return gptq.configuration(scheme, [], "somebody", convention)["quantization_config"]


def read_back(folder, q, written, config, without=()):
    packed = gptq.pack(q, written)
    save_file(
        {f"{NAME}.{s}": t for s, t in packed.items() if s not in without},
        folder / "model.safetensors",
    )
    return gptq.read_with_convention(Checkpoint(folder), NAME, config)


@pytest.mark.parametrize("claimed", ["v1", "v2"])
@pytest.mark.parametrize("written", ["v1", "v2"])
@pytest.mark.parametrize("claimed_bits", [3, 4, 8])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_data_is_believed_before_the_config(
    tmp_path, bits, claimed_bits, written, claimed
):
    """Wrong conventions are common; linears of other bits are GPTQModel's ``dynamic``."""
    q = make(Scheme(bits, 32))
    found, convention = read_back(tmp_path, q, written, said(Scheme(claimed_bits, 32), claimed))
    assert found.identical(q)
    assert convention == written
    assert gptq.read(Checkpoint(tmp_path), NAME, {}).identical(q)


@pytest.mark.parametrize("convention", ["v1", "v2"])
def test_asymmetric_data_is_read_as_the_config_says(tmp_path, convention):
    q = make(Scheme(4, 32, False))
    found, used = read_back(tmp_path, q, convention, said(q.scheme, convention))
    assert found.identical(q)
    assert used == convention


@pytest.mark.parametrize("convention", ["v1", "v2"])
def test_asymmetric_data_that_is_declared_symmetric_is_read_as_it_is(tmp_path, convention):
    q = make(Scheme(4, 32, False))
    found, _ = read_back(tmp_path, q, convention, said(Scheme(4, 32), convention))
    assert found.identical(q)


@pytest.mark.parametrize("convention", ["v1", "v2"])
def test_zero_points_at_the_midpoint_throughout_are_symmetric(tmp_path, convention):
    """In the convention that is declared; in the other one they are what they are."""
    q = make(Scheme(4, 32))
    found, _ = read_back(tmp_path, q, convention, said(Scheme(4, 32, False), convention))
    assert found.identical(q)
    other = "v2" if convention == "v1" else "v1"
    found, used = read_back(tmp_path, q, convention, said(Scheme(4, 32, False), other))
    assert used == other
    assert set(found.zero.flatten().tolist()) == {7 if other == "v2" else 9}


def test_a_file_without_g_idx_is_read(tmp_path):
    q = make(Scheme(3, 32))
    found, _ = read_back(tmp_path, q, "v1", said(q.scheme), without=("g_idx",))
    assert found.identical(q)


@pytest.mark.parametrize("suffix", ["qzeros", "scales"])
def test_a_file_without_a_tensor_is_refused(tmp_path, suffix):
    with pytest.raises(QuantkitError, match=f"{re.escape(NAME)} has no tensor {suffix}"):
        read_back(tmp_path, make(Scheme()), "v1", said(Scheme()), without=(suffix,))


@pytest.mark.parametrize(
    ("config", "convention"),
    [
        ({}, "v1"),
        ({"checkpoint_format": "gptq"}, "v1"),
        ({"checkpoint_format": "gptq_v2"}, "v2"),
        ({"format": "gptq_v2"}, "v2"),
    ],
)
def test_the_declared_convention(config, convention):
    assert gptq.declared_convention(config) == convention


@pytest.mark.parametrize(
    "config",
    [{"checkpoint_format": "marlin"}, {"format": "bitblas"}, {"is_marlin_format": True}],
)
def test_formats_that_only_look_alike_are_refused(config):
    with pytest.raises(QuantkitError, match="is not read"):
        gptq.declared_convention(config)
    with pytest.raises(QuantkitError, match="is not read"):
        gptq.read(held(gptq.pack(make(Scheme(4, 32)))), NAME, config)


# what can be written


@pytest.mark.parametrize(
    ("out", "width", "scheme", "reason"),
    [
        (96, 256, Scheme(4, 64, True, "nf4"), "not those of nf4"),
        (96, 256, Scheme(5, 64), "not 5"),
        (96, 256, Scheme(6, 64), "not 6"),
        (100, 256, Scheme(4, 64), "100 x 256 does not fill"),
        (96, 260, Scheme(4, -1), "96 x 260 does not fill"),
        (104, 96, Scheme(3, 32), "104 x 96 does not fill"),
        (104, 96, Scheme(4, 32), None),
        (96, 256, Scheme(8, 64, False), None),
    ],
)
def test_refusal(out, width, scheme, reason):
    found = gptq.refusal(out, width, scheme)
    assert found is None if reason is None else reason in found


def test_minimums_are_not_written():
    q = make(Scheme(4, 32))
    scheme = Scheme(4, 32, False)
    with pytest.raises(ValueError, match="minimums"):
        gptq.pack(QWeight(scheme, q.codes, q.scale, minimum=q.scale))


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


@pytest.mark.parametrize("convention", ["v1", "v2"])
def test_configuration_is_for_conversions(convention):
    """The order of columns and the damping are not known there."""
    whole = gptq.configuration(Scheme(8, 64, False), ["a.gate"], "quantkit:1", convention)
    assert whole.keys() == {"quantization_config"}
    config = whole["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"]) == (8, 64, False)
    assert (config["desc_act"], config["static_groups"]) == (False, False)
    assert config["checkpoint_format"] == {"v1": "gptq", "v2": "gptq_v2"}[convention]
    assert config["meta"] == {"quantizer": ["quantkit:1"]}
    assert len(config["dynamic"]) == 1 and "damp_percent" not in config
    beside = gptq.beside(whole, "owner/name")
    assert beside == {"quantize_config.json": gptq.legacy_config(config, "owner/name")}
