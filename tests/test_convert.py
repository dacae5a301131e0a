"""Conversion: the same numbers in another format, or a refusal before anything is written.

What an interrupted conversion leaves is finished by the same command, to the same bytes.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIG, WEIGHTS, exactly, opened, save, weights, write, write_json
from safetensors.torch import load_file
from tools import command, model, quantized, read_json, sentence
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import formats
from quantkit.core import checkpoint
from quantkit.core.checkpoint import ShardWriter
from quantkit.core.gguf_writer import GgufWriter
from quantkit.core.ledger import Ledger
from quantkit.errors import QuantkitError, UsageError
from quantkit.formats import awq, gguf, gptq
from quantkit.methods import digest, fit
from quantkit.workflows import convert as workflow
from quantkit.workflows import convert_targets
from quantkit.workflows.convert import convert
from quantkit.workflows.inspect import inspect
from quantkit.workflows.output import Output
from quantkit.workflows.verify import verify

DEMO = "demo"
TARGETS = ["gptq", "gptq_v2", "awq", "compressed-tensors", "mlx", "dense", "gguf:q4_0", "gguf:f16"]


@torch.no_grad()
def logits(folder, dtype="float32"):
    loaded, _ = quantkit.load(str(folder), dtype=dtype)
    ids = torch.randint(2, 8192, (3, 20), generator=torch.Generator().manual_seed(0))
    return loaded(input_ids=ids, use_cache=False).logits


def the_file(folder):
    """The one weight file of a converted folder."""
    (found,) = [p for p in folder.iterdir() if p.suffix in (".gguf", ".safetensors")]
    return found


def record(folder):
    return read_json(folder / "quantkit.json")


def clean(folder):
    """Nothing of a run is left beside its result."""
    assert not folder.with_name(folder.name + ".partial").exists()
    assert not list(folder.glob("*.tmp")) and not (folder / "ledger.json").exists()
    return inspect(str(folder)).errors == 0


def untouched(folder):
    return not folder.exists() and not folder.with_name(folder.name + ".partial").exists()


# the same numbers


CHAIN = ["gptq_v2", "awq", "compressed-tensors", "gguf:q4_0", "gptq"]
SOURCES = {
    "demo": lambda: quantized(),
    "llama": lambda: quantized(model("llama"), group=32),
    "group 64": lambda: quantized(model("llama"), group=64),
    "a scale a row": lambda: quantized(model("llama"), group=-1),
    "gpt_neox": lambda: quantized(model("gpt_neox"), group=32),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_chain_of_conversions_changes_no_number(tmp_path, source):
    first = before = SOURCES[source]()
    wanted, expected = weights(first), logits(first)
    digests = set()
    for index, to in enumerate(CHAIN):
        out = tmp_path / str(index)
        result = convert(str(before), to, out)
        assert result.exact and result.written and clean(out)
        digests.add(result.digest)
        found = weights(out)
        assert found.keys() == wanted.keys()
        for name, q in found.items():
            again = q if to != "gguf:q4_0" else q.regrouped(wanted[name].scheme.group_size)
            assert again.identical(wanted[name]), (to, name)
        assert torch.equal(logits(out), expected), to
        before = out
    assert len(digests) == 1
    same_tensors(first, before)


def same_tensors(first, last):
    """Norms and biases are wider after a GGUF file, where llama.cpp wants them in float32."""
    a, b = (load_file(folder / WEIGHTS) for folder in (first, last))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor.double(), b[name].double()), name
        assert tensor.dtype == b[name].dtype or tensor.dim() == 1
    said = [read_json(f / CONFIG)["quantization_config"] for f in (first, last)]
    for key in ("quant_method", "bits", "group_size", "sym", "checkpoint_format", "lm_head"):
        assert said[0][key] == said[1][key]


PATHS = [
    # bits, zero points, targets one after the other
    (4, (1, 15), ["gptq_v2", "awq", "compressed-tensors", "gptq"]),
    (4, (0, 15), ["awq", "compressed-tensors", "gptq_v2"]),
    (3, None, ["gptq_v2", "compressed-tensors", "mlx", "gptq"]),
    (3, (1, 7), ["compressed-tensors", "gptq"]),
    (2, None, ["mlx", "compressed-tensors", "gptq"]),
    (8, None, ["gptq_v2", "compressed-tensors", "gguf:q8_0", "mlx", "gptq"]),
    (8, (1, 255), ["compressed-tensors", "gptq"]),
]


@pytest.mark.parametrize(("bits", "zero", "path"), PATHS)
@pytest.mark.parametrize("source", ["llama", "gpt_neox"])
def test_other_bits_and_zero_points(tmp_path, source, bits, zero, path):
    form = "gptq_v2" if zero and zero[0] == 0 else "gptq"
    first = before = write(tmp_path / "first", form, bits=bits, zero=zero, source=source)
    wanted, expected = weights(first), logits(first)
    digests = set()
    for index, to in enumerate(path):
        out = tmp_path / str(index)
        result = convert(str(before), to, out)
        digests.add(result.digest)
        assert result.exact and clean(out)
        for name, q in weights(out).items():
            assert q.identical(wanted[name]), (to, name)
        assert torch.equal(logits(out), expected), to
        before = out
    assert len(digests) == 1
    same_tensors(first, before)


@pytest.mark.parametrize("to", ["awq", "compressed-tensors", "gguf:q4_0", "mlx"])
def test_fewer_bits_move_into_more_room(tmp_path, to):
    source = write(tmp_path / "source", bits=3)
    result = convert(str(source), to, tmp_path / "out")
    assert result.exact
    found = weights(tmp_path / "out")
    assert {q.scheme.bits for q in found.values()} == {
        3 if to in ("compressed-tensors", "mlx") else 4
    }
    for name, q in weights(source).items():
        assert torch.equal(exactly(found[name]), exactly(q))
    assert torch.equal(logits(tmp_path / "out"), logits(source))


@pytest.mark.parametrize("zero", [None, (1, 15)])
def test_an_order_of_groups_is_kept_where_there_is_a_place_for_it(tmp_path, zero):
    source = write(tmp_path / "source", ordered=True, zero=zero)
    result = convert(str(source), "gptq_v2", tmp_path / "out")
    assert result.exact
    for name, q in weights(source).items():
        assert q.group_of is not None
        assert weights(tmp_path / "out")[name].identical(q)
    assert torch.equal(logits(tmp_path / "out"), logits(source))
    again = convert(str(tmp_path / "out"), "gptq", tmp_path / "again")
    assert again.digest == result.digest


def test_an_order_of_groups_is_declared(tmp_path):
    """Kernels for groups in order are chosen by desc_act, and would compute nonsense."""
    source = write(tmp_path / "source", ordered=True)
    convert(str(source), "gptq_v2", tmp_path / "out")
    assert read_json(tmp_path / "out" / CONFIG)["quantization_config"]["desc_act"]


def test_an_order_that_keeps_groups_together_is_undone(tmp_path):
    def blocks(name, q):
        order = torch.arange(q.shape[1]).reshape(-1, 32).flip(0).reshape(-1) // 32
        return replace(q, group_of=order.int())

    source = write(tmp_path / "source", change=blocks)
    assert convert(str(source), "awq", tmp_path / "out").exact
    found = weights(tmp_path / "out")
    for name, q in weights(source).items():
        assert found[name].group_of is None
        assert torch.equal(exactly(found[name]), exactly(q))


def test_one_asymmetric_linear_makes_the_configuration_so(tmp_path):
    def one(name, q):
        if "layers.1" not in name or "up_proj" not in name:
            return q
        return replace(fit.with_zeros(q), zero=torch.full_like(q.scale, 5, dtype=torch.uint8))

    source = write(tmp_path / "source", change=one)
    for to in ("gptq_v2", "awq", "compressed-tensors"):
        out = tmp_path / to
        assert convert(str(source), to, out).exact
        for name, q in weights(source).items():
            assert weights(out)[name].identical(q)
        assert torch.equal(logits(out), logits(source))
    assert read_json(tmp_path / "gptq_v2" / CONFIG)["quantization_config"]["sym"] is False


# groups


def test_linears_as_narrow_as_a_group_are_no_exception(tmp_path):
    """Their group looks like a whole row."""
    source = write(tmp_path / "source", group=64)
    assert {p.scheme.group_size for p in opened(source).linears.values()} == {64, -1}
    for to in ("awq", "compressed-tensors", "mlx", "gguf:q4_0"):
        out = tmp_path / to.replace(":", "-")
        result = convert(str(source), to, out)
        assert result.exact
        assert torch.equal(logits(out), logits(source))
    assert read_json(tmp_path / "awq" / CONFIG)["quantization_config"]["group_size"] == 64


def test_groups_of_several_sizes_become_the_largest_that_all_have(tmp_path):
    def wide(name, q):
        if "down_proj" not in name:
            return q
        index = torch.arange(2).repeat_interleave(2)
        return replace(q, scale=q.scale[:, index]).regrouped(64)

    source = write(tmp_path / "source", change=wide)
    assert {p.scheme.group_size for p in opened(source).linears.values()} == {32, 64}
    for to in ("awq", "compressed-tensors", "mlx"):
        result = convert(str(source), to, tmp_path / to)
        assert result.exact
        kept = {32, 64} if to == "compressed-tensors" else {32}  # it has schemes for each
        assert {q.scheme.group_size for q in weights(tmp_path / to).values()} == kept


def test_equal_groups_of_one_linear_are_not_joined_alone(tmp_path):
    def constant(name, q):
        return replace(q, scale=q.scale[:, :1].expand_as(q.scale)) if "q_proj" in name else q

    source = write(tmp_path / "source", change=constant)
    for to in ("mlx", "awq", "gguf:q4_0"):
        assert convert(str(source), to, tmp_path / to.replace(":", "-")).exact
    back = convert(str(the_file(tmp_path / "gguf-q4_0")), "mlx", tmp_path / "back")
    assert back.exact
    assert {q.scheme.group_size for q in weights(tmp_path / "back").values()} == {32}


def test_linears_of_different_bits_need_a_target_with_a_kind_for_each(tmp_path):
    def more(name, q):
        if "down_proj" not in name:
            return q
        return replace(q, scheme=replace(q.scheme, bits=8))

    source = write(tmp_path / "source", change=more)
    with pytest.raises(QuantkitError, match="has one kind for all"):
        convert(str(source), "mlx", tmp_path / "out")
    assert untouched(tmp_path / "out")
    assert convert(str(source), "compressed-tensors", tmp_path / "mixed").exact
    bits = {name: q.scheme.bits for name, q in weights(tmp_path / "mixed").items()}
    assert {n.rpartition(".")[2]: b for n, b in bits.items()}["down_proj"] == 8
    assert set(bits.values()) == {4, 8}
    assert convert(str(source), "gguf:q8_0", tmp_path / "out").exact
    assert torch.equal(logits(tmp_path / "out"), logits(source))


# what is rounded


@pytest.mark.parametrize("to", ["gguf:q4_1", "mlx"])
def test_minimums_are_rounded_and_that_is_reported(tmp_path, to, capsys):
    source = write(tmp_path / "source", zero=(1, 15))
    out = tmp_path / "out"
    result = convert(str(source), to, out)
    assert not result.exact and result.errors.keys() == weights(source).keys()
    assert_measured(source, out, result)
    assert max(result.errors.values()) < 1e-6
    assert any("will be rounded" in note for note in result.notes)
    assert record(out)["conversion"]["exact"] is False
    name, error = result.worst
    assert record(out)["conversion"]["worst_error"] == {"linear": name, "error": error}
    assert command("convert", source, "--to", to, "-o", tmp_path / "cli") == 0
    printed = capsys.readouterr()
    assert f"{len(result.errors)} of {result.linears} linears were rounded" in printed.out
    assert "every number is the same" not in printed.out


def assert_measured(source, out, result):
    """The errors are those that anybody would compute from both folders."""
    before, after = opened(source), opened(out)
    assert result.errors
    for name, error in result.errors.items():
        a = before.qweight(name).dequantize().double() if name in before.linears else None
        a = before.dense.get(f"{name}.weight").double() if a is None else a
        b = after.qweight(name).dequantize().double() if name in after.linears else None
        b = after.dense.get(f"{name}.weight").double() if b is None else b
        expected = float((a - b).square().sum() / a.square().sum())
        assert error == pytest.approx(expected, rel=1e-3)
    assert result.worst[1] == max(result.errors.values())


@pytest.mark.parametrize("to", ["gguf:q5_0", "gguf:q8_0"])
def test_zero_points_of_four_bits_fit_into_wider_symmetric_blocks(tmp_path, to):
    source = write(tmp_path / "source", zero=(1, 15))
    assert convert(str(source), to, tmp_path / "out").exact
    found = weights(tmp_path / "out")
    for name, q in weights(source).items():
        assert found[name].scheme.symmetric
        assert torch.equal(exactly(found[name]), exactly(q))


LOSSY = [
    # what the source is, the target, how much error is in order
    ({"bits": 8}, "awq", (1e-4, 2e-2)),
    ({"bits": 8}, "gguf:q4_0", (1e-4, 2e-2)),
    ({"bits": 8, "zero": (1, 255)}, "gguf:q8_0", (1e-8, 1e-3)),
    ({"ordered": True}, "awq", (1e-5, 2e-2)),
    ({"ordered": True}, "gguf:q4_0", (1e-5, 2e-2)),
    ({"form": "bnb", "grid": "nf4", "group": 64}, "gptq", (1e-4, 2e-2)),
    ({"form": "bnb", "grid": "nf4", "group": 64}, "gguf:q8_0", (1e-8, 1e-4)),
    ({"form": "gptq_v2", "zero": (0, 0)}, "gptq", (1e-6, 2e-2)),
    ({"group": 16}, "mlx", (1e-5, 2e-2)),
]


@pytest.mark.parametrize(("options", "to", "between"), LOSSY)
def test_lossy_is_measured(tmp_path, options, to, between):
    source, out = write(tmp_path / "source", **options), tmp_path / "out"
    with pytest.raises(QuantkitError) as refused:
        convert(str(source), to, out)
    assert "--lossy" in refused.value.hint and untouched(out)
    result = convert(str(source), to, out, lossy=True)
    assert result.linears == len(result.errors) and clean(out)
    assert_measured(source, out, result)
    assert between[0] < result.worst[1] < between[1]
    together = {name: digest.of(q) for name, q in weights(out).items()}
    assert result.digest == digest.together(together)


def test_lossy_changes_nothing_that_fits(tmp_path):
    source = quantized(model("llama"), group=32)
    result = convert(str(source), "awq", tmp_path / "out", lossy=True)
    assert result.exact and not result.notes
    for name, q in weights(source).items():
        assert weights(tmp_path / "out")[name].identical(q)


@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "q5_1"])
def test_a_plain_model_is_rounded_into_blocks(tmp_path, kind):
    source, out = model("llama"), tmp_path / "out"
    result = convert(str(source), f"gguf:{kind}", out, lossy=True)
    assert len(result.errors) == 21
    assert_measured(source, out, result)
    found = opened(out)
    assert {found.tensor(f"{name}.weight").type for name in found.linears} == {kind.upper()}


def test_weights_too_large_for_anything_are_refused(tmp_path):
    source = write(
        tmp_path / "source",
        bits=8,
        change=lambda name, q: replace(q, scale=torch.full_like(q.scale, 6e4)),
    )
    with pytest.raises(QuantkitError, match="not even rounded"):
        convert(str(source), "gguf:q4_1", tmp_path / "out", lossy=True)
    for to in ("dense:f16", "gguf:f16"):
        with pytest.raises(QuantkitError, match="do not fit into float16"):
            convert(str(source), to, tmp_path / to.replace(":", "-"))
    assert not (tmp_path / "out").exists()


# plain weights


@pytest.mark.parametrize("source", ["llama", "gpt_neox"])
@pytest.mark.parametrize(
    "options", [{}, {"zero": (1, 15)}, {"ordered": True}, {"bits": 8}], ids=str
)
def test_dense_float32_is_exact_and_transformers_computes_the_same(tmp_path, source, options):
    folder, out = write(tmp_path / "source", source=source, **options), tmp_path / "out"
    result = convert(str(folder), "dense:f32", out)
    assert result.exact
    tensors = load_file(out / WEIGHTS)
    for name, q in weights(folder).items():
        assert torch.equal(tensors[f"{name}.weight"].double(), exactly(q))
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    config = read_json(out / CONFIG)
    assert config["dtype"] == "float32" and "quantization_config" not in config
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.randint(2, 8192, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = theirs(input_ids=ids, use_cache=False).logits
    if "ordered" in options:  # its inputs are sorted, which changes the order of sums
        assert torch.allclose(found, logits(folder), atol=1e-4)
    else:
        assert torch.equal(found, logits(folder))
    plain = opened(folder).dense
    assert all(torch.equal(tensors[name], plain.get(name).float()) for name in plain)


def test_tables_of_levels_become_plain_weights(tmp_path):
    source = write(tmp_path / "source", "bnb", grid="nf4", group=64)
    assert convert(str(source), "dense:f32", tmp_path / "out").exact
    assert torch.equal(logits(tmp_path / "out"), logits(source))


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("container", ["dense", "gguf"])
def test_half_precision_is_rounded_and_measured(tmp_path, container, kind, dtype):
    source, out = write(tmp_path / "source"), tmp_path / "out"
    result = convert(str(source), f"{container}:{kind}", out)
    assert result.digest is not None
    if kind == "bf16":
        assert_measured(source, out, result)
        assert result.dense > 0 and not result.exact
    found = opened(out)
    assert found.linears == {}
    for name, q in weights(source).items():
        assert torch.equal(found.dense.get(f"{name}.weight"), q.dequantize(dtype))
    assert torch.allclose(logits(out), logits(source), atol=0.05)


def test_dense_without_a_dtype_is_that_of_the_other_tensors(tmp_path):
    source = write(tmp_path / "source")
    convert(str(source), "dense", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert read_json(tmp_path / "out" / CONFIG)["dtype"] == "float16"


def test_a_plain_model_becomes_a_gguf_file_and_comes_back(tmp_path):
    source = model("llama")
    assert convert(str(source), "gguf:f32", tmp_path / "gguf").exact
    result = convert(str(the_file(tmp_path / "gguf")), "dense:f32", tmp_path / "back")
    assert result.exact and result.digest is None
    a, b = load_file(source / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(logits(tmp_path / "back"), logits(source))


# refusals: nothing is written


REFUSED = [
    ({"form": "gptq_v2", "zero": (0, 15)}, "gptq", 1, "zero points of 0"),
    ({"ordered": True}, "awq", 1, "follow the activations"),
    ({"ordered": True}, "gguf:q4_0", 1, "follow the activations"),
    ({"form": "bnb", "grid": "nf4", "group": 64}, "gptq", 1, "not evenly spaced"),
    ({"form": "bnb", "grid": "nf4", "group": 64}, "gguf:q4_0", 1, "not evenly spaced"),
    ({"bits": 8}, "gguf:q4_0", 1, "reach"),
    ({"bits": 8}, "awq", 1, "at most 4"),
    ({"zero": (1, 15)}, "gguf:q4_0", 1, "about the zero point"),
    ({"group": 16}, "mlx", 1, "groups of 16"),
    ({"group": 16}, "gguf:q4_0", 1, "groups of 16"),
    ({}, "gguf:q3_k", 2, "no type that is written"),
    ({}, "gguf", 2, "no type that is written"),
    ({}, "dense:int8", 2, "no type that is written"),
    ({}, "exl2", 2, "no format to convert to"),
    ({}, "awq:q4_0", 2, "no format to convert to"),
    ({}, "", 2, "no format to convert to"),
]


@pytest.mark.parametrize(("options", "to", "code", "reason"), REFUSED)
def test_refusals_come_before_the_first_byte(tmp_path, capsys, options, to, code, reason):
    source, out = write(tmp_path / "source", **options), tmp_path / "out"
    before = {p.name: p.stat().st_mtime_ns for p in source.iterdir()}
    assert command("convert", source, "--to", to, "-o", out) == code
    message, hint = sentence(capsys.readouterr().err)
    assert reason in message
    if code == 1:
        assert "layers.0" in message and "--lossy" in hint
    assert untouched(out)
    assert {p.name: p.stat().st_mtime_ns for p in source.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("to", ["gptq", "awq", "compressed-tensors", "mlx", "gguf:q4_0"])
def test_converting_does_not_quantize(tmp_path, capsys, to):
    assert command("convert", model("llama"), "--to", to, "-o", tmp_path / "out") == 1
    message, hint = sentence(capsys.readouterr().err)
    assert "is not quantized, and converting does not quantize" in message
    assert ("quantkit gptq" in hint) == (not to.startswith("gguf"))
    assert untouched(tmp_path / "out")


def test_weights_that_fill_no_words_or_blocks_are_refused(tmp_path):
    """40 outputs are no whole words of 3 bits for GPTQ, and 16 inputs no block of GGUF."""
    narrow = model("llama", intermediate_size=80)
    source = quantized(narrow, group=16)
    for to, options in (("gguf:q4_0", {}), ("gguf:q4_0", {"lossy": True}), ("mlx", {})):
        with pytest.raises(QuantkitError, match="cannot be held"):
            convert(str(source), to, tmp_path / "out", **options)
    with pytest.raises(QuantkitError, match=r"down_proj.* rows of 80 are not whole blocks of 32"):
        convert(str(narrow), "gguf:q8_0", tmp_path / "out", lossy=True)
    assert untouched(tmp_path / "out")
    assert convert(str(source), "awq", tmp_path / "out").exact


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    source = write(tmp_path / "source")
    (source / CONFIG).unlink()
    for to in ("awq", "dense", "gguf:q4_0"):
        with pytest.raises(QuantkitError, match=r"source has no config\.json"):
            convert(str(source), to, tmp_path / "out")


def test_architectures_that_llama_cpp_lacks_are_refused(tmp_path):
    source = quantized(model("gptj"), group=32)
    with pytest.raises(QuantkitError, match="gptj"):
        convert(str(source), "gguf:q4_0", tmp_path / "out")
    assert untouched(tmp_path / "out")
    assert convert(str(source), "compressed-tensors", tmp_path / "out").exact


# AWQ's scales of activations


ACT = "gpt_neox.layers.1.mlp.act.scales"


def test_scales_of_activations_are_ones_and_go_again(tmp_path):
    source = quantized(model("gpt_neox"), group=32)
    convert(str(source), "awq", tmp_path / "awq")
    tensors = load_file(tmp_path / "awq" / WEIGHTS)
    scales = {name: t for name, t in tensors.items() if name.endswith("act.scales")}
    assert scales.keys() == {f"gpt_neox.layers.{i}.mlp.act.scales" for i in range(2)}
    for tensor in scales.values():
        assert tensor.dtype == torch.float16 and tensor.shape == (128,)
        assert bool((tensor == 1).all())
    assert torch.equal(logits(tmp_path / "awq"), logits(source))
    for to in ("gptq", "compressed-tensors", "gguf:q4_0", "dense:f32", "awq"):
        out = tmp_path / to.replace(":", "-").replace("awq", "again")
        assert convert(str(tmp_path / "awq"), to, out).exact
        if to == "gguf:q4_0":
            names = set(opened(out).file.tensors)
            assert not any("scales" in name for name in names)
        else:
            names = set(load_file(out / WEIGHTS))
            assert (ACT in names) == (to == "awq")
    same_tensors(source, tmp_path / "gptq")


def test_linears_that_stayed_plain_have_them_too(tmp_path):
    """transformers wraps the activation whatever the linear in front of it is."""
    source = quantized(model("gpt_neox", intermediate_size=100), group=-1)
    assert not any("dense_4h_to_h" in name for name in opened(source).linears)
    convert(str(source), "awq", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert tensors[ACT].shape == (100,)
    assert torch.equal(logits(tmp_path / "out"), logits(source))


def test_scales_of_activations_that_scale_are_refused(tmp_path):
    """Only activation.py divides by them, where the model runs."""
    source = write(tmp_path / "source", "awq", source="gpt_neox")
    tensors = load_file(source / WEIGHTS)
    tensors[ACT][3] = 2.0
    save(tensors, source)
    for to in TARGETS:
        with pytest.raises(QuantkitError, match=f"{ACT} scales an activation"):
            convert(str(source), to, tmp_path / "out")
    assert untouched(tmp_path / "out")


# what else is in a folder


@pytest.mark.parametrize("to", TARGETS)
def test_what_belongs_to_a_model_comes_along(tmp_path, to):
    source, out = quantized(), tmp_path / "out"
    result = convert(str(source), to, out)
    names = {p.name for p in out.iterdir()}
    companions = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    companions |= {"special_tokens_map.json", "generation_config.json", "quantkit.json"}
    companions &= {p.name for p in source.iterdir()}
    made = {"quantkit.json", "README.md"}
    for name in companions - made:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    weight = the_file(out).name
    beside = {"quantize_config.json"} if to.startswith("gptq") else set()
    config = set() if to.startswith("gguf") else {CONFIG}
    assert names == companions | made | {weight} | config | beside
    written = sum(t.nbytes for t in load_file(out / weight).values()) if config else None
    assert written is None or result.bytes == written
    assert result.bytes <= the_file(out).stat().st_size < result.bytes + (1 << 20)


def test_shards_are_as_small_as_asked(tmp_path):
    source, out = quantized(), tmp_path / "out"
    convert(str(source), "awq", out, max_shard_size="2MB")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 1 and (out / "model.safetensors.index.json").exists()
    assert torch.equal(logits(out), logits(source))
    again = convert(str(out), "gptq", tmp_path / "again")
    assert again.exact
    same_tensors(source, tmp_path / "again")


def test_an_old_folder_converts(tmp_path):
    """AutoGPTQ's names of 2023: another weight file, and no section in config.json."""
    source = write(tmp_path / "source")
    (source / WEIGHTS).rename(source / "gptq_model-4bit-32g.safetensors")
    config = read_json(source / CONFIG)
    del config["quantization_config"]
    write_json(source / CONFIG, config)
    result = convert(str(source), "awq", tmp_path / "out")
    assert result.exact and clean(tmp_path / "out")


