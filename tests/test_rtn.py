"""quantkit rtn: every weight to the nearest level, in every format, by the machinery of convert."""

import json

import pytest
import tiny
import torch
from tools import command, model, read_json, sentence

from quantkit.core.checkpoint import Checkpoint
from quantkit.core.qweight import Scheme
from quantkit.core.source import resolve
from quantkit.errors import QuantkitError, UsageError
from quantkit.methods import rtn
from quantkit.runtime.opened import open_checkpoint
from quantkit.workflows import convert as converting
from quantkit.workflows.rtn import quantize_rtn


def quantized(source, tmp_path, **options):
    out = tmp_path / "out"
    result = quantize_rtn(str(source), out, **options)
    return result, open_checkpoint(resolve(str(out)))


# the mathematics, against loops


def naive(weight, bits, group):
    """The largest weight of a group is the lowest level, in float64 but for the stored scale."""
    found = torch.empty_like(weight)
    half = 2 ** (bits - 1)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            part = weight[row, start : start + group]
            largest = max(part.tolist(), key=abs)
            scale = float(torch.tensor(largest / -half).half())
            for k, w in enumerate(part.tolist()):
                level = min(max(round(w / scale), -half), half - 1)
                found[row, start + k] = level * scale
    return found


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_signed_scales_are_those_of_the_largest_weight(bits):
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(bits))
    q = rtn.quantize(weight, Scheme(bits, 32), signed=True)
    assert torch.allclose(q.dequantize(), naive(weight, bits, 32), atol=1e-6)
    even = rtn.quantize(weight, Scheme(bits, 32)).dequantize()
    assert (q.dequantize() - weight).square().sum() < (even - weight).square().sum()


def test_minimums_are_counted_from_as_they_are_stored():
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) + 3
    q = rtn.quantize(weight, Scheme(4, 32, False), offset="minimum")
    assert q.zero is None and q.minimum is not None and q.minimum.dtype == torch.float16
    step = q.scale.float()[:, q.group_index()]
    assert float(((q.dequantize() - weight).abs() / step).max()) < 0.52


def test_slices_of_rows_make_no_difference(monkeypatch):
    weight = torch.randn(7, 64)
    for scheme, offset in ((Scheme(4, 32), "zero"), (Scheme(4, 32, False), "minimum")):
        whole = rtn.quantize(weight, scheme, offset=offset)
        monkeypatch.setattr(rtn, "_AT_ONCE", 128)
        assert rtn.quantize(weight, scheme, offset=offset).identical(whole)
        monkeypatch.undo()


# the command


@pytest.mark.parametrize(
    "format, options",
    [
        ("auto", {}),
        ("auto", {"sym": False, "bits": 3}),
        ("gptq", {"sym": False, "bits": 2}),
        ("awq", {}),
        ("compressed-tensors", {"bits": 8, "group": -1}),
        ("mlx", {}),
        ("gguf:q4_0", {"group": None}),
        ("gguf:q4_1", {"group": None}),
        ("gguf:q5_0", {"group": None}),
        ("gguf:q5_1", {"group": None}),
        ("gguf:q8_0", {"group": None}),
    ],
)
def test_every_format_holds_what_was_rounded(format, options, tmp_path):
    source = model("llama")
    result, opened = quantized(source, tmp_path, **{"group": 32, "format": format, **options})
    assert result.written and result.exact and len(opened.linears) == 21
    plain = Checkpoint(source)
    for prefix in list(opened.linears)[:4]:
        q = opened.qweight(prefix)
        weight = plain.get(f"{prefix}.weight")
        lost = (q.dequantize() - weight).square().sum() / weight.square().sum()
        assert float(lost) == pytest.approx(result.layers[prefix], rel=1e-4)
        assert float(lost) < {2: 0.3, 3: 0.06}.get(q.scheme.bits, 0.02)
    if (tmp_path / "out" / "config.json").exists():
        dtypes = {opened.dense.spec(name).dtype for name in opened.dense}
        assert dtypes == {torch.float16}  # float32 is halved


