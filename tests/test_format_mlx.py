"""The MLX format only moves bits, reads what MLX wrote, and refuses what does not fit."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.core.checkpoint import Checkpoint, ShardWriter, TensorSpec
from quantkit.core.qweight import QWeight, Scheme
from quantkit.errors import QuantkitError
from quantkit.formats import mlx

GOLDEN = Path(__file__).parent / "golden" / "mlx"
NAME = "model.layers.3.mlp.down_proj"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


class Held(dict):
    """Tensors in memory, in the way of a Checkpoint."""

    def spec(self, name):
        return TensorSpec.of(self[name])

    def get(self, name):
        return self[name]


def held(packed):
    return Held({f"{NAME}.{suffix}": tensor for suffix, tensor in packed.items()})


def said(scheme):
    return {"bits": scheme.bits, "group_size": scheme.group_size}


def make(bits, group, out=6, width=384, dtype=torch.float16, kind="minimum", seed=0):
    """kind: minimum, symmetric, or the largest zero point there is."""
    g = torch.Generator().manual_seed(seed)
    groups = width // group
    scheme = Scheme(bits, group, kind == "symmetric")
    codes = torch.randint(0, scheme.max_code + 1, (out, width), generator=g).to(torch.uint8)
    scale = torch.randn(out, groups, generator=g).to(dtype)
    if kind == "minimum":
        return QWeight(
            scheme, codes, scale, minimum=torch.randn(out, groups, generator=g).to(dtype)
        )
    if kind == "symmetric":
        return QWeight(scheme, codes, scale)
    zero = torch.randint(0, kind + 1, (out, groups), generator=g).to(torch.uint8)
    return QWeight(scheme, codes, scale, zero)


@pytest.mark.parametrize("kind", ["minimum", "symmetric"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_read_inverts_pack(bits, group, dtype, kind):
    for out, width in ((1, 128), (6, 384), (7, 640)):
        q = make(bits, group, out, width, dtype, kind)
        assert mlx.read(held(mlx.pack(q)), NAME, said(q.scheme)).identical(q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_specs_are_what_pack_returns(bits, dtype):
    for kind in ("minimum", "symmetric"):
        q = make(bits, 64, dtype=dtype, kind=kind)
        packed = mlx.pack(q)
        assert {s: TensorSpec.of(t) for s, t in packed.items()} == mlx.specs(
            6, 384, q.scheme, dtype
        )
        assert all(tensor.is_contiguous() for tensor in packed.values())
        tensors = held(packed)
        assert mlx.describe(tensors, NAME, said(q.scheme)) == (6, 384, Scheme(bits, 64, False))
        assert mlx.linears(tensors, {}) == [NAME]
        assert mlx.names(tensors, NAME) == [f"{NAME}.{suffix}" for suffix in packed]


def test_uint32_goes_through_files(tmp_path):
    q = make(4, 64)
    packed = held(mlx.pack(q))
    writer = ShardWriter(tmp_path, {n: TensorSpec.of(t) for n, t in packed.items()}, 1 << 20)
    for name, tensor in packed.items():
        writer.write(name, tensor)
    assert all(torch.equal(writer.read(name), tensor) for name, tensor in packed.items())
    writer.close()
    assert mlx.read(Checkpoint(tmp_path), NAME, said(q.scheme)).identical(q)


# the documented layout, read without quantkit's help


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_row_is_one_stream_of_bits(bits):
    q = make(bits, 32, out=3, width=96)
    for row, codes in zip(mlx.pack(q)["weight"].tolist(), q.codes.tolist()):
        stream = sum(word << (32 * i) for i, word in enumerate(row))
        assert [(stream >> (bits * k)) & (2**bits - 1) for k in range(96)] == codes


def test_bytes_drawn_by_hand():
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 1] = 0b11011  # 5 bits: input 1 has the high 3 bits of byte 0 and the low 2 of byte 1
    q = QWeight(Scheme(5, 32), codes, torch.ones(1, 1).half())
    raw = mlx.pack(q)["weight"].view(torch.uint8)[0].tolist()
    assert raw[:3] == [0b01100000, 0b11, 0]


# what MLX wrote


def golden():
    tensors = Checkpoint(GOLDEN, ["affine.safetensors"])
    for prefix in mlx.linears(tensors, {}):
        bits, group = map(int, re.match(r"b(\d)\.g(\d+)\.", prefix).groups())
        yield tensors, prefix, {"bits": bits, "group_size": group}


def test_it_is_read_to_the_weights_that_mlx_reads():
    kinds = set()
    for tensors, prefix, config in golden():
        q = mlx.read(tensors, prefix, config)
        theirs = tensors.get(f"{prefix}.dequantized")
        spread = [t.repeat_interleave(q.scheme.group_size, 1) for t in (q.scale, q.minimum)]
        # MLX computes in the dtype of the scales, and rounds twice where that is a short one
        assert torch.equal(q.codes.to(theirs.dtype) * spread[0] + spread[1], theirs)
        if theirs.dtype == torch.float32:
            assert torch.equal(q.dequantize(), theirs)
        kinds.add((q.scheme.bits, theirs.dtype))
    assert len(kinds) == 13


def test_it_is_written_as_mlx_writes_it():
    for tensors, prefix, config in golden():
        packed = mlx.pack(mlx.read(tensors, prefix, config))
        assert mlx.names(tensors, prefix) == [f"{prefix}.{suffix}" for suffix in packed]
        for suffix, tensor in packed.items():
            theirs = tensors.get(f"{prefix}.{suffix}")
            assert TensorSpec.of(tensor) == TensorSpec.of(theirs)
            assert torch.equal(tensor.view(torch.uint8), theirs.view(torch.uint8))


# weights with zero points


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_symmetric_weights_are_held_exactly(bits, dtype):
    q = make(bits, 32, dtype=dtype, kind="symmetric")
    packed = mlx.pack(q)
    assert torch.equal(packed["biases"].double(), q.scale.double() * -(2 ** (bits - 1)))


def test_almost_symmetric_weights_are_not_symmetric():
    q = make(4, 64, kind="symmetric")
    packed = mlx.pack(q)
    packed["biases"].view(torch.int16)[2, 3] ^= 1
    found = mlx.read(held(packed), NAME, said(q.scheme))
    assert not found.scheme.symmetric
    assert torch.equal(found.minimum, packed["biases"])


def test_zeros_keep_their_sign():
    """A row of plain zeros: MLX's bias is 0, and -8 * 0 is -0."""
    q = QWeight(
        Scheme(4, 32, False),
        torch.zeros(1, 32, dtype=torch.uint8),
        torch.zeros(1, 1).half(),
        minimum=torch.zeros(1, 1).half(),
    )
    assert mlx.read(held(mlx.pack(q)), NAME, said(q.scheme)).identical(q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [0, 8, 15])
