"""The AWQ format only moves bits, reads what AutoAWQ wrote, and refuses what does not fit."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.awq import AWQ_SCALES_MAPPINGS

from quantkit.core.checkpoint import Checkpoint, TensorSpec
from quantkit.core.qweight import QWeight, Scheme
from quantkit.errors import QuantkitError
from quantkit.formats import awq, gptq

GOLDEN = Path(__file__).parent / "golden" / "awq"
NAME = "model.layers.3.mlp.down_proj"


class Held(dict):
    """Tensors in memory, in the way of a Checkpoint."""

    def spec(self, name):
        return TensorSpec.of(self[name])

    def get(self, name):
        return self[name]


def held(packed, prefix=NAME):
    return Held({f"{prefix}.{suffix}": tensor for suffix, tensor in packed.items()})


def make(scheme, out=48, width=256, zeros=None, seed=0):
    """``zeros`` is the only zero point, or None for all of them."""
    g = torch.Generator().manual_seed(seed)
    groups = scheme.groups(width)
    low, high = (0, scheme.max_code) if zeros is None else (zeros, zeros)
    zero = torch.randint(low, high + 1, (out, groups), generator=g).to(torch.uint8)
    return QWeight(
        scheme,
        torch.randint(0, scheme.max_code + 1, (out, width), generator=g).to(torch.uint8),
        torch.randn(out, groups, generator=g).half(),
        None if scheme.symmetric else zero,
    )


def same_bytes(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("zeros", [None, 0, 7, 15])
@pytest.mark.parametrize("group", [16, 32, 64, 128, -1])
@pytest.mark.parametrize(("out", "width"), [(8, 128), (40, 384), (48, 256), (264, 128)])
def test_read_inverts_pack(out, width, group, zeros):
    q = make(Scheme(4, group, False), out, width, zeros)
    if width == group:
        group = -1  # one group is one group
    found = awq.read(held(awq.pack(q)), NAME, {})
    assert found.scheme == Scheme(4, group, False)
    assert torch.equal(found.codes, q.codes)
    assert torch.equal(found.scale, q.scale)
    assert torch.equal(found.zero, q.zero)


@pytest.mark.parametrize("group", [16, 64, -1])
def test_symmetric_weights_have_zero_points_of_8(group):
    q = make(Scheme(4, group))
    packed = awq.pack(q)
    assert {word & 0xFFFFFFFF for word in packed["qzeros"].flatten().tolist()} == {0x88888888}
    for config in ({}, {"zero_point": True}, {"zero_point": False}):
        assert awq.read(held(packed), NAME, config).identical(q)
    spelled_out = make(Scheme(4, group, False), zeros=8)
    assert awq.read(held(awq.pack(spelled_out)), NAME, {}).identical(q)


def test_zero_points_win_over_a_config_that_says_symmetric():
    q = make(Scheme(4, 64, False))
    assert awq.read(held(awq.pack(q)), NAME, {"zero_point": False}).identical(q)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 128, -1])
def test_specs_are_what_pack_returns(group, symmetric):
    scheme = Scheme(4, group, symmetric)
    packed = awq.pack(make(scheme))
    planned = awq.specs(48, 256, scheme, torch.float16)
    assert {suffix: TensorSpec.of(tensor) for suffix, tensor in packed.items()} == planned
    assert all(tensor.is_contiguous() for tensor in packed.values())
    assert awq.describe(held(packed), NAME, {"zero_point": not symmetric}) == (48, 256, scheme)
    assert awq.names(held(packed), NAME) == [f"{NAME}.{s}" for s in planned]


# the documented layout, read without quantkit's help


def test_words_drawn_by_hand():
    codes = torch.zeros(8, 16, dtype=torch.uint8)
    codes[:, 5] = torch.arange(1, 9)  # input 5, outputs 0 to 7
    zero = torch.arange(8, 0, -1, dtype=torch.uint8)[:, None]
    q = QWeight(Scheme(4, 16, False), codes, torch.ones(8, 1).half(), zero)
    packed = awq.pack(q)
    # from the highest nibble: outputs 7 5 3 1 6 4 2 0
    assert packed["qweight"][5].item() & 0xFFFFFFFF == 0x86427531
    assert int((packed["qweight"] != 0).sum()) == 1
    assert packed["qzeros"].item() & 0xFFFFFFFF == 0x13572468


# what AutoAWQ wrote


def golden(version):
    tensors = Checkpoint(GOLDEN, [f"{version}.safetensors"])
    return tensors, awq.linears(tensors, {})


def config_of(prefix):
    group = int(re.search(r"\.g(-?\d+)\.", prefix)[1])
    return {"quant_method": "awq", "group_size": group}


def test_gemm_is_read_to_the_weights_that_autoawq_reads():
    tensors, prefixes = golden("gemm")
    assert len(prefixes) == 4
    for prefix in prefixes:
        q = awq.read(tensors, prefix, {})
        assert torch.equal(q.dequantize(torch.float16), tensors.get(f"{prefix}.dequantized"))
        assert q.scheme.symmetric == prefix.endswith(".sym")
        assert q.scheme.group_size == config_of(prefix)["group_size"]


def test_gemm_is_written_as_autoawq_writes_it():
    tensors, prefixes = golden("gemm")
    for prefix in prefixes:
        packed = awq.pack(awq.read(tensors, prefix, {}))
        assert awq.names(tensors, prefix) == [f"{prefix}.{suffix}" for suffix in packed]
        for suffix, tensor in packed.items():
            assert same_bytes(tensor, tensors.get(f"{prefix}.{suffix}"))


def test_gemv_is_read_as_the_same_weights_as_gemm():
    """Both files were made from the same weights."""
    tensors, prefixes = golden("gemv")
    gemm, _ = golden("gemm")
    assert len(prefixes) == 4
    for prefix in prefixes:
        q = awq.read(tensors, prefix, config_of(prefix))
        assert torch.equal(q.codes, tensors.get(f"{prefix}.codes"))
        assert q.identical(awq.read(gemm, prefix, {}))


def gemv(groups_of=64, width=192):
    tensors, _ = golden("gemv")
    prefix = f"w{width}.g{groups_of}.asym"
    return held({s: tensors.get(f"{prefix}.{s}") for s in ("qweight", "qzeros", "scales")})


@pytest.mark.parametrize("config", [{}, {"group_size": None}, {"group_size": "64"}])
def test_gemv_without_a_group_size_is_refused(config):
    with pytest.raises(QuantkitError, match=f"{re.escape(NAME)}.*group size"):
        awq.read(gemv(), NAME, config)


@pytest.mark.parametrize("group", [0, 16, 32, 96, 192, 7, -5])
def test_gemv_with_a_group_size_that_does_not_fit_is_refused(group):
    with pytest.raises(QuantkitError, match=re.escape(NAME)):
        awq.read(gemv(), NAME, {"group_size": group})


def test_gemv_with_more_groups_than_said_is_refused():
    """One group of 128 and one of the whole row of 128 have the same padded shape."""
    tensors = gemv(32, 128)
    with pytest.raises(QuantkitError, match=re.escape(NAME)):
        awq.read(tensors, NAME, {"group_size": -1})
    wide = held(
        {
            "qweight": torch.zeros(8, 64, dtype=torch.int32),
            "qzeros": torch.zeros(8, 1, dtype=torch.int32),
            "scales": torch.ones(8, 8).half(),
        }
    )
    with pytest.raises(QuantkitError, match=f"{re.escape(NAME)} has more than the 4 groups"):
        awq.read(wide, NAME, {"group_size": 128})


# whose linears


def test_awq_and_gptq_know_their_own_linears():
    scheme = Scheme(4, 32, False)
    q = make(scheme, 256, 256)
    tensors = Held(held(awq.pack(q), "a") | held(gptq.pack(q, "v2"), "g"))
    assert awq.linears(tensors, {}) == ["a"]
    assert gptq.linears(tensors, {}) == ["g"]


@pytest.mark.parametrize(("width", "words"), [(128, 2), (256, 4)])
def test_gemv_with_scales_as_wide_as_qweight_is_known(width, words):
    tensors = held(
        {
            "qweight": torch.zeros(64, width // 8, dtype=torch.int32),
            "qzeros": torch.zeros(64, words, dtype=torch.int32),
            "scales": torch.zeros(64, words * 8).half(),
        }
    )
    assert awq.linears(tensors, {}) == [NAME]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, 32, 128, -1])
@pytest.mark.parametrize(("out", "width"), [(32, 256), (256, 256), (1024, 128)])
def test_no_linear_of_gptq_is_taken_for_awq(bits, group, out, width):
    packed = held(gptq.pack(make(Scheme(bits, group), out, width)))
    assert awq.linears(packed, {"quant_method": "gptq"}) == []


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_no_linear_of_autoawq_is_taken_for_gptq(version):
    tensors, _ = golden(version)
    assert gptq.linears(tensors, {"quant_method": "awq"}) == []


def test_it_is_read_from_a_folder(tmp_path):
    q = make(Scheme(4, 64, False))
    save_file(held(awq.pack(q)), tmp_path / "model.safetensors")
    assert awq.read(Checkpoint(tmp_path), NAME, {}).identical(q)


# refusals


def refused(tensors, config=None):
    with pytest.raises(QuantkitError) as caught:
        awq.read(tensors, NAME, config or {})
    assert NAME in caught.value.message
    return caught.value


RELATIVES = {
    "llm-awq": {
        "qweight": torch.zeros(64, 256, dtype=torch.int16),
        "scales": torch.zeros(8, 256).half(),
        "scaled_zeros": torch.zeros(8, 256).half(),
    },
    "GEMV_fast": {
        "qweight": torch.zeros(64, 256, dtype=torch.int16),
        "scales": torch.zeros(8, 256).half(),
        "qzeros": torch.zeros(8, 256).half(),
    },
    "Marlin": {
        "qweight": torch.zeros(16, 512, dtype=torch.int32),
        "scales": torch.zeros(2, 256).half(),
    },
}


@pytest.mark.parametrize("relative", RELATIVES)
def test_variants_are_refused_by_their_name(relative):
    tensors = held(RELATIVES[relative])
    assert awq.linears(tensors, {"quant_method": "awq"}) == [NAME]
    error = refused(tensors)
    assert relative in error.message
    assert "GEMM" in error.hint


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_a_missing_tensor_is_refused(suffix):
    packed = awq.pack(make(Scheme(4, 32, False)))
    del packed[suffix]
    assert suffix in refused(held(packed)).message


def test_a_linear_without_scales_is_awq_where_the_config_says_so():
    packed = awq.pack(make(Scheme(4, 32, False)))
    del packed["scales"]
    assert awq.linears(held(packed), {"quant_method": "awq"}) == [NAME]
    assert awq.linears(held(packed), {"quant_method": "gptq"}) == []


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        ("qweight", lambda t: t[:-1]),
        ("qweight", lambda t: t[:, :-1]),
        ("qweight", lambda t: t[0]),
        ("qweight", lambda t: t[:0]),
        ("qweight", lambda t: t[:, :0]),
        ("qweight", lambda t: t[None]),
        ("qzeros", lambda t: t[:-1]),
        ("qzeros", lambda t: t[:, :-1]),
        ("qzeros", lambda t: t.T),
        ("qzeros", lambda t: t[0, 0]),
        ("scales", lambda t: t[:-1]),
        ("scales", lambda t: t[:, :-8]),
        ("scales", lambda t: t[:0]),
        ("scales", lambda t: t[0]),
        ("scales", lambda t: t[0, 0]),
    ],
)
def test_wrong_shapes_are_refused(suffix, change):
    packed = awq.pack(make(Scheme(4, 32, False)))
    packed[suffix] = change(packed[suffix])
    refused(held(packed))


@pytest.mark.parametrize("groups", [3, 32, 64, 128, 256, 100_000])
def test_absurd_numbers_of_groups_are_refused(groups):
    packed = awq.pack(make(Scheme(4, 32, False)))
    packed["qzeros"] = torch.zeros(groups, 6, dtype=torch.int32)
    packed["scales"] = torch.zeros(groups, 48).half()
    assert "group" in refused(held(packed)).message


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        ("qweight", torch.int64),
        ("qweight", torch.int16),
        ("qweight", torch.float32),
        ("qzeros", torch.int64),
        ("qzeros", torch.float16),
        ("scales", torch.int32),
        ("scales", torch.float64),
    ],
)
def test_wrong_dtypes_are_refused(suffix, dtype):
    packed = awq.pack(make(Scheme(4, 32, False)))
    packed[suffix] = packed[suffix].to(dtype)
    error = refused(held(packed))
    assert str(dtype) in error.message
    assert suffix in error.message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_float_dtypes_are_read_and_not_written(dtype):
    packed = awq.pack(make(Scheme(4, 32, False)))
    packed["scales"] = packed["scales"].to(dtype)
    q = awq.read(held(packed), NAME, {})
    assert q.scale.dtype == dtype
    with pytest.raises(ValueError, match="float16"):
        awq.pack(q)


def test_what_awq_cannot_hold_is_not_packed():
    q = make(Scheme(4, 32, False))
    with pytest.raises(ValueError, match="minimums"):
        awq.pack(QWeight(q.scheme, q.codes, q.scale, minimum=q.scale))
    shuffled = torch.arange(256, dtype=torch.int32).flip(0) // 32
    with pytest.raises(ValueError, match="contiguous"):
        awq.pack(QWeight(q.scheme, q.codes, q.scale, q.zero, shuffled))
    with pytest.raises(ValueError, match="8"):
        awq.pack(make(Scheme(8, 32)))


@pytest.mark.parametrize(
    ("out", "scheme", "reason"),
    [
        (48, Scheme(3, 32), "3"),
        (48, Scheme(8, 32), "8"),
        (48, Scheme(4, 32, grid="nf4"), "nf4"),
        (50, Scheme(4, 32), "50 outputs"),
        (48, Scheme(4, 32), None),
        (48, Scheme(4, -1, False), None),
    ],
)
def test_refusal(out, scheme, reason):
    said = awq.refusal(out, 256, scheme)
    assert said is None if reason is None else reason in said


# what a checkpoint says about itself


def test_config_has_the_keys_that_loaders_read():
    assert awq.configuration(Scheme(4, 64), [], "quantkit") == {
        "quantization_config": {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": 64,
            "zero_point": True,
            "modules_to_not_convert": None,
        }
    }
    dense = ["model.layers.1.mlp.gate"]
    config = awq.configuration(Scheme(), dense, "quantkit")["quantization_config"]
    assert config["modules_to_not_convert"] == dense
    assert awq.beside(config, "owner/name") == {}


def test_the_table_of_activations_is_that_of_transformers():
    theirs = {m: (v["act"], v["layer_before_act"]) for m, v in AWQ_SCALES_MAPPINGS.items()}
    assert theirs == awq.SCALED_ACTIVATIONS


def test_activation_scales_of_gpt_neox():
    outputs = {
        "gpt_neox.layers.0.attention.dense": 64,
        "gpt_neox.layers.0.mlp.dense_h_to_4h": 256,
        "gpt_neox.layers.0.mlp.dense_4h_to_h": 64,
        "gpt_neox.layers.1.mlp.dense_h_to_4h": 512,
    }
    found = awq.activation_scales("gpt_neox", outputs)
    assert found == {
        "gpt_neox.layers.0.mlp.act.scales": TensorSpec(torch.float16, (256,)),
        "gpt_neox.layers.1.mlp.act.scales": TensorSpec(torch.float16, (512,)),
    }
    bloom = awq.activation_scales("bloom", {"h.0.mlp.dense_h_to_4h": 8})
    assert list(bloom) == ["h.0.mlp.gelu_impl.scales"]
    assert awq.activation_scales("llama", outputs) == {}
    present = ["lm_head.weight", "a.mlp.fc.scales", *found, *bloom]
    assert awq.activation_scale_names(present) == [*found, *bloom]


def test_it_is_read_without_codes():
    q = make(Scheme(4, 32, False))
    found = awq.read(held(awq.pack(q)), NAME, {}, codes=False)
    assert found.identical(replace(q, codes=torch.zeros_like(q.codes)))
