"""The memory planner: shapes found without numbers, and predictions beside measurements."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from tools import model, quantized

from quantkit.core import durations, footprint
from quantkit.core.footprint import Block, Group, Mode, Room, Run, Shapes
from quantkit.runtime.load import load
from quantkit.runtime.outline import outlined
from quantkit.workflows.forecast import forecast
from quantkit.workflows.sizes import memory_of


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_what_shares_an_input_is_found_on_shapes_alone(name, tmp_path):
    """The same groups that the walk finds with numbers (test_walk.py)."""
    architecture = tiny.ARCHITECTURES[name]
    skeleton = tiny.skeleton(tiny.build(name, tmp_path / name))
    before = {n: p.device.type for n, p in skeleton.model.named_parameters()}
    shapes = outlined(skeleton)
    assert shapes.exact
    assert len(shapes.blocks) == architecture.layers
    for block in shapes.blocks:
        assert sorted(group.names for group in block.groups) == sorted(architecture.groups)
        writers = {group.names[0] for group in block.groups if group.writes}
        assert writers == set(architecture.writers)
        leaving = {group.names[0] for group in block.groups if group.keepable}
        assert leaving == set(architecture.leaving)
    assert {n: p.device.type for n, p in skeleton.model.named_parameters()} == before
    assert shapes.numbers == sum(p.numel() for p in skeleton.model.parameters())
    assert shapes.tied == architecture.tied


def test_keys_and_values_of_grouped_heads():
    assert outlined(tiny.skeleton(model("llama"))).cache == 2 * 2 * 16
    assert outlined(tiny.skeleton(model("gpt_neox"))).cache == 2 * tiny.WIDTH


def test_working_memory_is_what_a_block_really_allocates():
    """The pieces that are alive at once in a Llama block, counted by hand, per token in float32."""
    working = outlined(tiny.skeleton(model("llama"))).blocks[0].working
    # the residual, its norm and gate, up, their product: at least; and not twice of that
    least = 2 * tiny.WIDTH + 3 * tiny.INNER
    assert least <= working <= 2.5 * least


def test_a_block_that_needs_numbers_is_guessed_at(monkeypatch):
    skeleton = tiny.skeleton(model("llama"))
    exact = outlined(skeleton)
    kind = type(skeleton.model.model.layers[0].mlp)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) if x.sum() > 0 else x)
    guessed = outlined(skeleton)
    assert not guessed.exact
    assert guessed.numbers == exact.numbers
    for ours, theirs in zip(guessed.blocks, exact.blocks):
        assert ours.working >= theirs.working
        names = {name for group in theirs.groups for name in group.names}
        assert {group.names for group in ours.groups} == {(name,) for name in names}


NEOX = Block(
    numbers=4864 * (3 * 4864 + 4864 + 2 * 19456),
    groups=(
        Group(("query_key_value",), 4864, (14592,)),
        Group(("dense",), 4864, (4864,), writes=True, keepable=True),
        Group(("dense_h_to_4h",), 4864, (19456,)),
        Group(("dense_4h_to_h",), 19456, (4864,), writes=True, keepable=True),
    ),
    working=48640,
)
WEBLAB = Shapes(4864, 50432, 2 * 4864 * 50432, False, 2 * 4864, (NEOX,) * 36)


def run(**changes):
    given = {
        "tokens": 128 * 2048,
        "row": 2048,
        "aside": 8192,
        "item": 2,
        "mapped": True,
        "aligned": True,
        "copies": False,
        "rounds": 2,
        "group": 128,
        "cuda": True,
    }
    return Run(**(given | changes))


@pytest.mark.parametrize("changes", [{}, {"aligned": False, "rounds": 0}])
def test_weblab_10b_on_a_small_gpu(changes):
    """6 GB of GPU memory and 4 GB of RAM are enough."""
    mode = footprint.choose(WEBLAB, run(**changes), Room(6 * 10**9, 4 * 10**9))
    assert mode and mode.states == "disk"


def test_the_least_that_a_block_takes():
    """What benchmarks/quantize_gpu.py counts by itself for this shape, at 750 TFLOP/s."""
    found = durations.least(NEOX, 128 * 2048)
    assert found.keys() == {"forward", "hessian", "factor", "round"}
    assert sum(found.values()) / 750e12 == pytest.approx(0.363, abs=5e-4)


def on_device(mode, **changes):
    phases = footprint.quantizing(WEBLAB, run(**changes), mode)
    return footprint.peak(phases, "device").bytes("device")


def test_modes_of_one_home_take_less_of_the_gpu_with_fewer_tokens():
    for home in ("ram", "disk"):
        sizes = [on_device(mode) for mode in footprint.GPU_MODES if mode.states == home]
        assert len(sizes) > 1 and sizes == sorted(sizes, reverse=True)
    _, device, ram, *_ = [on_device(mode) for mode in footprint.GPU_MODES]
    assert ram < 0.8 * device


def test_kept_inputs_take_what_they_are_long():
    keeping, device = (Mode("device", 16384, keeps) for keeps in (True, False))
    inputs = 128 * 2048 * (4864 + 19456) * 2
    more = 1 + footprint.FRAGMENTS
    assert on_device(keeping) - on_device(device) == pytest.approx(inputs * more, rel=1e-6)
    half = replace(NEOX.groups[3], keepable=False)
    block = replace(NEOX, groups=(*NEOX.groups[:3], half))
    phases = footprint.quantizing(replace(WEBLAB, blocks=(block,)), run(), keeping)
    kept = {phase.device.get("linears' inputs", 0) for phase in phases}
    assert kept == {0, 128 * 2048 * 4864 * 2}


def test_the_last_pass_is_short_where_inputs_are_kept():
    speed = durations.of_gpu(1000, 60, 4800, kernels=True)

    def takes(mode, block=NEOX, **changes):
        shapes = replace(WEBLAB, blocks=(block,), **changes)
        return durations.quantizing(shapes, run(), mode, None, 0, speed)

    keeping, device = (Mode("device", 16384, keeps) for keeps in (True, False))
    readers = 128 * 2048 * 2 * 4864 * (14592 + 19456)
    attention = 128 * 2048 * 2 * 4864 * 2048
    saved = (readers + attention) / speed.half
    assert takes(device) - takes(keeping) == pytest.approx(saved, rel=1e-6)
    one = replace(NEOX, groups=(*NEOX.groups[:3], replace(NEOX.groups[3], keepable=False)))
    # experts are behind the only linear that adds to the residual stream, and run again
    experts = Group(("gate",), 4864, (19456,), share=0.5)
    mixture = replace(NEOX, groups=(*NEOX.groups[:2], experts))
    for block in (one, mixture, replace(NEOX, groups=NEOX.groups[:1])):
        assert takes(device, block) == takes(keeping, block)
    assert takes(device, exact=False) == takes(keeping, exact=False)


def test_activations_are_where_the_mode_puts_them():
    def places(states):
        mode = Mode(states, 2048)
        phases = [p for p in footprint.quantizing(WEBLAB, run(), mode) if p.name == "statistics"]
        phase = max(phases, key=lambda p: p.bytes("device") + p.bytes("ram") + p.disk)
        return [part.get("activations", 0) for part in (phase.device, phase.ram)] + [phase.disk]

    streams = 3 * 128 * 2048 * 4864 * 2
    assert places("device") == [streams, 0, 0]
    assert places("ram") == [0, streams, 0]
    assert places("disk") == [0, 0, streams + 2 * 8192 * 4864 * 2]  # and the held-out rows


def test_the_fastest_mode_that_fits_is_chosen():
    gigabyte = 10**9

    def chosen(device, ram, tokens=None, **changes):
        room = Room(device * gigabyte, ram * gigabyte)
        return footprint.choose(WEBLAB, run(**changes), room, tokens)

    assert chosen(40, 64) == Mode("device", 16384, keeps=True)
    assert chosen(24, 64) == Mode("device", 16384)
    assert chosen(40, 64, aligned=False) == Mode("device", 16384)  # there is nothing to keep
    assert chosen(10, 64) == Mode("ram", 16384)
    assert chosen(10, 4) == Mode("disk", 16384)
    assert chosen(6, 4) == Mode("disk", 4096)
    assert chosen(40, 64, tokens=2048) == Mode("ram", 2048)
    assert chosen(2, 64) is None
    assert chosen(0, 64, cuda=False) == Mode("device", 2048)
    assert chosen(0, 8, cuda=False) == Mode("disk", 2048)


def test_the_next_mode_takes_less_of_what_was_short():
    def after(mode, place):
        return footprint.smaller(WEBLAB, run(), mode, place)

    assert after(Mode("device", 16384, keeps=True), "device") == Mode("device", 16384)
    assert after(Mode("device", 16384, keeps=True), "ram") is None
    assert after(Mode("device", 16384), "device") == Mode("ram", 16384)
    assert after(Mode("ram", 16384), "device") == Mode("ram", 4096)
    assert after(Mode("ram", 16384), "ram") == Mode("disk", 16384)
    assert after(Mode("ram", 4096), "device") == Mode("ram", 2048)
    assert after(Mode("ram", 2048), "device") is None
    assert after(Mode("disk", 4096), "device") == Mode("disk", 2048)
    assert after(Mode("disk", 2048), "ram") is None


MEASURED = """
import json, sys
from quantkit.cli import process
process.prepare()
import torch
torch.set_num_threads(1)
from quantkit.core import footprint
from quantkit.workflows.quantize import quantize
folder, out, fast = sys.argv[1:]
report = quantize(folder, out, calib="bundled:en=6", calib_seqlen=512, group=64,
                  fast=fast == "fast", dtype="float32", check=fast != "fast")
