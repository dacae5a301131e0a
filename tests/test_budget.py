"""Bits under a budget: bytes go where they save most, what is measured is what it costs, and a run
that was interrupted does not measure again."""

import itertools
import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tools import QUICK, command, model, quantized, read_json, sentence

from quantkit.core.metrics import Comparison
from quantkit.core.qweight import Scheme
from quantkit.core.source import Source
from quantkit.errors import QuantkitError, UsageError
from quantkit.methods import gptq, rtn
from quantkit.methods.allocate import Option, allocate, hull
from quantkit.runtime.opened import open_checkpoint
from quantkit.workflows import budget, sensitivity, stored
from quantkit.workflows.quantize import quantize

# the allocation


def random_parts(seed, parts=4, options=5):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 40, (parts, options), generator=generator).tolist()
    losses = torch.rand(parts, options, generator=generator).tolist()
    return [[Option(*one) for one in zip(*part)] for part in zip(sizes, losses)]


def totals(parts, picked):
    chosen = [part[i] for part, i in zip(parts, picked)]
    return sum(c.nbytes for c in chosen), sum(c.loss for c in chosen)


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_of_that_size_loses_less(seed):
    """Against all choices, on the sizes that steps along the hulls reach."""
    parts = random_parts(seed)
    best = {}
    for picked in itertools.product(*(range(len(part)) for part in parts)):
        size, loss = totals(parts, picked)
        best[size] = min(loss, best.get(size, 9.0))
    for budget_ in range(0, 161, 3):
        picked = allocate(parts, budget_)
        least = min(size for size in best)
        if budget_ < least:
            assert picked is None
            continue
        spent, loss = totals(parts, picked)
        assert spent <= budget_
        # greedy is only off by the step that did not fit
        largest = max(max(p).loss for p in [[Option(0, o.loss) for o in part] for part in parts])
        assert loss <= min(best[size] for size in best if size <= budget_) + largest
    everything = allocate(parts, 10**9)
    assert totals(parts, everything)[1] == pytest.approx(min(best.values()))


def test_on_the_hull_greedy_is_optimal():
    parts = [[Option(1, 8.0), Option(2, 4.0), Option(3, 2.0)], [Option(1, 3.0), Option(2, 0.0)]]
    picked = [allocate(parts, size) for size in range(1, 6)]
    assert picked == [None, [0, 0], [1, 0], [1, 1], [2, 1]]


def test_the_hull_leaves_out_what_a_mixture_beats():
    options = [Option(4, 1.0), Option(1, 4.0), Option(2, 3.9), Option(3, 1.2), Option(3, 5.0)]
    assert hull(options) == [1, 3, 0]
    assert hull([Option(2, 1.0), Option(1, 1.0)]) == [1]


# what is asked for


def test_wanted():
    assert budget.wanted(None, None) is None
    assert budget.wanted(4.25, None) == budget.Budget(4.25, None)
    assert budget.wanted(None, "6.0GB") == budget.Budget(None, 6_000_000_000)
    assert (str(budget.wanted(4.25, None)), str(budget.wanted(None, "6GB"))) == ("4.25bit", "6GB")
    for bits in (2, 9.5, -1, float("nan")):
        with pytest.raises(UsageError, match="out of range"):
            budget.wanted(bits, None)
    with pytest.raises(UsageError, match="one target"):
        budget.wanted(4, "6GB")
    with pytest.raises(UsageError, match="not a size"):
        budget.wanted(None, "six")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-bits", 2.05], "cannot be met: the least is 2.1"),
        (["--target-size", "1MB"], "cannot be met: the least is"),
        (["--target-bits", 4, "--format", "awq"], "format awq has one scheme"),
        (["--target-bits", 4, "--rule", "*: bits=4"], "nothing to choose"),
    ],
)
def test_refused_before_anything_is_measured(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sensitivity, "measure", None)
    arguments = ["gptq", "demo", "--out", tmp_path / "out", *options]
    assert command(*arguments) == 2
    assert message in sentence(capsys.readouterr().err)[0]
    assert not list(tmp_path.iterdir())


# from end to end

SETTINGS = {**QUICK, "calib": ("bundled:en=2",), "calib_seqlen": 48}


def small():
    return str(model("llama", hidden_size=128, intermediate_size=256, head_dim=32))


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    out = tmp_path_factory.mktemp("budget") / "out"
    return out, quantize(small(), out, target_bits=3.6, **SETTINGS)


def test_choosing_is_counted_once(chosen):
    seconds = chosen[1].seconds
    assert 0 < seconds["prepare"] < seconds["choose"]


