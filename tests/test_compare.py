"""Several models against one original: each as verify finds it, the original run once, ranked."""

import json

import pytest
from tools import command, model, quantized, sentence

from quantkit.core.metrics import shown as shown_with
from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime.walk import Walk
from quantkit.workflows.compare import compare
from quantkit.workflows.verify import verify

FEW = {"rows": 2, "seqlen": 48, "dtype": "float32", "samples": False}


def test_each_is_what_verify_finds_best_first():
    two, four = str(quantized(bits=3)), str(quantized())
    ranked = compare([two, four, "demo"], against="demo", **FEW).models
    assert [one.name for one in ranked] == ["demo", four, two]  # two folders of one name
    kls = [one.comparison.described()["kl"] for one in ranked]
    assert kls == sorted(kls) and kls[2] > 1.5 * kls[1]
    for one, folder in zip(ranked[1:], (four, two)):
        alone = verify(folder, write=False, **FEW).described()
        found = one.described() | {"model": alone["model"]}
        assert found["sets"] == alone["sets"]
        assert found["worst"] == alone["worst"]
        for name, layer in alone["layers"].items():
            assert found["layers"][name] == pytest.approx(layer, rel=1e-5)


def test_all_rows_go_through_the_original_once(monkeypatch):
    """For the layers of further models, only the rows that they are measured on."""
    folders = [str(quantized()), str(quantized(bits=3))]  # made before anything is counted
    embedded = []
    embed = Walk.embed

    def counting(self, batches):
        embedded.append(len(batches))
        return embed(self, batches)

    monkeypatch.setattr(Walk, "embed", counting)
    compare(folders, rows=4, seqlen=16, samples=False)
    assert embedded == [16, 4]


def test_the_command(capsys):
    options = ["--rows", 1, "--seqlen", 16, "--no-samples", "-q"]
    folders = [quantized(bits=3), quantized()]
    before = [(folder / "quantkit.json").read_bytes() for folder in folders]
    assert command("compare", *folders, *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["against"] == "demo"
    assert [one["model"] for one in found["models"]] == [str(folders[1]), str(folders[0])]
    assert command("compare", *folders, *options) == 0
    out = capsys.readouterr().out
    assert out.startswith("against demo\n")
    for one in found["models"]:
        shown = shown_with(one["kl"], one["kl_error"]), f"{one['size']['bits_per_weight']:.2f}"
        assert all(text in out for text in shown)
    worst = found["models"][1]["kl"]
    assert command("compare", *folders, *options, "--max-kl", worst * 0.9) == 3
    assert sentence(capsys.readouterr().err)[0].startswith(f"{folders[0]}: mean KL {worst:.4f} is")
    assert [(folder / "quantkit.json").read_bytes() for folder in folders] == before


def test_what_does_not_belong_is_refused():
    with pytest.raises(UsageError, match="nothing to compare"):
        compare([])
    with pytest.raises(QuantkitError, match="was not made from"):
        compare([str(model("gpt_neox"))], against="demo", **FEW)