predicted = footprint.peak(report.plan.memory(report.calibration), "ram").bytes("ram")
# not ru_maxrss, which a process inherits from the one that started it
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
most = int(status["VmHWM"].split()[0]) * 1024
files = report.plan.skeleton.checkpoint.nbytes
print(json.dumps([predicted, most, files]))
"""
# with 4,096 inputs 268 MB of matrices [in, in] alone
WIDE = {"hidden_size": 256, "max_position_embeddings": 512}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells peak memory there")
@pytest.mark.parametrize(
    ("name", "way", "inner"),
    [("llama", "fast", 4096), ("gpt_neox", "fast", 4096), ("llama_tied", "default", 2048)],
)
def test_predicted_and_measured_memory(name, way, inner, tmp_path):
    """Whole processes. Pages of the original's files are left out: the system takes them back."""
    folder = model(name, num_hidden_layers=2, intermediate_size=inner, **WIDE)
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, folder, tmp_path / "out", way],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    predicted, most, files = json.loads(result.stdout.splitlines()[-1])
    assert most > 0.6e9, "too little to say anything"
    assert 0.8 < predicted / (most - files) < 1.3, (predicted, most, files)


def test_a_model_in_memory():
    """Weights are counted with the bytes that the loader really holds."""
    folder = quantized("demo")
    loaded, _ = load(str(folder), dtype="bfloat16")
    found = forecast(str(folder), gpu="t4", tasks=["generate"]).needs[0]
    prompt = found.phases[0].device
    kernel = (
        2
        * 2
        * sum(
            module.scale.numel() for module in loaded.modules() if hasattr(module, "kernel_scales")
        )
    )
    assert prompt["model"] == pytest.approx(memory_of(loaded) - kernel, rel=0.02)
    config = loaded.config
    wanted = 2048 * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 2
    assert prompt["keys and values"] == wanted