def test_zero_points_become_minimums_only_where_that_is_exact(kind, dtype):
    q = make(4, 32, kind=kind, dtype=dtype)
    zero = torch.full_like(q.zero, kind)
    q = replace(q, zero=zero)
    if kind == 15:
        with pytest.raises(ValueError, match=re.escape(str(dtype))):
            mlx.pack(q)
        scale = torch.randint(1, 9, q.scale.shape) / 64
        q = replace(q, scale=scale.to(dtype))
    found = mlx.read(held(mlx.pack(q)), NAME, said(q.scheme))
    assert torch.equal(found.dequantize(), q.dequantize())


def test_a_minimum_that_overflows_is_not_packed():
    q = make(8, 32, kind="symmetric")
    q = replace(q, scale=torch.full_like(q.scale, 600.0))  # times 128 is more than 65504
    with pytest.raises(ValueError, match="float16"):
        mlx.pack(q)


# what the configuration says


def test_a_linear_may_have_settings_of_its_own():
    q = make(6, 64)
    config = {"bits": 4, "group_size": 32, NAME: said(q.scheme), "other": False}
    assert mlx.read(held(mlx.pack(q)), NAME, config).identical(q)
    with pytest.raises(QuantkitError, match=re.escape(NAME)):
        mlx.read(held(mlx.pack(q)), NAME, {**config, NAME: True})


def test_embeddings_are_linears_and_other_scales_are_not():
    packed = mlx.pack(make(4, 64))
    tensors = Held({f"model.embed_tokens.{s}": t for s, t in packed.items()})
    tensors["gpt_neox.layers.0.mlp.act.scales"] = torch.ones(4)
    tensors["x.scales"], tensors["x.weight"] = torch.ones(4), torch.ones(4, dtype=torch.int32)
    assert mlx.linears(tensors, {}) == ["model.embed_tokens"]


def test_configuration_has_both_names():
    config = mlx.configuration(Scheme(4, 64), ["lm_head"], "quantkit")
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert mlx.beside(config, "owner/name") == {}


# refusals


