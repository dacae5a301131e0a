"""``quantkit gptq --lm-head``: the output head as one more part behind the blocks."""

import json
import shutil

import pytest
import tiny
import torch
from tools import QUICK, command, model, read_json, sentence

from quantkit.core.metrics import Comparison
from quantkit.core.qweight import Scheme
from quantkit.core.source import Source
from quantkit.errors import UsageError
from quantkit.runtime.load import load
from quantkit.runtime.opened import open_checkpoint
from quantkit.workflows import head as heading
from quantkit.workflows import quantize as whole
from quantkit.workflows import stored
from quantkit.workflows.check import held_out
from quantkit.workflows.convert import convert
from quantkit.workflows.inspect import inspect
from quantkit.workflows.quantize import quantize

SETTINGS = {
    **QUICK,
    "group": 32,
    "dtype": "float32",
    "device": "cpu",
    "tokens_per_input": 10**6,
    "lm_head": True,
}
HEADS = {"llama": "lm_head", "gpt_neox": "embed_out", "phi": "lm_head"}


def opened(folder):
    return open_checkpoint(Source(folder.name, folder))


def head_of(folder, name):
    return opened(folder).qweight(name)


def inputs(source, report):
    """What transformers' own model gives its head for the calibration rows: [tokens, width]."""
    reference, seen = tiny.reference(source), []
    head = reference.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for row in report.calibration.rows:
            reference(torch.tensor([row]))
    return torch.cat([one[0] for one in seen])