EMBEDDINGS = ("model.embed_tokens", "lm_head")


def test_quantized_embeddings_become_plain(tmp_path):
    """As MLX has them; most formats have no place for them."""
    source = write(tmp_path / "source", "mlx", source="llama")
    form = formats.by_name("mlx")
    tensors = load_file(source / WEIGHTS)
    expected = {}
    for name in EMBEDDINGS:
        q = fit.nearest_to(tensors.pop(f"{name}.weight"), form.FORM)
        tensors |= {f"{name}.{suffix}": t for suffix, t in form.pack(q).items()}
        expected[f"{name}.weight"] = q.dequantize()
    save(tensors, source)
    config = read_json(source / CONFIG)
    for section in ("quantization", "quantization_config"):
        config[section] |= {name: {"group_size": 32, "bits": 8} for name in EMBEDDINGS}
    write_json(source / CONFIG, config)
    found = opened(source)
    assert set(found.linears) == set(opened(write(tmp_path / "other")).linears)
    for name, weight in expected.items():
        assert name in found.dense and found.dense.spec(name).shape == weight.shape
        assert torch.equal(found.dense.get(name), weight)
    plain = logits(source)
    for to in ("gptq", "gguf:q4_0"):
        out = tmp_path / to.replace(":", "-")
        assert convert(str(source), to, out).exact
        assert torch.equal(logits(out), plain)


