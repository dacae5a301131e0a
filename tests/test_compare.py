"""Several models against one original: each as verify finds it, the original run once, ranked."""

import json

import pytest
from tools import command, model, quantized, sentence

from quantkit.core.metrics import shown as shown_with
from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime.skeleton import Skeleton
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


def test_every_block_of_the_original_is_read_once(monkeypatch):
    """Whatever the number of models, of which each block is read once too."""
    folders = [str(quantized()), str(quantized(bits=3))]  # made before anything is counted
    read = []
    fill = Skeleton.fill

    def counting(self, prefixes):
        wanted = list(prefixes)
        read.extend((self.source.name, name) for name in wanted if ".layers." in name)
        fill(self, wanted)

    monkeypatch.setattr(Skeleton, "fill", counting)
    compare(folders, rows=4, seqlen=16, samples=False)
    first, *others = (read.count(("demo", f"model.layers.{i}")) for i in range(4))
    assert (first, others) == (2, [1, 1, 1])  # the first one also tells what blocks return
    assert len(read) == 3 * 5


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
    with pytest.raises(QuantkitError, match="no folder nowhere/x"):
        compare("nowhere/x")  # not n, o, w, ...
    with pytest.raises(QuantkitError, match="was not made from"):
        compare([str(model("gpt_neox"))], against="demo", **FEW)
