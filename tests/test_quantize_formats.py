"""``--format``: the same numbers in another layout, or a refusal before anything is written."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tools import QUICK, command, model, quantized, read_json, sentence

from quantkit.core.source import Source
from quantkit.errors import UsageError
from quantkit.methods import fit, gptq
from quantkit.runtime.opened import open_checkpoint
from quantkit.workflows.quantize import quantize


def opened(folder):
    return open_checkpoint(Source(folder.name, folder))


@pytest.mark.parametrize("sym", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("form", ["awq", "compressed-tensors"])
@pytest.mark.parametrize("name", ["gpt_neox", "phi"])
def test_every_format_holds_the_same_numbers(name, form, sym):
    settings = {"group": 64, "sym": sym}
    plain = opened(quantized(model(name), **settings))
    other = opened(quantized(model(name), **settings, format=form))
    assert (plain.format, other.format) == ("gptq", form.replace("-", "_"))
    assert list(plain.linears) == list(other.linears)
    for prefix in plain.linears:
        one, two = plain.qweight(prefix), other.qweight(prefix)
        assert one.identical(two)
        assert torch.equal(plain.dense.get(f"{prefix}.bias"), other.dense.get(f"{prefix}.bias"))


def test_one_group_is_no_row_and_zeros_in_the_middle_are_zeros(monkeypatch, tmp_path):
    """What a file reads back as is compared as what it was: shapes and numbers do not tell."""
    solve = gptq.solve

    def middling(weight, hessian, scheme, *others):
        found = solve(weight, hessian, replace(scheme, symmetric=True), *others)
        return replace(found, qweight=fit.with_zeros(found.qweight))

    monkeypatch.setattr(gptq, "solve", middling)
    for form in ("gptq", "gptq_v2", "awq", "compressed-tensors"):
        out = tmp_path / form
        quantize(str(model("gpt_neox")), out, **QUICK, group=64, sym=False, format=form)
        assert opened(out).linears


def test_awq_of_gpt_neox_has_scales_of_ones_for_its_activations():
    tensors = load_file(quantized(model("gpt_neox"), group=32, format="awq") / "model.safetensors")
    ones = [name for name in tensors if name.endswith("mlp.act.scales")]
    assert len(ones) == 2
    assert all(bool((tensors[name] == 1).all()) for name in ones)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"bits": 3, "format": "awq"}, "3 bits are not supported in the format awq"),
        ({"bits": 5}, "5 bits are not supported in the format gptq"),
        ({"act_order": "group", "format": "awq"}, "the format awq has no groups that follow"),
        ({"format": "compressed-tensors", "act_order": "group"}, "compressed-tensors has no"),
        ({"format": "gguf"}, "format 'gguf' is unknown"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_a_format_cannot_hold_is_refused_first(tmp_path, settings, told):
    with pytest.raises(UsageError, match=told):
        quantize(str(model("gpt_neox")), tmp_path / "out", **{**QUICK, "group": 32, **settings})
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses_with_exit_code_2(tmp_path, capsys):
    out = tmp_path / "out"
    assert command("gptq", model("gpt_neox"), "-b", 8, "--format", "awq", "--out", out) == 2
    message, hint = sentence(capsys.readouterr().err)
    assert message == "8 bits are not supported in the format awq"
    assert hint == "use 4"


def test_the_format_is_in_the_record():
    folder = quantized(model("gpt_neox"), group=32, format="awq")
    record = read_json(folder / "quantkit.json")
    assert (record["method"], record["settings"]["format"]) == ("gptq", "awq")
    assert not (folder / "quantize_config.json").exists()
