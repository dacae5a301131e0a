"""Verifying: a copy is the same, a quantized model is not, and the numbers are the right ones."""

import json
import math
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from checkpoints import write_json
from safetensors.torch import load_file, save_file
from tools import QUICK, command, model, quantized, read_json, sentence
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import data
from quantkit.core.metrics import Comparison
from quantkit.core.source import Source
from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime import quant_skeleton
from quantkit.runtime.gpu_linear import GpuLinear
from quantkit.runtime.kernels import choose
from quantkit.runtime.linear import QuantLinear
from quantkit.runtime.opened import open_checkpoint
from quantkit.runtime.walk import Walk
from quantkit.workflows import divergence, whole
from quantkit.workflows.check import held_out
from quantkit.workflows.convert import convert
from quantkit.workflows.quantize import quantize
from quantkit.workflows.report_verdict import findings
from quantkit.workflows.sizes import memory_of
from quantkit.workflows.verify import verify

FEW = {"rows": 2, "seqlen": 64, "write": False}
SETS = ["en", "ja", "code", "chat"]


def dequantized(folder: Path) -> torch.nn.Module:
    """The demo as ``folder`` has it, as an ordinary model of transformers."""
    dense = AutoModelForCausalLM.from_pretrained(data.demo(), dtype=torch.float32).eval()
    opened = open_checkpoint(Source(folder.name, folder))
    with torch.no_grad():
        for name in opened.linears:
            dense.get_submodule(name).weight.copy_(opened.qweight(name).dequantize())
    return dense


@pytest.fixture(scope="module", autouse=True)
def short_continuations():
    """A token takes a tenth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divergence, "TOKENS", 8)
        yield


@pytest.fixture(scope="module")
def found():
    """The quantized demo, verified, with continuations."""
    return verify(str(quantized()), dtype="float32", **FEW)


def test_a_copy_of_the_original_is_no_different(tmp_path):
    shutil.copytree(data.demo(), tmp_path / "copy")
    result = verify(str(tmp_path / "copy"), against="demo", dtype="float32", **FEW)
    measured = result.comparison.described()
    assert abs(measured["kl"]) < 1e-6
    assert measured["top1"] == 1.0
    assert list(measured["sets"]) == SETS
    for one in measured["sets"].values():
        assert one["perplexity"] == pytest.approx(one["reference_perplexity"], rel=1e-5)
    assert result.layers == {}  # no linear of it is quantized
    assert all(sample.original == sample.quantized for sample in result.samples)
    assert (result.name, result.against) == ("copy", "demo")


def test_a_quantized_model_is_measured_on_every_set(found, tokenizer):
    """Against logits that transformers computes from the same weights, multiplied out."""
    measured = found.comparison.described()
    assert list(measured["sets"]) == SETS
    original = AutoModelForCausalLM.from_pretrained(data.demo(), dtype=torch.float32).eval()
    other = dequantized(quantized())
    means = []
    for label, rows in held_out(tokenizer, 2, 64).items():
        kl, agree, loss = [], [], []
        for row in rows:
            ids = torch.tensor([row])
            with torch.no_grad():
                p, q = (m(input_ids=ids).logits[0].log_softmax(-1) for m in (original, other))
            kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
            agree.append(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
            loss.append(float(-q[:-1].gather(1, ids[0, 1:, None]).mean()))
        one = measured["sets"][label]
        assert one["rows"] == 2
        assert one["kl"] == pytest.approx(sum(kl) / 2, rel=1e-3)
        assert one["top1"] == pytest.approx(sum(agree) / 2, abs=0.02)
        assert one["perplexity"] == pytest.approx(
            float(torch.tensor(sum(loss) / 2).exp()), rel=1e-3
        )
        means.append(sum(kl) / 2)
    assert measured["kl"] == pytest.approx(sum(means) / 4, rel=1e-3)
    assert 0.01 < measured["kl"] < 1
    assert measured["kl_error"] > 0


def test_layer_errors_are_those_of_their_outputs_on_the_original_s_inputs(found, tokenizer):
    """One layer, recomputed with hooks on transformers' own model."""
    assert len(found.layers) == 28
    assert all(0 < layer["error"] < 0.2 for layer in found.layers.values())
    name = "model.layers.2.mlp.down_proj"
    folder = quantized()
    original = AutoModelForCausalLM.from_pretrained(data.demo(), dtype=torch.float32).eval()
    q = open_checkpoint(Source(folder.name, folder)).qweight(name)
    linear = original.get_submodule(name)
    difference = q.dequantize() - linear.weight.detach()
    sums = [0.0, 0.0]

    def see(module, arguments, output):
        sums[0] += float((arguments[0] @ difference.T).square().sum())
        sums[1] += float(output.square().sum())

    linear.register_forward_hook(see)
    # of 8 rows every second is traced
    rows = [row for some in held_out(tokenizer, 2, 64).values() for row in some][::2]
    with torch.no_grad():
        for row in rows:
            original(input_ids=torch.tensor([row]))
    assert found.layers[name]["error"] == pytest.approx(sums[0] / sums[1], rel=1e-3)