def test_a_scale_that_is_no_number_is_carried_over(tmp_path):
    """inspect finds it; converting keeps it, and does not blame the disk."""

    def broken(name, q):
        scale = q.scale.clone()
        scale[0, 0] = torch.nan
        return replace(q, scale=scale)

    source = write(tmp_path / "source", change=broken)
    for to in ("awq", "gguf:q4_0", "dense:f32"):
        out = tmp_path / to.replace(":", "-")
        convert(str(source), to, out)
        found = opened(out)
        name = "model.layers.0.mlp.up_proj"
        weight = (
            found.qweight(name).dequantize() if found.linears else found.dense.get(f"{name}.weight")
        )
        assert bool(weight[0, :32].isnan().all()) and not bool(weight[1:].isnan().any())


# provenance


def test_the_record_keeps_the_original_and_tells_the_conversions(tmp_path):
    source = quantized()
    first = record(source)
    convert(str(source), "awq", tmp_path / "awq")
    found = record(tmp_path / "awq")
    conversion = found.pop("conversion")
    assert conversion["from"] == {"name": source.name, "revision": None, "format": "gptq"}
    assert (conversion["to"], conversion["exact"]) == ("awq", True)
    assert conversion["versions"]["quantkit"] == quantkit.__version__
    assert found.pop("size")["bytes"] < first.pop("size")["bytes"] + 1
    readers = [{one["program"] for one in content.pop("readers")} for content in (found, first)]
    assert ["mlx" in programs for programs in readers] == [True, False]
    assert found == first
    convert(str(tmp_path / "awq"), "gguf:q4_0", tmp_path / "gguf")
    second = record(tmp_path / "gguf")
    assert second["source"] == first["source"]
    assert second["conversion"]["from"]["format"] == "awq"
    assert second["conversion"]["before"] == conversion
    convert(str(the_file(tmp_path / "gguf")), "gptq", tmp_path / "back")
    third = record(tmp_path / "back")
    assert third["source"] == first["source"] and third["method"] == "gptq"
    assert third["conversion"]["before"] == second["conversion"]
    digests = {r["conversion"]["digest"] for r in (second, third)} | {conversion["digest"]}
    assert len(digests) == 1


