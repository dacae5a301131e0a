"""quantkit bnb: the bytes that bitsandbytes would have written.

The files golden/bnb/exact-* hold weights chosen to show every difference in rounding, and what
bitsandbytes made of them; tests/test_referees.py compares whole checkpoints.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tools import command, model, read_json, sentence

from quantkit.core.checkpoint import Checkpoint
from quantkit.core.qweight import Scheme
from quantkit.core.source import resolve
from quantkit.errors import QuantkitError, UsageError
from quantkit.formats import bnb
from quantkit.methods import nf4
from quantkit.runtime.load import load
from quantkit.runtime.opened import open_checkpoint
from quantkit.workflows import bnb as workflow
from quantkit.workflows.bnb import quantize_bnb

GOLDEN = Path(__file__).parent / "golden" / "bnb"


@pytest.mark.parametrize("name", ["nf4", "nf4-nested", "fp4-nested", "int8"])
def test_every_byte_is_that_of_bitsandbytes(name):
    held = load_file(GOLDEN / f"exact-{name}.safetensors")
    kind, _, nested = name.partition("-")
    weight = held.pop("original")
    rounding = workflow._round(weight, workflow._SCHEMES[kind], bool(nested))
    made = bnb.pack(rounding.qweight, rounding.nested, weight.dtype)
    made.pop("weight_format", None)  # written by the layer and not by the function
    assert made.keys() == {key.removeprefix("x.") for key in held}
    for suffix, tensor in made.items():
        wanted = held[f"x.{suffix}"]
        assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted), suffix


def test_the_offset_is_known_without_quantizing():
    weight = load_file(GOLDEN / "exact-nf4-nested.safetensors")["original"]
    scheme = Scheme(4, 64, True, "nf4")
    assert nf4.offset(weight, scheme) == nf4.nest(nf4.quantize(weight, scheme).scale).offset


def test_equal_scales_are_nested_too():
    nested = nf4.nest(torch.full((3, 100), 0.25))
    assert nested.offset == 0.25 and torch.equal(nested.dequantize(), torch.full((300,), 0.25))
    assert int(nested.codes.max()) == 0  # as bitsandbytes has it


def test_too_large_for_float16():
    with pytest.raises(QuantkitError, match="float16"):
        nf4.quantize_int8(torch.full((2, 64), 1e6))


@pytest.mark.parametrize("kind, double", [("nf4", True), ("fp4", False), ("int8", None)])
def test_a_checkpoint_is_written(kind, double, tmp_path):
    source, out = model("gpt_neox"), tmp_path / "out"
    result = quantize_bnb(str(source), out, type=kind, double_quant=double)
    opened = open_checkpoint(resolve(str(out)))
    assert opened.format == "bnb" and len(opened.linears) == 8 and result.exact
    plain = Checkpoint(source)
    for prefix in opened.linears:
        weight = plain.get(f"{prefix}.weight")
        rounding = workflow._round(weight, workflow._SCHEMES[kind], double)
        assert opened.qweight(prefix).identical(rounding.qweight)
    for name in opened.dense:  # in their own dtype, biases too
        assert torch.equal(opened.dense.get(name), plain.get(name))
    config = read_json(out / "config.json")["quantization_config"]
    assert config["load_in_4bit"] == (kind != "int8")
    assert config["bnb_4bit_use_double_quant"] == (bool(double) and kind != "int8")
    assert config["llm_int8_skip_modules"] is None  # transformers finds the head by itself
    record = read_json(out / "quantkit.json")
    assert record["method"] == "bnb" and record["settings"]["type"] == kind
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        ours, original = (
            load(str(f), device="cpu", dtype="float32")[0](ids).logits for f in (out, source)
        )
    assert 0 < float((ours - original).norm() / original.norm()) < 0.5


def test_compute_dtype(tmp_path):
    for given, wanted in (("auto", "bfloat16"), ("fp16", "float16")):
        quantize_bnb("demo", tmp_path / given, compute_dtype=given)  # it is stored in bfloat16
        config = read_json(tmp_path / given / "config.json")["quantization_config"]
        assert config["bnb_4bit_compute_dtype"] == wanted


def test_transposed_weights(tmp_path):
    source = model("gpt2")
    quantize_bnb(str(source), tmp_path / "out", double_quant=False)
    name = "transformer.h.0.mlp.c_fc"
    found = open_checkpoint(resolve(str(tmp_path / "out"))).qweight(name)
    weight = Checkpoint(source).get(f"{name}.weight").T.contiguous()
    assert found.identical(nf4.quantize(weight, Scheme(4, 64, True, "nf4")))


def test_refusals(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="no type"):
        quantize_bnb("demo", out, type="nf5")
    with pytest.raises(UsageError, match="no compute dtype"):
        quantize_bnb("demo", out, compute_dtype="int8")
    narrow = str(model("llama", intermediate_size=96))
    with pytest.raises(QuantkitError, match=r"down_proj cannot be held: blocks of 64"):
        quantize_bnb(narrow, out)
    quantize_bnb(narrow, tmp_path / "int8", type="int8")
    with pytest.raises(QuantkitError, match="already quantized"):
        quantize_bnb(str(tmp_path / "int8"), out)
    assert not list(tmp_path.glob("out*"))


def test_on_the_command_line(tmp_path, capsys):
    out = tmp_path / "out"
    assert command("bnb", "demo", "-o", out, "--no-double-quant", "--compute-dtype", "fp16") == 0
    assert "28 linears: relative error" in capsys.readouterr().out
    assert command("generate", out, "The", "-n", 2, "-q") == 0
    assert command("bnb", out, "-o", tmp_path / "other") == 1
    capsys_error = sentence(capsys.readouterr().err)[0]
    assert "already quantized (bnb)" in capsys_error