@pytest.mark.parametrize("seqlen", [64, 160])  # int4 kernels, and weights that are multiplied out
def test_what_is_measured_is_what_runs(seqlen, monkeypatch):
    """Bit for bit the predictions of the loaded model, and its memory."""
    seen = []
    add = Comparison.add

    def noting(self, label, ids, reference, other):
        seen.append((ids, other.clone()))
        return add(self, label, ids, reference, other)

    monkeypatch.setattr(Comparison, "add", noting)
    options = {"rows": 1, "seqlen": seqlen, "samples": False, "write": False}
    found = verify(str(quantized()), dtype="bfloat16", device="cpu", **options)
    loaded, _ = quantkit.load(str(quantized()), dtype="bfloat16", device="cpu")
    with torch.no_grad():
        for ids, other in seen:
            assert torch.equal(loaded(input_ids=ids[None]).logits[0], other)
    assert len(seen) == 4
    assert found.size["memory"] == memory_of(loaded)


@pytest.mark.parametrize("blocked", [False, True])
def test_layers_of_a_gpu_are_looked_at_too(blocked, monkeypatch, tmp_path):
    """They keep their weights in other forms, the second for Hopper, which Triton's interpreter
    (conftest.py) reads."""

    class Gpu(GpuLinear):
        def product(self, x):
            return functional.linear(x, self.weight_as(x.dtype), self.bias)

    original = model("llama", num_hidden_layers=1, hidden_size=128, head_dim=32)
    folder = quantized(original, group=32)
    (tmp_path / "row.jsonl").write_text('{"input_ids": [5, 6, 7, 8]}')
    options = {"against": str(original), "text": [str(tmp_path / "row.jsonl")], "samples": False}
    options |= {"dtype": "float16", "device": "cpu", "write": False}
    plain = verify(str(folder), **options).described()
    monkeypatch.setattr(quant_skeleton, "quantized_linear", Gpu)
    monkeypatch.setattr(choose, "blocked", lambda q, device: blocked)
    monkeypatch.setattr(choose, "counters", lambda weight: 1)  # of a GPU that is not here
    found = verify(str(folder), **options).described()
    assert found["kl"] == pytest.approx(plain["kl"], rel=0.02)
    assert found["nonfinite"] == []
    for name, layer in found["layers"].items():
        assert layer["error"] == pytest.approx(plain["layers"][name]["error"], rel=0.02)
        assert layer["offset"] == plain["layers"][name]["offset"] and layer["held"]


def test_both_continue_the_same_prompts(found, tokenizer):
    prompts = divergence.PROMPTS
    assert [(sample.language, sample.prompt) for sample in found.samples] == list(prompts)
    assert any(sample.original != sample.quantized for sample in found.samples)
    original = AutoModelForCausalLM.from_pretrained(data.demo(), dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer.encode(prompts[3][1])])
    written = original.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert found.samples[3].original == tokenizer.decode(written, skip_special_tokens=True)


def test_without_samples_there_are_none():
    assert verify(str(quantized()), samples=False, **FEW).samples == []


