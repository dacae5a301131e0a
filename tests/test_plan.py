"""``quantkit plan``: what is foretold from headers alone, and what is said if it does not fit."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from tools import command, model, quantized, sentence

from quantkit.core import footprint, machines
from quantkit.core.headers import look
from quantkit.errors import QuantkitError
from quantkit.workflows import forecast as forecasting
from quantkit.workflows import machine as machining
from quantkit.workflows.forecast import forecast
from quantkit.workflows.needs import calibration_tokens


def told(capsys, *arguments):
    code = command("plan", *arguments, "--json")
    return code, json.loads(capsys.readouterr().out)


def test_the_demo_fits_here(capsys):
    code, found = told(capsys, "demo", "--gpu", "cpu")
    assert code == 0 and found["fits"]
    assert [task["task"] for task in found["tasks"]] == list(forecasting.TASKS)
    assert all(task["device"] is None and 5e8 < task["ram"] < 3e9 for task in found["tasks"])
    assert found["parameters"] * 2 == pytest.approx(found["original_bytes"], rel=0.01)
    assert found["result_bytes"] < found["original_bytes"]


def test_the_table_names_every_task(capsys):
    assert command("plan", "demo", "--gpu", "t4") == 0
    out = capsys.readouterr().out
    for word in (*forecasting.TASKS, "Tesla T4", "16.1 GB GPU memory", "tokens/s"):
        assert word in out


def test_sizes_are_those_that_quantizing_writes():
    """One planner: the same figures as the quantizer's own plan, for the same rows."""
    from quantkit.workflows.quantize import quantize

    report = quantize("demo", calib="bundled:en=2", calib_seqlen=64, dry_run=True)
    found = forecast(
        "demo", gpu="cpu", tasks=["quantize"], calib=("bundled:en=2",), calib_seqlen=64
    )
    assert found.result == report.plan.output_bytes
    assert found.bits_per_weight == report.plan.bits_per_weight
    assert found.needs[0].phases == report.plan.memory(report.calibration)


def test_too_little_is_told_with_changes_that_help(capsys):
    code, found = told(capsys, "demo", "--for", "serve", "--gpu", "t4", "--sequences", "100000")
    assert code == 3 and not found["fits"]
    (task,) = found["tasks"]
    assert task["lacking"] == ["GPU memory"] and task["changes"]
    again = [*task["changes"][0].split(), "--gpu", "t4"]
    assert told(capsys, "demo", "--for", "serve", "--sequences", "100000", *again)[0] == 0


@pytest.mark.parametrize("task", ["quantize", "generate"])
def test_every_change_that_is_told_was_tried(task, monkeypatch, capsys):
    """A GPU on which only a part of what is wished fits, activations beside it."""
    monkeypatch.setattr(footprint, "GPU_MODES", footprint.GPU_MODES[1:2])
    need = forecast("demo", gpu="t4", tasks=[task], calib=("self",), context=2048).needs[0]
    small = machines.Gpu("small", "small", (need.device - 1) / 2**30, 65, 8, 320, (7, 5))
    monkeypatch.setitem(machines.GPUS, "small", small)
    wish = ["demo", "--for", task, "--calib", "self"]
    code, found = told(capsys, *wish, "--gpu", "small")
    assert code == 3
    changes = found["tasks"][0]["changes"]
    assert changes[-1] == "--gpu rtx3060"  # the smallest of the table that is large enough
    assert len(changes) == 2
    for change in changes:
        assert told(capsys, *wish, "--gpu", "small", *change.split())[0] == 0


def test_little_ram(capsys):
    assert command("plan", "demo", "--gpu", "cpu", "--ram", "300MB", "--for", "generate") == 3
    out = capsys.readouterr().out
    assert "not enough RAM" in out and "nothing that was tried" in out


def test_a_size_that_is_none(capsys):
    assert command("plan", "demo", "--ram", "12QB") == 2
    assert sentence(capsys.readouterr().err)[0] == "'12QB' is not a size"