def test_a_model_that_is_not_made_of_numbers_is_refused(tmp_path):
    source = tmp_path / "model"
    shutil.copytree(small(), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"][1, 2] = torch.inf
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(QuantkitError, match=r"layers\.0\.self_attn\.k_proj\.weight holds inf"):
        quantize(str(source), tmp_path / "out", target_bits=3.6, **SETTINGS)


def test_the_budget_is_kept_and_used(chosen):
    folder, report = chosen
    assert 3.5 < report.plan.bits_per_weight <= 3.6
    assert len(report.budget["parts"]) == 3 * 4
    bits = {(part["bits"], part["group"]) for part in report.budget["parts"]}
    assert len(bits) > 1
    record = read_json(folder / "quantkit.json")
    assert record["budget"] == json.loads(json.dumps(report.budget))
    assert sorted(file.name for file in folder.glob("*.json")) == [
        "config.json",
        "generation_config.json",
        "quantize_config.json",
        "quantkit.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "Bits of every part" in (folder / "README.md").read_text("utf-8")


def test_the_file_has_what_was_chosen(chosen):
    folder, report = chosen
    found = open_checkpoint(Source("out", folder))
    for part in report.budget["parts"]:
        for name in part["linears"]:
            packed = found.linears[name]
            scheme = Scheme(part["bits"], part["group"])
            assert packed.scheme.bits == scheme.bits
            # one group reads as a whole row
            assert packed.scheme.width(packed.width) == scheme.width(packed.width)


def test_kl_is_that_of_the_model_with_one_part_rounded(chosen, monkeypatch):
    """Against transformers, with a rounding that can be repeated outside."""
    scheme = Scheme(sensitivity.PROBE, 128)

    def plain(weight, hessian, scheme, options):
        return gptq.Solution(rtn.quantize(weight, scheme), weight, 0.0, 0)

    monkeypatch.setattr(gptq, "solve", plain)
    settings = {**SETTINGS, "dtype": "float32", "dry_run": True, "target_bits": 3.6}
    report = quantize(small(), **settings)
    rows = report.calibration.rows
    reference = [tiny.reference(small())(torch.tensor([row])).logits[0] for row in rows]
    for part in (report.budget["parts"][0], report.budget["parts"][7]):
        changed = tiny.reference(small())
        for name in part["linears"]:
            linear = changed.get_submodule(name)
            linear.weight.data = rtn.quantize(linear.weight.data, scheme).dequantize()
        comparison = Comparison()
        for row, before in zip(rows, reference):
            after = changed(torch.tensor([row])).logits[0]
            comparison.add("sample", torch.tensor(row), before.detach(), after.detach())
        assert part["kl_alone"] == pytest.approx(comparison.overall()[0].mean, rel=1e-3)
    expected = [part["expected_kl"] for part in report.budget["parts"]]
    assert report.budget["expected_kl"] == pytest.approx(sum(expected))


def test_what_is_expected_is_the_kl_times_the_ratio_of_errors():
    part = sensitivity.Measured(0, ("a",), 0.5, {Scheme(4, 128): 0.25, Scheme(8, 128): 0.0}, 2.0)
    assert part.expected(Scheme(4, 128)) == 0.0625
    assert part.expected(Scheme(8, 128)) == 0.0


def test_an_interrupted_run_goes_on_with_its_choice(chosen, tmp_path, monkeypatch):
    folder, report = chosen

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stored, "write", stop)
        quantize(small(), tmp_path / "out", target_bits=3.6, **SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(sensitivity, "measure", None)
        again = quantize(small(), tmp_path / "out", target_bits=3.6, **SETTINGS)
    assert again.budget == report.budget
    for file in folder.glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_another_target_is_another_choice(tmp_path, monkeypatch):
    """And a started run is not continued with it."""

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stored, "write", stop)
        quantize(small(), tmp_path / "out", target_bits=3.6, **SETTINGS)
    with pytest.raises(UsageError, match="holds an unfinished run with other settings"):
        quantize(small(), tmp_path / "out", target_bits=5, **SETTINGS)


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2"])
def test_a_folder_of_at_most_this_size(name, tmp_path):
    """Biases and transposed weights are measured too; what rules speak of stays as they say."""
    settings = {**SETTINGS, "group": 64}
    rule = "*.1.attn.c_attn: bits=8" if name == "gpt2" else "*.1.attention.query_key_value: bits=8"
    width = {"n_embd": 128} if name == "gpt2" else {"hidden_size": 128, "intermediate_size": 512}
    source = model(name, **width)
    plain = quantized(source, **settings)
    size = sum(file.stat().st_size for file in plain.iterdir()) + 100_000
    report = quantize(
        str(source), tmp_path / "out", target_size=f"{size / 1e6}MB", rule=[rule], **settings
    )
    held = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert 0.95 * size < held <= size
    ruled = [job for job in report.plan.layout.all_jobs() if job.scheme == Scheme(8, 64)]
    assert any(rule.partition(":")[0][2:] in job.name for job in ruled)
    assert len(report.budget["parts"]) == 7


def test_a_dry_run_shows_the_choice_and_writes_nothing(tmp_path, capsys):
    options = ["-c", "bundled:en=1", "--calib-seqlen", 32, "--dry-run", "--target-bits", 4]
    assert command("gptq", small(), "--out", tmp_path / "out", *options) == 0
    shown = capsys.readouterr().out
    assert "bits a weight in all" in shown and "q_proj/k_proj/v_proj" in shown
    assert not list(tmp_path.iterdir())