def test_continuations_are_left_out_where_the_original_does_not_fit(monkeypatch):
    class Little:
        available = 1 << 20

    monkeypatch.setattr(whole.psutil, "virtual_memory", Little)
    result = verify(str(quantized()), rows=1, seqlen=16, write=False)
    assert result.samples == []
    assert len(result.notes) == 1 and "no continuations" in result.notes[0]


def test_neither_is_ever_in_memory_as_a_whole(monkeypatch):
    """Of the blocks one at a time has weights."""
    folder = quantized()
    seen = []
    enter = Walk.block

    def watching(self, index):
        model = self.skeleton.model
        held = [*model.parameters(), *(m for m in model.modules() if isinstance(m, QuantLinear))]
        seen.append([one for one in held if not (isinstance(one, Tensor) and one.is_meta)])
        return enter(self, index)

    monkeypatch.setattr(Walk, "block", watching)
    monkeypatch.setattr(whole, "put_together", lambda *_: pytest.fail("loaded"))
    verify(str(folder), samples=False, rows=1, seqlen=16, write=False)
    # what is outside of the blocks is there where the first one is run on a few tokens by embed()
    assert [len(held) for held in seen] == [2, 2] + [0, 0] * 4


# the command


def test_json_and_the_gate(capsys):
    options = ["--rows", 1, "--seqlen", 32, "--no-samples", "--no-write", "-q", "--json"]
    assert command("verify", quantized(), *options, "--max-kl", 5) == 0
    one = capsys.readouterr()
    assert one.err == ""
    measured = json.loads(one.out)
    assert measured["model"] == "quantized"
    assert measured["against"] == "demo"
    assert list(measured["sets"]) == SETS
    assert len(measured["layers"]) == 28
    limit = measured["kl"] * 0.99
    assert command("verify", quantized(), *options, "--max-kl", limit) == 3
    two = capsys.readouterr()
    again = json.loads(two.out)  # what was found is shown all the same
    assert [again.pop("gate")["passed"], measured.pop("gate")["passed"]] == [False, True]
    assert again == measured
    message, _ = sentence(two.err)
    assert message == f"mean KL {measured['kl']:.4f} is above --max-kl {limit:g}"


