"""``quantkit awq``: the scaled model is the same model, and the result is what was asked for."""

import pytest
import torch
from safetensors.torch import load_file
from test_resume import Killed, assert_only, assert_same, content, kill_at
from tools import QUICK, command, model, read_json, sentence

import quantkit
from quantkit.core.checkpoint import ShardWriter
from quantkit.core.ledger import Ledger
from quantkit.core.progress import Progress
from quantkit.core.source import Source
from quantkit.errors import QuantkitError, UsageError
from quantkit.methods import awq as mathematics
from quantkit.runtime.opened import open_checkpoint
from quantkit.workflows.awq import quantize_awq
from quantkit.workflows.verify import verify

FEW = {key: value for key, value in QUICK.items() if key != "fast"}
SMALL = {**FEW, "group": 32, "calib_seqlen": 32}


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch):
    monkeypatch.setattr(mathematics, "EXPONENTS", (0.0, 0.5))


def logits(folder):
    loaded, _ = quantkit.load(str(folder), dtype="float32")
    with torch.no_grad():
        return loaded(torch.arange(5, 60)[None]).logits


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "gemma", "gpt2", "opt"])
def test_every_scale_is_folded_right(name, tmp_path, monkeypatch):
    """With 8 bits hardly anything is lost, however wild the scales: and they all are folded."""
    monkeypatch.setattr("quantkit.workflows.scaling.improves", lambda *_: (True, 0.5))

    def wild(weight, hessian, source, rounding, stored):
        noise = torch.rand(int(source.max()) + 1, generator=torch.Generator().manual_seed(1))
        scale = stored((noise[source] * 2 - 1).exp())
        return mathematics.Choice(scale, 0.5, 0.5, 0.5)

    monkeypatch.setattr(mathematics, "choose", wild)
    out = tmp_path / "out"
    report = quantize_awq(str(model(name)), out, bits=8, refine="none", dtype="float32", **SMALL)
    assert report.pairs() and all(
        line.startswith(("scaled in 2 of 2", "scaled in 3 of 3")) for line in report.pairs()
    )
    wanted, got = logits(model(name)), logits(out)
    assert (wanted - got).norm() < 0.1 * wanted.norm()  # 8 bits alone: half of that
    before, after = (load_file(f / "model.safetensors") for f in (model(name), out))
    norms = [n for n in after if n in before and not torch.equal(after[n], before[n].half())]
    assert norms  # scales have gone into them
    small = {"rows": 1, "seqlen": 32, "samples": False, "write": False, "dtype": "float32"}
    layers = verify(str(out), against=str(model(name)), **small).layers
    assert len(layers) == len(report.layers)  # in the units of the original
    assert all(layer["error"] < 0.001 and abs(layer["offset"]) < 0.2 for layer in layers.values())


def test_the_file_is_awq_and_says_so(tmp_path):
    out = tmp_path / "out"
    report = quantize_awq(str(model("gpt_neox")), out, **SMALL)
    said = read_json(out / "config.json")["quantization_config"]
    assert (said["quant_method"], said["bits"], said["group_size"]) == ("awq", 4, 32)
    record = read_json(out / "quantkit.json")
    assert record["method"] == "awq"
    settings = record["settings"]
    assert (settings["refine"], settings["format"], settings["sym"]) == ("gptq", "awq", False)
    tensors = load_file(out / "model.safetensors")
    assert bool((tensors["gpt_neox.layers.0.mlp.act.scales"] == 1).all())
    told = [layer for layer in report.layers.values() if "pair" in layer]
    assert len(told) == 2 * 3  # in each block all but the one behind the GELU
    assert all(layer["scaled"] == (layer.get("block_loss", 1.0) < 1) for layer in told)
    opened = open_checkpoint(Source("out", out))
    assert (
        opened.format == "awq" and not opened.linears[next(iter(opened.linears))].scheme.symmetric
    )
    assert "AWQ 4-bit" in (out / "README.md").read_text("utf-8")


@pytest.mark.parametrize("refine", ["gptq", "none"])
def test_killed_at_every_block(tmp_path, refine):
    """In the middle of writing one, and behind it: norms that were folded are put back too."""
    source, settings = str(model("llama")), {**SMALL, "refine": refine, "max_shard_size": "1MB"}
    quantize_awq(source, tmp_path / "whole" / "out", **settings)
    expected = content(tmp_path / "whole" / "out")
    out = tmp_path / "killed" / "out"
    for owner, name, call in (
        (Ledger, "finish", 2),
        (ShardWriter, "write", 12),
        (Ledger, "finish", 1),
        (ShardWriter, "sync", 1),
    ):
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, owner, name, call, late=name == "finish")
            with pytest.raises(Killed):
                quantize_awq(source, out, **settings)
    done = read_json(tmp_path / "killed" / "out.partial" / "ledger.json")["done"]
    assert any(part.get("others") for part in done.values())
    quantize_awq(source, out, **settings)
    assert_same(out, expected)
    assert_only(out)


def test_eight_bits_go_into_gptq_s_files(tmp_path):
    for sym, form in ((False, "gptq_v2"), (True, "gptq")):
        out = tmp_path / form
        quantize_awq(str(model("gpt_neox")), out, bits=8, sym=sym, **SMALL)
        assert read_json(out / "config.json")["quantization_config"]["checkpoint_format"] == form


def test_what_makes_no_sense_is_refused(tmp_path, capsys):
    source, out = str(model("gpt_neox")), tmp_path / "out"
    with pytest.raises(UsageError, match="align has no meaning"):
        quantize_awq(source, out, refine="none", align=0.5)
    with pytest.raises(UsageError, match="refine 'more' is unknown"):
        quantize_awq(source, out, refine="more")
    with pytest.raises(QuantkitError, match="already quantized"):
        quantize_awq(source, out, **SMALL)
        quantize_awq(str(out), tmp_path / "again", **SMALL)
    assert command("awq", source, "-b", 3, "--format", "awq", "-o", tmp_path / "x") == 2
    assert sentence(capsys.readouterr().err)[0] == "3 bits are not supported in the format awq"


def test_the_command_tells_which_pairs_it_kept(tmp_path, capsys):
    out = tmp_path / "out"
    options = ["-c", "bundled:en=2", "--calib-seqlen", 32, "--no-check", "-g", 32, "-o", out]
    assert command("awq", model("gpt_neox"), *options) == 0
    shown = capsys.readouterr().out
    assert "of 2 blocks: input_layernorm -> query_key_value" in shown
    assert "of 2 blocks: query_key_value -> dense" in shown
    assert command("inspect", out) == 0


def test_a_model_with_nothing_to_scale_is_told(tmp_path, monkeypatch):
    heard = []

    class Listening(Progress):
        def warn(self, text):
            heard.append(text)

    monkeypatch.setattr("quantkit.runtime.folding.find", lambda *_: [])
    report = quantize_awq(str(model("gpt_neox")), tmp_path / "out", progress=Listening(), **SMALL)
    assert report.pairs() == []
    assert any("nothing in this architecture could be scaled" in text for text in heard)