def error(source, report, name):
    """The head's error on the calibration rows."""
    weight = tiny.reference(source).get_output_embeddings().weight.detach()
    x = inputs(source, report)
    lost = x @ (weight - head_of(report.folder, name).dequantize()).T
    return float(lost.square().sum() / (x @ weight.T).square().sum())


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Llama and GPT-NeoX with their heads quantized, measured along the way."""
    folder = tmp_path_factory.mktemp("lm_head")
    return {
        name: quantize(str(model(name)), folder / name, **{**SETTINGS, "check": True})
        for name in ("llama", "gpt_neox")
    }


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_the_report_has_the_heads_error(reports, name):
    found = reports[name].layers[HEADS[name]]
    assert found["method"] == "gptq"
    assert found["error"] == pytest.approx(error(model(name), reports[name], HEADS[name]), rel=1e-3)
    record = read_json(reports[name].folder / "quantkit.json")
    assert record["settings"]["lm_head"] is True
    assert record["layers"][HEADS[name]] == found


def test_it_is_better_than_rounding_to_nearest(reports, tmp_path):
    rule = "lm_head: method=rtn"
    plain = quantize(str(model("llama")), tmp_path / "out", **SETTINGS, rule=rule)
    assert plain.layers["lm_head"]["method"] == "rtn"
    assert reports["llama"].layers["lm_head"]["error"] < 0.9 * plain.layers["lm_head"]["error"]


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_logits_are_those_of_the_dequantized_head(reports, name):
    folder = reports[name].folder
    loaded, _ = load(str(folder), device="cpu", dtype="float32")
    weight, seen = head_of(folder, HEADS[name]).dequantize(), []
    head = loaded.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        logits = loaded(torch.tensor([[5, 6, 7]])).logits
    assert torch.equal(head.weight, weight)
    assert torch.allclose(logits, seen[0] @ weight.T, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_what_rides_along_goes_through_the_quantized_head(reports, name):
    quantized, tokenizer = load(str(reports[name].folder), device="cpu", dtype="float32")
    original, comparison = tiny.reference(model(name)), Comparison()
    with torch.no_grad():
        for label, rows in held_out(tokenizer, tokens=64).items():
            for row in rows:
                ids = torch.tensor([row])
                pair = [one(ids).logits[0] for one in (original, quantized)]
                comparison.add(label, ids[0], *pair)
    found = reports[name].measured.described()["kl"]
    assert found == pytest.approx(comparison.described()["kl"], rel=0.01)


def test_a_bias_takes_up_the_mean_error(tmp_path):
    report = quantize(str(model("phi")), tmp_path / "out", **SETTINGS, format="awq")
    head = tiny.reference(model("phi")).get_output_embeddings().requires_grad_(False)
    quantized, _ = load(str(report.folder), device="cpu", dtype="float32")
    rounded = quantized.get_output_embeddings().requires_grad_(False)
    x = inputs(model("phi"), report)
    off = (head(x) - rounded(x)).mean(0)
    uncorrected = off + rounded.bias - head.bias
    assert off.norm() < 0.01 * uncorrected.norm()


def test_pieces_of_the_rows_give_what_all_rows_together_give(reports, monkeypatch, tmp_path):
    monkeypatch.setattr(heading, "_ROWS", 3000)
    report = quantize(str(model("llama")), tmp_path / "out", **SETTINGS)
    pair = [head_of(one.folder, "lm_head") for one in (report, reports["llama"])]
    assert float((pair[0].codes != pair[1].codes).float().mean()) < 1e-3
    errors = [one.layers["lm_head"]["error"] for one in (report, reports["llama"])]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_every_format_says_that_the_head_is_quantized(reports, tmp_path):
    said = {}
    for form in ("gptq_v2", "compressed-tensors", "awq"):
        out = tmp_path / form
        quantize(str(model("gpt_neox")), out, **SETTINGS, format=form)
        said[form] = read_json(out / "config.json")["quantization_config"]
        assert head_of(out, "embed_out").identical(head_of(reports["gpt_neox"].folder, "embed_out"))
    assert said["gptq_v2"]["lm_head"] is True
    assert said["compressed-tensors"]["ignore"] == []
    assert said["awq"]["lm_head"] is True and said["awq"]["modules_to_not_convert"] is None


class Killed(BaseException):
    """Nothing catches it."""


def die(*arguments, **options):
    raise Killed


def test_a_killed_run_goes_on_at_the_head(reports, monkeypatch, tmp_path):
    """Killed before the head is solved, while it is written, and when it is finished."""
    out, settings = tmp_path / "out", {**SETTINGS, "check": True}
    solved, solve = [], heading.solve
    for module, name in [(heading, "solve"), (stored, "write_linear"), (whole.seal, "seal")]:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            if name == "seal":
                patch.setattr(heading, "solve", lambda *a: solved.append("once") or solve(*a))
            patch.setattr(module, name, die)
            quantize(str(model("llama")), out, **settings)
    monkeypatch.setattr(heading, "solve", lambda *a: solved.append("again") or solve(*a))
    report = quantize(str(model("llama")), out, **settings)
    assert solved == ["once"]
    before = reports["llama"]
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (before.folder / file).read_bytes()
    assert report.layers == before.layers
    assert report.measured.described() == before.measured.described()


@pytest.mark.parametrize(
    ("name", "changes", "settings", "words"),
    [
        ("llama_tied", {}, {}, "tied to the embedding"),
        ("gpt2", {}, {}, "tied to the embedding"),
        ("llama", {"vocab_size": 8196}, {}, "the output head cannot be packed"),
        ("llama", {}, {"rule": "lm_head: group=128"}, "does not divide the input widths 64"),
        ("llama", {}, {"rule": "lm_head: bits=8", "format": "awq"}, "lm_head cannot have 8 bits"),
    ],
)
def test_heads_that_are_refused(name, changes, settings, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        quantize(str(model(name, **changes)), tmp_path / "out", **SETTINGS, **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_stored_copy_of_a_tied_head_is_refused_too(tmp_path):
    source = shutil.copytree(model("llama"), tmp_path / "model")
    config = read_json(source / "config.json") | {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="tied to the embedding"):
        quantize(str(source), tmp_path / "out", **SETTINGS)


def test_the_command_refuses_in_a_sentence(capsys, tmp_path):
    assert command("gptq", "demo", "--lm-head", "--out", tmp_path / "out") == 2
    assert sentence(capsys.readouterr().err) == (
        "the output head of demo is tied to the embedding, which has to stay as it is",
        "leave out --lm-head",
    )


def test_rules_speak_of_the_head_where_it_is_asked_for(tmp_path):
    source = str(model("gpt_neox"))
    out = tmp_path / "eight"
    quantize(source, out, **SETTINGS, rule=["lm_head: bits=8,group=16"])
    assert head_of(out, "embed_out").scheme == Scheme(8, 16)
    out = tmp_path / "none"
    quantize(source, out, **SETTINGS, rule=["lm_head: skip"])
    assert "embed_out.weight" in opened(out).tensors
    assert read_json(out / "config.json")["quantization_config"]["lm_head"] is False
    with pytest.raises(UsageError, match="matches no linear"):
        settings = {**SETTINGS, "lm_head": False}
        quantize(source, tmp_path / "off", **settings, rule=["lm_head: bits=8"])


def test_a_budget_counts_the_head_and_leaves_its_scheme(tmp_path):
    settings = {**SETTINGS, "dry_run": True, "target_bits": 4.9}
    report = quantize(str(model("llama")), tmp_path / "out", **settings)
    assert report.plan.layout.head.scheme == Scheme(4, 32)
    assert report.plan.bits_per_weight <= 4.9


def test_inspect_and_convert_tell(reports, tmp_path):
    found = inspect(str(reports["llama"].folder))
    assert found.head == "quantized" and found.errors == 0
    (verdict,) = [one for one in found.targets if one.target == "transformers"]
    assert not verdict.loads and "GPTQModel.load" in verdict.reasons[0]
    (verdict,) = [
        one
        for one in inspect(str(reports["gpt_neox"].folder)).targets
        if one.target == "transformers"
    ]
    assert not verdict.loads and "GPTQModel.load" not in verdict.reasons[0]
    done = convert(str(reports["llama"].folder), "awq", tmp_path / "awq")
    assert done.notes == ["quantized outside of the blocks, written as plain tensors: lm_head"]
    dense = opened(tmp_path / "awq").dense.get("lm_head.weight")
    assert torch.equal(dense, head_of(reports["llama"].folder, "lm_head").dequantize())
    assert convert(str(reports["llama"].folder), "dense", tmp_path / "dense").notes == []