def test_quantkit_json_tells_what_was_done(tmp_path):
    result, _ = quantized("demo", tmp_path)
    record = read_json(tmp_path / "out" / "quantkit.json")
    assert record["method"] == "rtn" and "conversion" not in record
    assert record["settings"] == {"bits": 4, "group": 128, "sym": True, "format": "gptq"}
    assert record["source"]["name"] == "demo" and "model.safetensors" in record["source"]["files"]
    assert record["layers"].keys() == result.layers.keys() and len(result.layers) == 28
    assert record["digest"] == result.digest


def test_transposed_weights(tmp_path):
    """GPT-2 keeps its linears the other way round."""
    source = model("gpt2")
    _, opened = quantized(source, tmp_path, group=32)
    name = "transformer.h.0.attn.c_attn"
    weight = Checkpoint(source).get(f"{name}.weight").T.contiguous()
    assert opened.qweight(name).identical(rtn.quantize(weight, Scheme(4, 32), signed=True))


def test_the_same_bytes_after_a_kill(tmp_path, monkeypatch):
    source = model("llama")
    quantize_rtn(str(source), tmp_path / "whole", group=32)
    one_by_one = lambda sizes: iter([{name: sizes[name]} for name in sizes])  # noqa: E731
    monkeypatch.setattr(converting, "_batches", one_by_one)
    calls = []
    move = converting._move_linear

    def dying(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return move(*arguments)

    monkeypatch.setattr(converting, "_move_linear", dying)
    with pytest.raises(KeyboardInterrupt):
        quantize_rtn(str(source), tmp_path / "killed", group=32)
    monkeypatch.setattr(converting, "_move_linear", move)
    result = quantize_rtn(str(source), tmp_path / "killed", group=32)
    assert len(result.layers) == 21
    whole, killed = (tmp_path / n / "model.safetensors" for n in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()


def test_refusals(tmp_path):
    source, out = str(model("llama")), tmp_path / "out"
    for options, words in (
        ({"format": "gguf:q4_k_m"}, "rounded integers"),
        ({"format": "dense"}, "rounded integers"),
        ({"format": "zip"}, "no format"),
        ({"format": "awq", "bits": 3}, "no codes of 3 bits"),
        ({"format": "gguf:q4_0", "group": 64}, "no groups of 64"),
        ({"format": "gguf:q4_1", "sym": True}, "asymmetric"),
        ({"pre_tokenizer": "llama-bpe"}, "for GGUF files, and gptq is none"),
    ):
        with pytest.raises(UsageError, match=words):
            quantize_rtn(source, out, **options)
    with pytest.raises(UsageError, match="does not divide"):
        quantize_rtn(source, out, group=96)
    quantize_rtn(source, tmp_path / "once", group=32)
    with pytest.raises(QuantkitError, match="already quantized"):
        quantize_rtn(str(tmp_path / "once"), out)
    assert not list(tmp_path.glob("out*"))


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    folder = tiny.build("llama", tmp_path / "nan", tokenizer=True)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantkitError, match=r"layers\.1\.mlp\.up_proj.weight holds"):
        quantize_rtn(str(folder), tmp_path / "out", group=32)
    assert not (tmp_path / "out").exists()


def test_on_the_command_line(tmp_path, capsys):
    out = tmp_path / "out"
    assert command("rtn", "demo", "--format", "awq", "-o", out) == 0
    printed = capsys.readouterr().out
    assert "28 linears: relative error of the weights" in printed and "quantkit verify" in printed
    assert json.loads((out / "config.json").read_text())["quantization_config"]["bits"] == 4
    assert command("rtn", "demo", "--bits", 7, "-o", tmp_path / "other") == 2
    assert "7 bits" in sentence(capsys.readouterr().err)[0]
    assert command("rtn", "demo", "--dry-run", "-o", tmp_path / "other") == 0
    assert not (tmp_path / "other").exists()