def test_a_kl_that_is_not_a_number_does_not_pass_the_gate(tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(quantized(), broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.scales"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    options = ["--rows", 1, "--seqlen", 16, "--no-samples", "--no-write", "-q"]
    assert command("verify", broken, *options, "--max-kl", 5) == 3
    assert "mean KL nan is above" in sentence(capsys.readouterr().err)[0]
    assert command("verify", broken, *options) == 0  # no limit, but it is told
    shown = " ".join(capsys.readouterr().out.split())
    assert "broken holds NaN or infinities: model.layers.0.self_attn.q_proj.scale" in shown
    assert command("verify", broken, *options, "--gate", "--json") == 3
    one = capsys.readouterr()
    assert "hold NaN or infinities" in sentence(one.err)[0]
    found = json.loads(one.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["kl"] is None
    assert found["nonfinite"][0] == "model.layers.0.self_attn.q_proj.scale"
    assert found["layers"]["model.layers.0.self_attn.q_proj"]["error"] is None


@pytest.fixture(scope="module")
def swapped(tmp_path_factory):
    """The quantized demo with the tensors of two layers in each other's places."""
    folder = tmp_path_factory.mktemp("swapped") / "model"
    shutil.copytree(quantized(), folder)
    tensors = load_file(folder / "model.safetensors")
    one, two = (f"model.layers.{i}.mlp.up_proj." for i in (1, 2))
    for name in [name for name in tensors if name.startswith(one)]:
        other = two + name.removeprefix(one)
        tensors[name], tensors[other] = tensors[other], tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_layers_that_are_not_what_was_predicted_stand_out(found, swapped):
    """What quantkit.json said, what they do now, and by how many decibels."""
    record = read_json(quantized() / "quantkit.json")["layers"]
    for name, layer in found.layers.items():
        assert layer["predicted"] == record[name]["error"]
        assert layer["sqnr"] == pytest.approx(-10 * math.log10(layer["error"]))
        assert 0.9 < layer["cosine"] < 1
    layers = verify(str(swapped), samples=False, **FEW).layers
    wrong = {name for name, layer in layers.items() if layer["error"] > 0.5}
    assert wrong == {f"model.layers.{i}.mlp.up_proj" for i in (1, 2)}
    assert all(layers[name]["sqnr"] < 3 and layers[name]["cosine"] < 0.5 for name in wrong)


# thin calibration, and damage


def found_in(folder: Path, **changes) -> list[tuple[str, str | None]]:
    described = verify(str(folder), samples=False, **FEW, **changes).described()
    return [(one.key, one.names.get("name")) for one in findings(described)]


@pytest.fixture
def damaged(tmp_path):
    """A copy of the quantized demo in which a fiftieth of one layer's words are others."""
    folder = shutil.copytree(quantized(), tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    words = tensors["model.layers.1.self_attn.o_proj.qweight"].view(-1)
    words[::50] ^= 0x5A5A5A5A
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_thin_calibration_is_no_damage(found, tmp_path):
    """256 tokens: on other text a layer loses 5 to 25 times what was predicted."""
    described = found.described()
    ratios = [layer["error"] / layer["predicted"] for layer in described["layers"].values()]
    assert min(ratios) > 3 and max(ratios) > 15
    assert {layer["held"] for layer in described["layers"].values()} == {True}
    (only,) = findings(described)
    assert (only.key, only.names["tokens"]) == ("find_thin", "256")
    for to in ("awq", "gguf:q4_0"):
        convert(str(quantized()), to, tmp_path / to)
    for folder in (tmp_path / "awq", next((tmp_path / "gguf:q4_0").glob("*.gguf"))):
        assert found_in(folder, against="demo") == [("find_thin", None)]


def test_a_damaged_layer_is_named(damaged):
    first, *others = found_in(damaged)
    assert first == ("find_damaged", "model.layers.1.self_attn.o_proj")
    assert {key for key, _ in others} <= {"find_thin", "find_set"}


def test_damage_where_no_digests_were_recorded(damaged):
    """Then only what stands out among layers of its kind is known."""
    record = read_json(damaged / "quantkit.json")
    for layer in record["layers"].values():
        del layer["digest"]
    write_json(damaged / "quantkit.json", record)
    assert found_in(damaged)[0] == ("find_unpredicted", "model.layers.1.self_attn.o_proj")
    write_json(damaged / "quantkit.json", {**record, "layers": {"x": [], "y": {"digest": 1}}})
    assert found_in(damaged) == []
    sound = shutil.copytree(quantized(), damaged.parent / "sound")
    write_json(sound / "quantkit.json", record)
    assert found_in(sound) == [("find_thin", None)]


@pytest.fixture(scope="module")
def confused(tmp_path_factory):
    """An asymmetric model that says it stores one less than its zero points, and does not."""
    folder = tmp_path_factory.mktemp("confused") / "model"
    shutil.copytree(quantized(sym=False, group=32), folder)
    config = read_json(folder / "config.json")
    assert config["quantization_config"]["checkpoint_format"] == "gptq_v2"
    config["quantization_config"]["checkpoint_format"] = "gptq"
    write_json(folder / "config.json", config)
    return folder


def test_zero_points_that_are_one_off_are_seen_by_everything(confused, tmp_path, capsys):
    """And told from other damage: the report names the first layer, and what it looks like."""
    limits = {"max_kl": 0.4, "min_top1": 0.6, "max_ppl_ratio": 1.3}
    options = {**FEW, "samples": False, **limits}
    good = verify(str(quantized(sym=False, group=32)), **options).described()
    bad = verify(str(confused), **options).described()
    assert bad["kl"] > 5 * good["kl"]
    assert bad["top1"] < good["top1"] - 0.2
    assert bad["perplexity_ratio"] > 1.3 * good["perplexity_ratio"]
    for label, one in bad["sets"].items():
        assert one["kl"] > 5 * good["sets"][label]["kl"]
        assert one["probability_lost"] > good["sets"][label]["probability_lost"]
    assert {check["passed"] for check in good["gate"]["checks"]} == {True}
    assert {check["passed"] for check in bad["gate"]["checks"]} == {False}
    for name, layer in good["layers"].items():
        assert abs(layer["offset"]) < 0.2, name
        assert bad["layers"][name]["offset"] == pytest.approx(layer["offset"] - 1, abs=0.05)
        assert bad["layers"][name]["error"] > 1.2 * layer["error"]
    assert [one.key for one in findings(good)] == ["find_thin"]
    first, *others = findings(bad)
    assert first.key == "find_zero_points"
    assert first.names == {"name": next(iter(bad["layers"])), "count": 28, "all": 28} | {
        "steps": "-1.0"
    }
    assert {one.key for one in others} <= {"find_set", "find_thin"}
    command_line = ["--rows", 1, "--seqlen", 32, "--no-samples", "--no-write", "-q", "--gate"]
    assert command("verify", confused, *command_line, "--report", tmp_path / "r.html") == 3
    shown = capsys.readouterr().out.replace("\n", " ")
    report = (tmp_path / "r.html").read_text("utf-8")
    for text in (shown, report):
        assert "zero points look wrong" in text and "layers.0.self_attn.q_proj is the first" in text


def test_the_cosine_is_that_of_all_outputs(tokenizer):
    found = verify(str(quantized()), dtype="float32", samples=False, **FEW)
    name = "model.layers.0.self_attn.q_proj"
    original = AutoModelForCausalLM.from_pretrained(data.demo(), dtype=torch.float32).eval()
    weight = open_checkpoint(Source("q", quantized())).qweight(name).dequantize()
    ours, theirs = [], []

    def see(module, arguments, output):
        ours.append((arguments[0] @ weight.T).flatten())
        theirs.append(output.flatten())

    original.get_submodule(name).register_forward_hook(see)
    rows = [row for some in held_out(tokenizer, 2, 64).values() for row in some][::2]
    with torch.no_grad():
        for row in rows:
            original(input_ids=torch.tensor([row]))
    cosine = torch.cosine_similarity(torch.cat(ours), torch.cat(theirs), 0)
    assert found.layers[name]["cosine"] == pytest.approx(float(cosine), rel=1e-5)


def test_all_of_it_is_plain_json(found):
    """The keys that the report is made from."""
    described = found.described()
    assert json.loads(json.dumps(described)) == described
    keys = "model against kl kl_error top1 top5 sets histogram worst layers samples divergence"
    assert described.keys() >= {*keys.split(), "size", "nonfinite", "gate", "settings", "notes"}
    assert described["gate"] is None and described["nonfinite"] == []
    written = read_json(quantized() / "quantkit.json")["size"]["bytes"]
    assert described["size"]["bytes"] == pytest.approx(written, rel=0.01)  # headers
    assert described["size"]["bits_per_weight"] == pytest.approx(4.1562, abs=1e-4)
    assert described["size"]["original_bytes"] == 10494472
    assert described["settings"]["quantization"]["method"] == "gptq"
    counts = described["histogram"]["counts"]
    tokens = {label: one["tokens"] for label, one in described["sets"].items()}
    assert {label: sum(some) for label, some in counts.items()} == tokens


def test_how_long_both_write_the_same(found):
    same = [sample.same for sample in found.samples]
    summary = found.described()["divergence"]
    assert summary["prompts"] == len(same) == 8
    assert summary["mean"] == sum(same) / 8
    for sample in found.samples:
        assert (sample.original == sample.quantized) == (sample.same == sample.tokens)
    before, after = [[[1, 2, 3], [1, 2]]], [[[1, 2, 4, 5], [1, 2]]]
    one, two = divergence.compared(before[0], after[0], Words())
    assert (one.same, one.tokens, two.same, two.tokens) == (2, 4, 2, 2)


class Words:
    def decode(self, ids, **_):
        return " ".join(map(str, ids))


# any two models


def test_the_original_may_be_quantized(found, tmp_path):
    """It is multiplied out block by block: a model against itself is no different, and the other
    way round the tokens that disagree are the same."""
    options = {**FEW, "dtype": "float32", "samples": False}
    itself = verify(str(quantized()), against=str(quantized()), **options)
    measured = itself.comparison.described()
    assert abs(measured["kl"]) < 1e-5
    assert measured["top1"] == 1
    assert all(layer["sqnr"] > 80 for layer in itself.layers.values())
    turned = verify(str(data.demo()), against=str(quantized()), **options)
    assert len(turned.layers) == 28  # dense ones count where they differ
    measured = turned.comparison.described()
    expected = found.comparison.described()
    assert measured["top1"] == pytest.approx(expected["top1"], abs=0.01)
    assert measured["perplexity_ratio"] == pytest.approx(1 / expected["perplexity_ratio"], rel=1e-3)
    assert measured["kl"] != pytest.approx(expected["kl"], rel=1e-3)


def test_a_gguf_file_on_either_side(tmp_path):
    convert(str(quantized()), "gguf:q4_0", tmp_path / "gguf", lossy=True)
    file = next((tmp_path / "gguf").glob("*.gguf"))
    one = verify(str(file), against="demo", dtype="float32", samples=False, **FEW)
    two = verify(str(quantized()), against=str(file), dtype="float32", samples=False, **FEW)
    assert one.comparison.described()["kl"] > 0.01
    assert one.size["bytes"] == file.stat().st_size
    assert abs(two.comparison.described()["kl"]) < 1e-3  # the same codes
    made = verify(str(file), against="demo", rows=1, seqlen=8, samples=False, write=False).settings
    assert (made["quantization"]["format"], made["quantization"]["method"]) == ("gguf", "gptq")


def test_gpt2_has_its_weights_the_other_way_round():
    folder = quantized(model("gpt2"), group=32)
    options = {"rows": 1, "seqlen": 16, "samples": False, "dtype": "float32", "write": False}
    itself = verify(str(folder), against=str(folder), **options)
    assert abs(itself.comparison.described()["kl"]) < 1e-5


# the verdict


@pytest.fixture
def own(tmp_path):
    """A folder that may be changed."""
    return shutil.copytree(quantized(), tmp_path / "own")


def test_the_verdict_goes_into_the_artifact(own):
    before = read_json(own / "quantkit.json")
    result = verify(str(own), rows=2, seqlen=32, samples=False, gate=True)
    after = read_json(own / "quantkit.json")
    verified = after.pop("verified")
    assert after == before
    described = result.described()
    assert verified["kl"] == described["kl"]
    assert verified["sets"] == described["sets"]
    assert verified["gate"]["passed"] is described["gate"]["passed"]
    assert verified["settings"]["rows"] == 2
    card = (own / "README.md").read_text("utf-8")
    assert f"**{described['kl']:.4f} ± {described['kl_error']:.4f}**" in card
    assert "Quality was not measured" not in card
    assert "on 2 rows of 32 tokens" in card
    assert result.notes == []
    again = verify(str(own), rows=1, seqlen=16, samples=False)  # its own card is replaced
    assert read_json(own / "quantkit.json")["verified"]["kl"] == again.described()["kl"]
    assert "on 1 rows of 16 tokens" in (own / "README.md").read_text("utf-8")
    assert not list(own.glob("*.tmp"))


def test_the_card_does_not_call_a_text_of_one_s_own_held_out(own, tmp_path):
    (tmp_path / "story.txt").write_text("昔々、ある村に古い灯台がありました。" * 30, "utf-8")
    verify(str(own), text=[str(tmp_path / "story.txt")], rows=1, seqlen=16, samples=False)
    card = (own / "README.md").read_text("utf-8")
    assert "held-out" not in card and "(story.txt)" in card
    assert str(tmp_path) not in card


def test_no_write_leaves_it(own, capsys):
    before = {file.name: file.read_bytes() for file in own.iterdir()}
    options = ["--rows", 1, "--seqlen", 16, "--no-samples", "-q", "--no-write"]
    assert command("verify", own, *options) == 0
    assert {file.name: file.read_bytes() for file in own.iterdir()} == before


def test_a_card_that_somebody_edited_is_left_alone(own):
    with open(own / "README.md", "a", encoding="utf-8") as file:
        file.write("\nIt is good at poems.\n")
    card = (own / "README.md").read_text("utf-8")
    result = verify(str(own), rows=1, seqlen=16, samples=False)
    assert (own / "README.md").read_text("utf-8") == card
    assert "verified" in read_json(own / "quantkit.json")
    assert "README.md is not as quantkit wrote it" in result.notes[0]


def test_nothing_is_written_where_quantkit_did_not(own, tmp_path):
    shutil.copytree(data.demo(), tmp_path / "plain")
    (own / "quantkit.json").write_text('{"source": {"name": "demo"}}')
    for folder in (own, tmp_path / "plain"):
        before = sorted((file.name, file.read_bytes()) for file in folder.iterdir())
        verify(str(folder), against="demo", rows=1, seqlen=16, samples=False)
        assert sorted((file.name, file.read_bytes()) for file in folder.iterdir()) == before


def test_a_verdict_is_not_said_of_what_was_rounded(own, tmp_path):
    verify(str(own), rows=1, seqlen=16, samples=False)
    for to, exact in (("awq", True), ("dense", False)):
        options = {} if exact else {"lossy": True}
        convert(str(own), to, tmp_path / to, **options)
        record = read_json(tmp_path / to / "quantkit.json")
        assert record["conversion"]["exact"] is exact
        assert ("verified" in record) is exact


def test_the_table_shows_what_models_write_as_it_is(monkeypatch, capsys):
    """Brackets are no markup."""
    texts = ("[i]", "en", "x[i] = [bold]y[/INST]", "[/] [red]")
    monkeypatch.setattr(divergence, "compared", lambda *_: [divergence.Sample(*texts, 0, 9)])
    assert command("verify", quantized(), "--rows", 1, "--seqlen", 16, "--no-write") == 0
    out = capsys.readouterr().out
    for text in texts[:1] + texts[2:]:
        assert text in out
    for heading in ("English", "Japanese", "code", "chat", "mean", "largest of 28 layer errors"):
        assert heading in out


def test_texts_of_one_s_own(tmp_path):
    (tmp_path / "story.txt").write_text("昔々、ある村に古い灯台がありました。" * 30, "utf-8")
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [5, 6, 7, 8]}\n{"input_ids": [9, 10]}\n')
    texts = [str(tmp_path / name) for name in ("story.txt", "rows.jsonl")]
    measured = verify(str(quantized()), text=texts, samples=False, **FEW).comparison.described()
    assert list(measured["sets"]) == ["story", "rows"]
    assert [one["rows"] for one in measured["sets"].values()] == [2, 2]
    assert all(one["kl"] > 0 for one in measured["sets"].values())


def test_two_texts_of_one_name_are_refused_instead_of_one_being_dropped(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.txt").write_text("some text " * 30)
    texts = [str(tmp_path / folder / "test.txt") for folder in ("a", "b")]
    with pytest.raises(UsageError, match="two texts are called 'test'"):
        verify(str(quantized()), text=texts, samples=False, **FEW)


def test_rows_are_not_longer_than_the_model_can_take():
    """GPT-2's positions end at 64 here, and the default rows have 512 tokens."""
    folder = quantized(model("gpt2"), group=32)
    result = verify(str(folder), against=str(model("gpt2")), rows=1, samples=False, write=False)
    assert result.comparison.described()["kl"] > 0
    assert result.notes == ["rows are 64 tokens, the longest that the model can take"]


def test_text_that_a_model_was_calibrated_on_is_told():
    folder = str(quantized())  # on bundled:en and bundled:ja
    for text, told in (("bundled:en", True), ("bundled", True), ("bundled:code", False)):
        notes = verify(folder, text=text, samples=False, **FEW).notes
        assert notes == ([f"it was calibrated on {text}, too: other text tells more"] * told)


def test_damage_outside_of_linears_is_told(tmp_path):
    """Errors of linears are small, and what the model predicts has nothing to do with it."""
    folder = tmp_path / "damaged"
    shutil.copytree(quantized(), folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].flip(0) * 40
    save_file(tensors, file, {"format": "pt"})
    told = "damaged predicts no better than by chance"
    assert [note for note in verify(str(folder), samples=False, **FEW).notes if told in note]
    assert not verify(str(quantized()), samples=False, **FEW).notes


# what does not belong together


def test_a_folder_without_a_model_is_told_as_that(tmp_path, capsys):
    assert command("verify", tmp_path) == 1
    assert "has no model weights" in sentence(capsys.readouterr().err)[0]


def test_a_model_without_a_recorded_original_needs_one():
    folder = quantized(model("llama"), group=32)
    with pytest.raises(UsageError) as caught:
        verify(str(folder), **FEW)
    assert "does not say where its original can be found" in caught.value.message
    assert "--against" in caught.value.hint
    result = verify(str(folder), against=str(model("llama")), samples=False, **FEW)
    assert result.against == "llama"


def test_a_folder_that_is_called_demo_is_not_the_demo(tmp_path):
    """Only the folder's name is recorded; the hashes tell the two apart."""
    source = tmp_path / "demo"
    shutil.copytree(data.demo(), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 2
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    quantize(str(source), tmp_path / "out", **QUICK)
    assert read_json(tmp_path / "out" / "quantkit.json")["source"]["name"] == "demo"
    with pytest.raises(UsageError, match="does not say where its original"):
        verify(str(tmp_path / "out"), **FEW)


def test_a_different_vocabulary_is_refused(tmp_path):
    small = tiny.build("llama", tmp_path / "small", vocab_size=4096)
    with pytest.raises(QuantkitError, match="small and demo have different vocabularies") as caught:
        verify(str(small), against="demo", **FEW)
    assert "--against" in caught.value.hint


@pytest.mark.parametrize("other", ["gpt_neox", "deeper", "shallower", "wider"])
def test_a_different_model_with_the_same_vocabulary_is_refused(other):
    changes = {
        "deeper": {"num_hidden_layers": 4},
        "shallower": {"num_hidden_layers": 2},
        "wider": {"intermediate_size": 256},
    }
    name = other if other == "gpt_neox" else "llama"
    original = model(name, **changes.get(other, {}))
    with pytest.raises(QuantkitError, match="quantized was not made from") as caught:
        verify(str(quantized(model("llama"), group=32)), against=str(original), **FEW)
    assert "--against" in caught.value.hint


@pytest.mark.parametrize("options", [{"rows": 0}, {"seqlen": 1}])
def test_nothing_to_measure_on_is_refused(options):
    with pytest.raises(UsageError, match="at least one row of two tokens"):
        verify(str(quantized()), **options)


def test_a_text_of_single_tokens_is_refused(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"input_ids": [5]}\n{"input_ids": [6]}\n')
    with pytest.raises(QuantkitError, match="'one' has no two tokens in a row"):
        verify(str(quantized()), text=[str(tmp_path / "one.jsonl")], **FEW)


def test_an_empty_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("  \n")
    with pytest.raises(QuantkitError, match="holds no text"):
        verify(str(quantized()), text=[str(tmp_path / "empty.txt")], **FEW)


# llama.cpp


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf") / "demo-q4_0"
    convert("demo", "gguf:q4_0", folder, lossy=True)
    return next(folder.glob("*.gguf"))


def test_what_llama_cpp_computes_can_be_measured(gguf):
    """Its activations have 8 bits: nearly the file multiplied out, and not quite."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    options = {"against": "demo", "dtype": "float32", **FEW}
    one, two = (verify(str(gguf), engine=name, **options) for name in ("torch", "llama.cpp"))
    ours, theirs = one.described(), two.described()
    assert theirs["kl"] == pytest.approx(ours["kl"], rel=0.1) and theirs["kl"] != ours["kl"]
    assert [found["settings"]["engine"] for found in (ours, theirs)] == ["torch", "llama.cpp"]
    assert theirs["layers"] == ours["layers"]
    assert sum(a.quantized == b.quantized for a, b in zip(one.samples, two.samples)) >= 4


def test_llama_cpp_is_for_gguf_files(monkeypatch, gguf):
    with pytest.raises(UsageError, match="runs GGUF files, and quantized is none"):
        verify(str(quantized()), engine="llama.cpp", **FEW)
    with pytest.raises(UsageError, match="no engine 'vllm'"):
        verify(str(gguf), against="demo", engine="vllm", **FEW)
    monkeypatch.setattr("quantkit.runtime.llamacpp.installed", lambda: False)
    with pytest.raises(QuantkitError, match="llama-cpp-python is not installed"):
        verify(str(gguf), against="demo", engine="llama.cpp", **FEW)