def refused(tensors, config=None):
    config = {"bits": 4, "group_size": 32} if config is None else config
    for ask in (mlx.describe, mlx.read):
        with pytest.raises(QuantkitError) as caught:
            ask(tensors, NAME, config)
        assert NAME in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"bits": 4},
        {"group_size": 32},
        {"bits": "4", "group_size": 32},
        {"bits": 4.0, "group_size": 32},
        {"bits": True, "group_size": 32},
        {"bits": 4, "group_size": None},
        {"bits": 1, "group_size": 128},
        {"bits": 7, "group_size": 32},
        {"bits": -4, "group_size": -32},
        {"bits": 8, "group_size": 16},
        {"bits": 2, "group_size": 32},
        {"bits": 4, "group_size": 64},
        {NAME: {"bits": 3, "group_size": 32}, "bits": 4, "group_size": 32},
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_is_refused(config):
    refused(held(mlx.pack(make(4, 32))), config)


@pytest.mark.parametrize("suffix", ["weight", "scales", "biases"])
def test_a_missing_tensor_is_refused(suffix):
    packed = mlx.pack(make(4, 32))
    del packed[suffix]
    assert suffix in refused(held(packed))


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        ("weight", lambda t: t[:-1]),
        ("weight", lambda t: t[:, :-1]),
        ("weight", lambda t: t[:, :0]),
        ("weight", lambda t: t[0]),
        ("weight", lambda t: t[None]),
        ("weight", lambda t: t[0, 0]),
        ("scales", lambda t: t[:-1]),
        ("scales", lambda t: t[:, :-1]),
        ("scales", lambda t: t[:0]),
        ("scales", lambda t: t[0]),
        ("biases", lambda t: t[:, :-1]),
        ("biases", lambda t: t.T),
        ("biases", lambda t: t[None]),
    ],
)
def test_wrong_shapes_are_refused(suffix, change):
    packed = mlx.pack(make(4, 32))
    packed[suffix] = change(packed[suffix])
    refused(held(packed))


def test_absurd_numbers_of_groups_are_refused():
    packed = mlx.pack(make(4, 32))
    packed["scales"] = packed["biases"] = torch.ones(6, 100_000).half()
    refused(held(packed))


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        ("weight", torch.int32),
        ("weight", torch.uint8),
        ("scales", torch.int32),
        ("scales", torch.float64),
        ("biases", torch.float32),
        ("biases", torch.int64),
    ],
)
def test_wrong_dtypes_are_refused(suffix, dtype):
    packed = mlx.pack(make(4, 32))
    packed[suffix] = packed[suffix].view(torch.int32).to(dtype)
    assert suffix in refused(held(packed)) or "biases" in refused(held(packed))


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8", None])
def test_floating_point_modes_are_refused_by_their_name(mode):
    tensors = Held(
        {
            f"{NAME}.weight": torch.zeros(4, 16, dtype=torch.int32).view(torch.uint32),
            f"{NAME}.scales": torch.zeros(4, 4, dtype=torch.uint8),
        }
    )
    assert mlx.linears(tensors, {}) == [NAME]
    config = {"bits": 4, "group_size": 32} | ({"mode": mode} if mode else {})
    assert (mode or "fp modes") in refused(tensors, config)


@pytest.mark.parametrize(
    ("width", "scheme", "reason"),
    [
        (256, Scheme(4, 32, grid="nf4"), "nf4"),
        (256, Scheme(4, 16), "groups of 16"),
        (256, Scheme(4, 256), "groups of 256"),
        (256, Scheme(4, -1), "one scale a row"),
        (96, Scheme(4, 64), "96 inputs"),
        (256, Scheme(3, 64), None),
        (256, Scheme(8, 128, False), None),
    ],
    ids=str,
)
def test_refusal(width, scheme, reason):
    found = mlx.refusal(8, width, scheme)
    assert found is None if reason is None else reason in found


def test_what_mlx_cannot_hold_is_not_packed():
    q = make(4, 32)
    with pytest.raises(ValueError, match="float64"):
        mlx.pack(replace(q, scale=q.scale.double()))
    with pytest.raises(ValueError, match="float32"):
        mlx.pack(replace(q, minimum=q.minimum.float()))
    with pytest.raises(ValueError, match="contiguous"):
        mlx.pack(replace(q, group_of=torch.arange(384, dtype=torch.int32).flip(0) // 32))
    with pytest.raises(ValueError, match="groups of 16"):
        mlx.pack(make(4, 16))


def test_it_is_read_from_a_folder(tmp_path):
    q = make(3, 128, dtype=torch.bfloat16)
    save_file(held(mlx.pack(q)), tmp_path / "model.safetensors")
    assert mlx.read(Checkpoint(tmp_path), NAME, said(q.scheme)).identical(q)


def test_it_is_read_without_codes():
    q = make(4, 32)
    found = mlx.read(held(mlx.pack(q)), NAME, said(q.scheme), codes=False)
    assert found.identical(replace(q, codes=torch.zeros_like(q.codes)))