def test_what_was_measured_is_not_said_of_what_was_rounded(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(quantized(model("llama"), group=32, sym=False), source)
    measured = {"kl": 0.1, "kl_error": 0.01, "top1": 0.9, "sets": {}}
    made = record(source) | {"measured": measured}
    write_json(source / "quantkit.json", made)
    convert(str(source), "awq", tmp_path / "awq")
    assert record(tmp_path / "awq")["measured"] == measured
    assert record(tmp_path / "awq")["layers"] == made["layers"]
    convert(str(source), "gguf:q4_1", tmp_path / "gguf")
    found = record(tmp_path / "gguf")
    assert "measured" not in found
    assert {tuple(layer) for layer in found["layers"].values()} == {("digest",)}
    assert found["conversion"]["measured_before"] == measured
    assert found["source"] == made["source"]


def test_a_stranger_s_checkpoint_is_not_called_the_original(tmp_path):
    source = write(tmp_path / "source")
    convert(str(source), "awq", tmp_path / "out")
    found = record(tmp_path / "out")
    assert "source" not in found
    assert found["conversion"]["from"]["name"] == "source"
    with pytest.raises(UsageError, match="does not say where its original"):
        verify(str(tmp_path / "out"), rows=1, seqlen=16, samples=False)


def test_a_gguf_file_does_not_take_the_record_of_its_neighbour(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(quantized(), source)
    convert(str(write(tmp_path / "other")), "gguf:q4_0", tmp_path / "gguf")
    file = shutil.copy(the_file(tmp_path / "gguf"), source)
    convert(file, "gptq", tmp_path / "out")
    assert "source" not in record(tmp_path / "out")


@pytest.mark.parametrize("to", ["awq", "gguf:q4_0"])
def test_verify_finds_the_original_of_what_was_converted(tmp_path, to):
    few = {"rows": 1, "seqlen": 64, "samples": False, "dtype": "float32"}
    before = verify(str(quantized()), write=False, **few)
    convert(str(quantized()), to, tmp_path / "out")
    after = verify(str(tmp_path / "out"), **few)
    assert after.against == DEMO
    a, b = before.comparison.described(), after.comparison.described()
    assert a["kl"] == pytest.approx(b["kl"], rel=1e-4)


def test_verify_finds_the_original_of_a_plain_copy(tmp_path):
    convert(DEMO, "gguf:f32", tmp_path / "out")
    found = verify(str(tmp_path / "out"), rows=1, seqlen=64, samples=False, dtype="float32")
    assert found.against == DEMO
    assert found.comparison.described()["kl"] == pytest.approx(0, abs=1e-6)


def test_inspect_shows_where_it_comes_from(tmp_path):
    convert(str(quantized()), "awq", tmp_path / "out")
    found = inspect(str(tmp_path / "out"))
    assert (found.kind, found.method) == ("awq", "gptq")
    assert found.made_from == f"{quantized().name}, from {DEMO}"
    assert found.provenance["conversion"]["to"] == "awq"


# interruptions


class Killed(BaseException):
    """Nothing catches it."""


def content(folder: Path) -> dict[str, object]:
    """Every file's bytes; quantkit.json without the seconds that it took."""
    found: dict[str, object] = {path.name: path.read_bytes() for path in folder.iterdir()}
    made = record(folder)
    made["conversion"]["seconds"] = 0
    return found | {"quantkit.json": json.dumps(made)}


def kill_at(patch, owner, name, call, late=False):
    """The ``call``-th call of ``owner.name`` is the last thing that happens; with ``late`` after
    it has done its work."""
    original, calls = getattr(owner, name), []

    def killing(*arguments, **named):
        calls.append(name)
        if len(calls) < call:
            return original(*arguments, **named)
        if late:
            original(*arguments, **named)
        raise Killed

    patch.setattr(owner, name, killing)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(workflow, "_BATCH", 1 << 13)


INTERRUPTED = {"awq": ShardWriter, "gguf:q4_0": GgufWriter, "dense:f16": ShardWriter}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Conversions without any interruption."""
    found = {}
    source = quantized(model("gpt_neox"), group=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "_BATCH", 1 << 13)
        for to in INTERRUPTED:
            out = tmp_path_factory.mktemp("whole") / "out"
            convert(str(source), to, out, max_shard_size="100KB")
            found[to] = content(out)
    return found


def done(out):
    return list(read_json(out.with_name(out.name + ".partial") / "ledger.json")["done"])


@pytest.mark.parametrize("to", INTERRUPTED)
def test_killed_at_every_step_it_ends_with_the_same_bytes(tmp_path, whole, small_batches, to):
    """Twice in every batch: in the middle of writing it, and right behind its entry."""
    source, out = str(quantized(model("gpt_neox"), group=32)), tmp_path / "out"
    steps = 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, Ledger, "finish", 1)
            try:
                convert(source, to, out, max_shard_size="100KB")
                break
            except Killed:
                assert len(done(out)) == steps
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, Ledger, "finish", 1, late=True)
            with pytest.raises(Killed):
                convert(source, to, out, max_shard_size="100KB")
        steps += 1
        assert len(done(out)) == steps
        assert not out.exists()
    assert steps > 8
    assert content(out) == whole[to]
    assert clean(out)


def test_only_the_batch_that_was_begun_is_moved_twice(tmp_path, small_batches, monkeypatch):
    source, out = str(quantized(model("llama"), group=32)), tmp_path / "out"
    moved = []
    original = workflow._move_linear

    def counting(opened, target, name):
        moved.append(name)
        return original(opened, target, name)

    monkeypatch.setattr(workflow, "_move_linear", counting)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, Ledger, "finish", 5, late=True)
        with pytest.raises(Killed):
            convert(source, "awq", out)
    assert moved
    convert(source, "awq", out)
    linears = opened(source).linears
    assert set(moved) == set(linears)
    assert len(moved) <= len(linears) + 1  # while a batch goes to the disk the next is worked on


PLACES = [
    # owner, function, which call, behind it
    (None, "write", 3, False),
    (None, "write", 20, False),
    (None, "close", 1, False),
    (None, "close", 1, True),
    (Output, "copy_companions", 1, False),
    (Output, "copy_companions", 1, True),
    (checkpoint.os, "replace", 1, False),
    (checkpoint.os, "replace", 4, False),
    (workflow, "_compare", 1, False),
    (workflow, "_compare", 1, True),
    (workflow, "provenance_of", 1, False),
    (Output, "complete", 1, False),
]


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("to", INTERRUPTED)
def test_killed_anywhere_it_ends_with_the_same_bytes(tmp_path, whole, small_batches, to, place):
    source, out = str(quantized(model("gpt_neox"), group=32)), tmp_path / "out"
    owner, name, call, late = place
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, owner or INTERRUPTED[to], name, call, late)
        with pytest.raises(Killed):
            convert(source, to, out, max_shard_size="100KB")
    assert not out.exists()
    convert(source, to, out, max_shard_size="100KB")
    assert content(out) == whole[to]
    assert clean(out)


def test_files_that_went_away_are_written_again(tmp_path, whole, small_batches):
    source, out = str(quantized(model("gpt_neox"), group=32)), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, Ledger, "finish", 6)
        with pytest.raises(Killed):
            convert(source, "awq", out, max_shard_size="100KB")
    min((tmp_path / "out.partial").glob("*.safetensors")).unlink()
    convert(source, "awq", out, max_shard_size="100KB")
    assert content(out) == whole["awq"]


CHANGED = [
    ({"to": "compressed-tensors"}, "to was awq, is now compressed-tensors"),
    ({"lossy": True}, "lossy was False"),
    ({"max_shard_size": "1MB"}, "max_shard_size"),
    ({"pre_tokenizer": "qwen2"}, "pre_tokenizer"),
]


@pytest.mark.parametrize(("changes", "said"), CHANGED, ids=str)
def test_other_settings_do_not_go_on(tmp_path, changes, said):
    source, out = str(quantized(model("llama"), group=32)), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, workflow, "_compare", 1)
        with pytest.raises(Killed):
            convert(source, "awq", out)
    settings = {"to": "awq"} | changes
    with pytest.raises(UsageError, match=said):
        convert(source, out=out, **settings)
    assert len(done(out)) > 0
    convert(source, out=out, overwrite=True, **settings)  # starts over
    assert clean(out)
    assert record(out)["conversion"]["to"] == settings["to"]


def test_a_source_that_changed_does_not_go_on(tmp_path):
    source, out = write(tmp_path / "source"), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, workflow, "_compare", 1)
        with pytest.raises(Killed):
            convert(str(source), "awq", out)
    os.utime(source / WEIGHTS, ns=(1, 1))
    with pytest.raises(UsageError, match=r"source file model\.safetensors"):
        convert(str(source), "awq", out)


# the disk


@pytest.mark.parametrize("to", INTERRUPTED)
def test_a_full_disk_is_told_and_the_same_command_goes_on(
    tmp_path, whole, small_batches, capsys, to
):
    source, out = quantized(model("gpt_neox"), group=32), tmp_path / "out"
    options = ["--to", to, "-o", out, "--max-shard-size", "100KB"]
    writer = INTERRUPTED[to]
    original, calls = writer.write, []

    def full(self, *arguments):
        calls.append(1)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "write", full)
        assert command("convert", source, *options) == 1
    message, hint = sentence(capsys.readouterr().err)
    assert "the disk is full" in message and "run the same command again" in hint
    assert done(out)
    assert command("convert", source, *options) == 0
    assert content(out) == whole[to]


def test_too_little_room_is_told_beforehand(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(QuantkitError, match=r"the output needs .* are free"):
        convert(str(quantized()), "awq", tmp_path / "out")
    assert untouched(tmp_path / "out")


def test_what_exists_is_not_overwritten(tmp_path, capsys):
    source, out = quantized(model("llama"), group=32), tmp_path / "out"
    convert(str(source), "awq", out)
    before = content(out)
    assert command("convert", source, "--to", "gptq_v2", "-o", out) == 2
    assert "already exists" in sentence(capsys.readouterr().err)[0]
    assert content(out) == before
    assert command("convert", source, "--to", "gptq_v2", "-o", out, "--overwrite") == 0
    assert opened(out).format == "gptq" and record(out)["conversion"]["to"] == "gptq_v2"
    (out / "quantkit.json").unlink()
    capsys.readouterr()
    assert command("convert", source, "--to", "awq", "-o", out, "--overwrite") == 2
    assert "was not written by quantkit" in sentence(capsys.readouterr().err)[0]


def test_a_folder_is_not_converted_into_itself(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(quantized(model("llama"), group=32), source)
    with pytest.raises(UsageError, match="already exists"):
        convert(str(source), "awq", source)
    assert opened(source).format == "gptq"


@pytest.mark.parametrize("to", TARGETS)
def test_a_dry_run_writes_nothing(tmp_path, capsys, monkeypatch, to):
    monkeypatch.chdir(tmp_path)
    source = quantized()
    result = convert(str(source), to, dry_run=True)
    assert not result.written and result.linears == 28 and result.bytes > 1e6
    assert result.folder == Path(f"{source.name}-{to.replace(':', '-')}")
    assert command("convert", source, "--to", to, "--dry-run") == 0
    assert "28 quantized linears would take" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    written = convert(str(source), to)
    assert written.bytes == result.bytes and (tmp_path / result.folder / "quantkit.json").exists()


def test_a_dry_run_refuses_what_the_run_would(tmp_path):
    source = write(tmp_path / "source", bits=8)
    with pytest.raises(QuantkitError, match="at most 4"):
        convert(str(source), "awq", tmp_path / "out", dry_run=True)


# what was written is read back


def flipped(tensor):
    new = tensor.clone()
    raw = new.view(torch.uint8).reshape(-1)
    raw[len(raw) // 2] ^= 1
    return new


BROKEN = ["qweight", "scales", "qzeros"]


@pytest.mark.parametrize("suffix", BROKEN)
def test_a_linear_that_was_written_wrongly_is_found(tmp_path, monkeypatch, suffix, capsys):
    original = awq.pack

    def broken(q):
        packed = original(q)
        return packed | {suffix: flipped(packed[suffix])}

    monkeypatch.setattr(awq, "pack", broken)
    source, out = quantized(model("llama"), group=32), tmp_path / "out"
    assert command("convert", source, "--to", "awq", "-o", out) == 1
    assert "model.layers.0" in (message := sentence(capsys.readouterr().err)[0])
    assert "reads back differently" in message
    assert not out.exists()


@pytest.mark.parametrize("to", ["gguf:q4_0", "gguf:f16", "dense:f32", "compressed-tensors"])
@pytest.mark.parametrize("number", [0, 7, 20])
def test_a_tensor_that_was_written_wrongly_is_found(tmp_path, monkeypatch, to, number):
    writer = GgufWriter if to.startswith("gguf") else ShardWriter
    original, calls = writer.write, []

    def broken(self, name, tensor):
        calls.append(name)
        original(self, name, flipped(tensor) if len(calls) == number + 1 else tensor)

    monkeypatch.setattr(writer, "write", broken)
    with pytest.raises(QuantkitError, match=r"reads back differently|weight_shape|words a row"):
        convert(str(quantized(model("llama"), group=32)), to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_in_another_order_are_found(tmp_path, monkeypatch):
    """llama.cpp's order of rows is undone when the file is read."""
    original = gguf.pack
    monkeypatch.setattr(
        gguf, "pack", lambda q, kind: original(q.reordered(torch.arange(q.shape[0]).flip(0)), kind)
    )
    with pytest.raises(QuantkitError, match="reads back differently"):
        convert(str(quantized(model("llama"), group=32)), "gguf:q4_0", tmp_path / "out")


# the command line


def test_the_command_says_what_happened(tmp_path, capsys):
    source, out = quantized(), tmp_path / "out"
    assert command("convert", source, "--to", "awq", "-o", out) == 0
    printed = capsys.readouterr()
    assert f"every number is the same; digest {record(out)['conversion']['digest']}" in printed.out
    assert f"wrote {out}" in printed.out
    assert command("convert", source, "--to", "gptq", "-o", tmp_path / "quiet", "-q") == 0
    assert capsys.readouterr().out == ""


def test_names_of_targets_may_be_written_either_way(tmp_path):
    source = str(quantized(model("llama"), group=32))
    for index, to in enumerate(("compressed-tensors", "compressed_tensors", "AWQ", "GGUF:Q4_0")):
        assert convert(source, to, tmp_path / str(index)).exact
    assert convert_targets.parse("Compressed-Tensors") == ("compressed_tensors", None)
    assert convert_targets.parse("gguf:q4_0") == ("gguf", "q4_0")
    assert gptq.CONFIG_FILE in {p.name for p in Path(source).iterdir()}


def test_an_unknown_pre_tokenizer_is_named(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(quantized(model("llama"), group=32), source)
    tokenizer = read_json(source / "tokenizer.json")
    tokenizer["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "odd"},
        "behavior": "Isolated",
        "invert": False,
    }
    write_json(source / "tokenizer.json", tokenizer)
    with pytest.raises(QuantkitError) as caught:
        convert(str(source), "gguf:q4_0", tmp_path / "out")
    assert "--pre-tokenizer" in caught.value.hint
    assert untouched(tmp_path / "out")


def test_k_types_need_llama_cpp(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # as if it were not installed
    with pytest.raises(QuantkitError, match="llama-cpp-python is not installed") as caught:
        convert(str(quantized()), "gguf:q4_k_m", tmp_path / "out")
    assert "quantkit[llamacpp]" in caught.value.hint
    assert untouched(tmp_path / "out")


def test_tensors_move_without_transformers_in_memory(tmp_path):
    """It takes 180 MB; only the look at the finished folder needs it."""
    program = (
        "import sys\n"
        "from quantkit.workflows import convert\n"
        "seal = convert.legacy.add\n"  # the last call before that look
        "def noting(*args):\n"
        "    print('LOADED' if 'transformers.modeling_utils' in sys.modules else 'LIGHT')\n"
        "    return seal(*args)\n"
        "convert.legacy.add = noting\n"
        f"convert.convert({str(quantized())!r}, 'awq', {str(tmp_path / 'out')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LIGHT"]


# what a stranger found


@pytest.mark.parametrize(
    "wrong", [{"versions": 3}, {"source": 5}, {"source": {"name": 5}}, {"measured": [1]}]
)
def test_somebody_else_s_record_is_told_before_the_first_byte(tmp_path, wrong):
    folder = write(tmp_path / "model", "gptq")
    write_json(folder / "quantkit.json", wrong)
    with pytest.raises(QuantkitError, match=r"quantkit did not write") as caught:
        convert(str(folder), "gptq_v2", out=tmp_path / "out")
    assert "quantkit.json" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert inspect(str(folder)).kind == "gptq"  # which copes


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    folder = write(tmp_path / "model", "gptq")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for to in ("gptq_v2", "dense:f32", "dense:f16"):  # three times: nothing is left in the way
        convert(str(folder), to, out=tmp_path / "link", overwrite=True)
        assert (tmp_path / "link").is_symlink()
        assert record(tmp_path / "real")["conversion"]["to"] == to
        assert {p.name for p in tmp_path.iterdir()} == {"model", "real", "link"}
    (tmp_path / "nowhere").symlink_to("missing")
    with pytest.raises(UsageError, match="leads nowhere"):
        convert(str(folder), "gptq_v2", out=tmp_path / "nowhere")


def test_scales_alone_are_rounded_where_only_they_do_not_fit(tmp_path):
    folder = write(tmp_path / "model", "gptq")
    tensors = load_file(folder / WEIGHTS)
    scales = {n: t.float() * 1.0001 for n, t in tensors.items() if n.endswith(".scales")}
    save(tensors | scales, folder)
    result = convert(str(folder), "gptq", out=tmp_path / "out", lossy=True)
    after = load_file(tmp_path / "out" / WEIGHTS)
    for name, tensor in tensors.items():
        if name.endswith((".qweight", ".qzeros")):
            assert torch.equal(after[name], tensor)
    assert 0 < result.worst[1] < 1e-6


def test_linears_that_were_plain_are_counted(tmp_path, capsys):
    assert command("convert", DEMO, "--to", "gguf:q4_0", "--lossy", "--out", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "28 of 28 linears" in said.out + said.err
    assert "will be rounded to nearest" in said.out + said.err
    assert record(tmp_path / "out")["size"]["linears"] == 28


def test_a_name_of_a_pre_tokenizer(tmp_path):
    for wrong in ("", "Non Sense"):
        with pytest.raises(UsageError, match="no name of a pre-tokenizer"):
            convert(DEMO, "gguf:f16", out=tmp_path / "out", pre_tokenizer=wrong)
    found = convert(DEMO, "gguf:f16", out=tmp_path / "out", pre_tokenizer="a-new-one")
    assert any("a-new-one" in note for note in found.notes)
    found = convert(DEMO, "gguf:f16", out=tmp_path / "two", pre_tokenizer="refact")
    assert not any("refact" in note for note in found.notes)


def test_a_tensor_that_is_a_single_number_is_told(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model("llama"), folder)
    tensors = load_file(folder / WEIGHTS)
    save(tensors | {"model.norm.weight": torch.tensor(1.0)}, folder)
    with pytest.raises(QuantkitError, match=r"model\.norm\.weight is a single number"):
        convert(str(folder), "gguf:f16", out=tmp_path / "out")


def test_numbers_that_are_none_are_not_called_too_large(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model("llama"), folder)
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"].fill_(float("nan"))
    save({name: tensor.float() for name, tensor in tensors.items()}, folder)
    with pytest.raises(QuantkitError, match="NaN"):
        convert(str(folder), "dense:f16", out=tmp_path / "out")