def test_a_full_disk(monkeypatch, capsys):
    monkeypatch.setattr(machining.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert command("plan", "demo", "--gpu", "cpu", "--for", "quantize") == 3
    assert "not enough disk" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
def test_methods(method):
    found = forecast("demo", gpu="t4", method=method)
    assert [need.task for need in found.needs] == list(forecasting.TASKS)
    assert found.fits


def test_awq_and_more_rows_take_more():
    def ram(**wishes):
        return (
            forecast("demo", gpu="cpu", tasks=["quantize"], calib=("self",), **wishes).needs[0].ram
        )

    assert ram(fast=True) < ram() < ram(method="awq")
    assert ram(calib_rows=16) < ram()


def test_text_that_the_model_writes_takes_the_whole_model():
    sizes = {"tasks": ["quantize"], "gpu": "t4", "calib_seqlen": 512}
    written = forecast("demo", calib=("self=4",), **sizes)
    (need,), (usual,) = written.needs, forecast("demo", calib=("bundled:en=4",), **sizes).needs
    phase, *others = need.phases
    assert phase.device["model"] == 2 * written.parameters
    assert [one.name for one in others] == [one.name for one in usual.phases]
    assert need.seconds > usual.seconds


def test_a_model_that_is_quantized_leaves_tasks_out_and_says_so(capsys):
    assert command("plan", quantized("demo"), "--gpu", "l4") == 0
    assert "is quantized already" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_a_quantized_model_is_run_as_it_is(form, capsys):
    folder = quantized("demo", format=form)
    code, found = told(capsys, str(folder), "--gpu", "l4")
    assert code == 0
    assert [task["task"] for task in found["tasks"]] == ["generate", "serve"]
    same = forecast("demo", gpu="l4", tasks=["generate"]).needs[0]
    assert found["tasks"][0]["device"] == pytest.approx(same.device, rel=0.01)


def test_what_cannot_be_planned(capsys, tmp_path):
    folder = quantized("demo")
    for arguments, code, words in (
        (["demo", "--gpu", "voodoo2"], 2, "not a GPU"),
        (["demo", "--ram", "plenty"], 2, "not a size"),
        (["demo", "--bits", "5"], 2, "5 bits"),
        (["demo", "--group", "7"], 2, "group size 7"),
        (["demo", "--calib-rows", "0"], 2, "--calib-rows"),
        (["demo", "--context", "-1"], 2, "--context"),
        (["demo", "--calib", "bundled:xx=3"], 2, "xx"),
        (["demo", "--calib", tmp_path / "none.txt"], 1, "none.txt"),
        (["demo", "--calib", "wikitxt"], 2, "not a calibration source"),
        (["demo", "--method", "none", "--for", "verify"], 2, "nothing to verify"),
        ([folder, "--for", "quantize"], 2, "quantized already"),
        ([tmp_path / "none"], 1, "no folder"),
        ([tmp_path], 1, "no model weights"),
    ):
        assert command("plan", *arguments) == code, arguments
        message, _ = sentence(capsys.readouterr().err)
        assert words in message


def test_fused_experts_are_refused(tmp_path, capsys):
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    config = GraniteMoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    GraniteMoeForCausalLM(config).save_pretrained(tmp_path / "fused")
    for method in ("gptq", "none"):
        assert command("plan", tmp_path / "fused", "--method", method) == 1
        message, _ = sentence(capsys.readouterr().err)
        assert "experts" in message


def test_what_is_planned_otherwise_than_asked_for_is_told(capsys):
    assert command("plan", "demo", "--gpu", "cpu", "--context", "90000") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert told.endswith("--context 90000: the model takes 2048 tokens, and is planned with those")
    assert told.count("90000") == 1  # of generate and serve together
    for wishes in ({"context": 64}, {"tasks": ["verify"], "context": 90000}, {}):
        assert forecast("demo", gpu="cpu", **wishes).notes == []
    found = forecast("demo", gpu="cpu", calib_seqlen=4096, seqlen=5000)
    assert [note.split()[0] for note in found.notes] == ["--calib-seqlen", "--seqlen"]
    assert found.described()["notes"] == found.notes


def test_calibration_tokens(tmp_path):
    (tmp_path / "notes.txt").write_text("some text", "utf-8")
    assert calibration_tokens([str(tmp_path / "notes.txt")], 128, 2048) == 128 * 2048
    assert calibration_tokens(["self=4", "c4"], 10, 100) == 4 * 100 + 6 * 100
    bundled = calibration_tokens(["bundled"], 128, 2048)
    assert 120_407 <= bundled < 128 * 2048  # the former: what the demo's tokenizer makes of them
    assert calibration_tokens(["bundled:ja=2"], 128, 64) == 128


def test_gpus_are_known_by_the_names_that_drivers_tell():
    for name, key in (
        ("Tesla T4", "t4"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 3060", "rtx3060"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
    ):
        assert machines.known(name) is machines.GPUS[key]
    assert machines.known("NVIDIA L40S") is None
    assert machines.known("Quadro P400") is None


def test_bfloat16_where_the_hardware_has_it():
    import torch

    assert machining.machine("t4", None).dtype == torch.float16
    assert machining.machine("a100", "64GB").dtype == torch.bfloat16
    assert machining.machine("a100", "64GB").ram == 64_000_000_000


def ranges(hub):
    return [wanted for name, wanted in hub.fetched() if name.endswith(".safetensors")]


def test_no_weights_come_from_the_hub(hub, capsys):
    """Only the first bytes of weight files are asked for; another tokenizer, or none, is the
    same."""
    folder = model("llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=2)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 20e6
    hub.add_folder("somebody/tiny", folder)
    code, found = told(capsys, "somebody/tiny", "--gpu", "t4", "--group", "32")
    assert code == 0 and found["model"] == "somebody/tiny"
    assert ranges(hub) and all(wanted for wanted in ranges(hub))
    asked = sum(1 + int(b) - int(a) for a, b in (w[6:].split("-") for w in ranges(hub)))
    assert asked < size / 20
    here = forecast(str(folder), gpu="t4", group=32)
    assert [need.device for need in here.needs] == [task["device"] for task in found["tasks"]]
    # what is fetched first takes room
    assert found["tasks"][0]["disk"] == here.needs[0].disk + size


def test_shards_a_branch_and_a_name_of_its_own(hub, tmp_path):
    import tiny

    shards = tiny.build("gpt_neox", tmp_path / "shards", tokenizer=True, shard="1MB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    hub.add_folder("somebody/shards", shards)
    hub.add_folder("somebody/shards", model("llama"), "v2")
    legacy = {path.name: path.read_bytes() for path in quantized("demo").iterdir()}
    legacy["gptq_model-4bit-128g.safetensors"] = legacy.pop("model.safetensors")
    hub.add("TheBloke/demo-GPTQ", legacy)
    for name, folder, tasks in (
        ("somebody/shards", shards, 4),
        ("somebody/shards@v2", model("llama"), 4),
        ("TheBloke/demo-GPTQ", quantized("demo"), 2),
    ):
        found, here = (forecast(m, gpu="t4", group=32) for m in (name, str(folder)))
        assert len(found.needs) == tasks
        assert [need.phases for need in found.needs] == [need.phases for need in here.needs]
    assert all(ranges(hub))


def test_damaged_headers_and_other_weights(hub):
    folder = model("llama")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = files.pop("model.safetensors")
    for content in (
        b"",
        b"\0" * 7,
        b"\xff" * 100,
        weights[:8] + b"{" * 2000,
        b"\2" + b"\0" * 7 + b"[]",
    ):
        hub.add("somebody/broken", {**files, "model.safetensors": content})
        with pytest.raises(QuantkitError, match="safetensors"):
            look("somebody/broken")
    hub.add("somebody/pickles", {**files, "pytorch_model.bin": weights})
    with pytest.raises(QuantkitError, match="not safetensors"):
        look("somebody/pickles")
    assert not [name for name, _ in hub.fetched() if name.endswith(".bin")]


def test_data_is_not_to_be_had(hub):
    hub.add_folder("somebody/tiny", model("llama"))
    _, tensors = look("somebody/tiny")
    name = next(iter(tensors))
    assert tensors.spec(name).nbytes < tensors.nbytes
    with pytest.raises(QuantkitError, match="only the header"):
        tensors.get(name)


def test_help_says_the_exit_codes():
    code = "from quantkit.cli.main import main; main(['plan', '--help'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "with 3 when something" in " ".join(result.stdout.split())
