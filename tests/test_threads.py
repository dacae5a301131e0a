"""Blocks that are read ahead and written behind in threads, as on a GPU, change no byte."""

import errno
import threading
import time

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tools import QUICK, model
from torch.testing import assert_close

from quantkit.core.checkpoint import ShardWriter
from quantkit.core.ledger import Ledger
from quantkit.core.placed_file import PlacedFile
from quantkit.core.qweight import QWeight
from quantkit.errors import QuantkitError
from quantkit.methods import digest, fused
from quantkit.runtime import staging
from quantkit.runtime.walk import Walk
from quantkit.workflows import ahead, stored
from quantkit.workflows import quantize as workflow
from quantkit.workflows.blocks import Blocks
from quantkit.workflows.plan import Plan
from quantkit.workflows.quantize import quantize


@pytest.fixture
def threaded(monkeypatch):
    """What was read ahead, and in which order it was asked for."""
    seen = []
    read = staging.Staging._read

    def noting(self, prefix):
        seen.append(prefix)
        return read(self, prefix)

    monkeypatch.setattr(staging.Staging, "_read", noting)
    monkeypatch.setattr(Plan, "threaded", True)
    monkeypatch.setattr(ahead, "_BESIDE", torch.get_num_threads())  # here the sums are a CPU's
    return seen


def test_threads_beside_a_gpu_take_few_cores(tmp_path, threaded, monkeypatch):
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(3)

    def noting(function):
        def noted(*given):
            seen.append(torch.get_num_threads())
            return function(*given)

        return noted

    monkeypatch.setattr(ahead, "_BESIDE", 2)
    monkeypatch.setattr(staging.Staging, "_read", noting(staging.Staging._read))
    for name in ("write_linear", "check"):
        monkeypatch.setattr(stored, name, noting(getattr(stored, name)))
    try:
        quantize(str(model("gpt_neox")), tmp_path / "out", **SMALL)
        assert seen == [2] * 17 and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("fast", [True, False])
def test_the_folder_is_the_same(tmp_path, threaded, monkeypatch, fast):
    source = str(model("gpt_neox"))
    settings = {**QUICK, "fast": fast, "group": 32}
    quantize(source, tmp_path / "threads", **settings)
    assert threaded == ["gpt_neox.layers.1"]  # the first one is not read ahead
    monkeypatch.setattr(Plan, "threaded", False)
    quantize(source, tmp_path / "plain", **settings)
    assert len(threaded) == 1
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("threads", "plain"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert_close(tensor, other[name], rtol=0, atol=0, msg=name)


def test_what_is_staged_is_what_the_block_is_filled_with(tmp_path):
    skeleton = tiny.skeleton(tiny.build("llama", tmp_path))
    walk = Walk(skeleton)
    with staging.staging(skeleton, ahead=True) as ahead:
        ahead.begin(walk.block_name(1))
        ahead.arrived(walk.block_name(1))
        for tensor in skeleton.staged.values():
            tensor.fill_(7)
        with walk.block(1) as block:
            assert all(bool((p == 7).all()) for p in block.module.parameters())
        ahead.begin(walk.block_name(0))
        ahead.arrived(walk.block_name(1))  # another one than was begun: nothing of it is kept
        assert not skeleton.staged
    with staging.staging(skeleton, ahead=False) as nothing:
        assert nothing is None


def test_what_the_thread_cannot_read_is_told_by_the_walk(tmp_path, threaded, monkeypatch):
    get = workflow.Checkpoint.get

    def broken(self, name):
        if "layers.1" in name:
            raise OSError(f"{name} cannot be read")
        return get(self, name)

    monkeypatch.setattr(workflow.Checkpoint, "get", broken)
    with pytest.raises(OSError, match="cannot be read"):
        quantize(str(model("gpt_neox")), tmp_path / "out", group=32, **QUICK)
    assert not (tmp_path / "out").exists()


SMALL = {**QUICK, "group": 32}


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (ShardWriter, "write", 1),  # the dense tensors come first
        (ShardWriter, "write", 9),
        (ShardWriter, "sync", 1),
        (ShardWriter, "sync", 2),
        (Ledger, "finish", 1),
        (Ledger, "finish", 2),
        (Ledger, "finish", 3),
    ],
)
def test_what_a_thread_cannot_write_ends_the_run_and_the_next_goes_on(
    tmp_path, threaded, monkeypatch, owner, name, call
):
    source, original, calls = str(model("gpt_neox")), getattr(owner, name), []

    def full(*given):
        calls.append(name)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(QuantkitError, match="the disk is full"):
            quantize(source, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()
    quantize(source, tmp_path / "out", **SMALL)
    quantize(source, tmp_path / "plain", **SMALL)
    one, other = (tmp_path / kind / "model.safetensors" for kind in ("out", "plain"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("threads", [True, False])
def test_a_byte_that_the_disk_changes_is_found(tmp_path, threaded, monkeypatch, threads):
    """A block is finished when all of it was read back, whoever does that."""
    monkeypatch.setattr(Plan, "threaded", threads)
    source, put, seen = str(model("gpt_neox")), PlacedFile._put, []

    def spoiled(self, offset, raw):
        changed = bytearray(raw)
        if len(changed) == 2048:  # the codes of an attention's output
            seen.append(offset)
            changed[1234] ^= 16 * (len(seen) == 2)
        put(self, offset, memoryview(changed))

    with monkeypatch.context() as patch:
        patch.setattr(PlacedFile, "_put", spoiled)
        with pytest.raises(QuantkitError, match=r"layers\.1.*reads back differently"):
            quantize(source, tmp_path / "out", **SMALL)
    assert len(seen) == 2 and not (tmp_path / "out").exists()
    quantize(source, tmp_path / "out", **SMALL)
    quantize(source, tmp_path / "plain", **SMALL)
    one, other = (tmp_path / kind / "model.safetensors" for kind in ("out", "plain"))
    assert one.read_bytes() == other.read_bytes()


def test_the_largest_linear_is_written_first(tmp_path, monkeypatch):
    """Seeing what was written takes longer than writing it: it should not be what is waited for."""
    write, seen = stored.write_linear, {}

    def noting(job, tensors, writer):
        seen.setdefault(job.disk.split(".")[2], []).append(job.out * job.width)
        write(job, tensors, writer)

    monkeypatch.setattr(stored, "write_linear", noting)
    quantize(str(model("gpt_neox")), tmp_path / "out", **SMALL)
    assert [*seen] == ["0", "1"]
    assert all(len(sizes) == 4 and sizes == sorted(sizes)[::-1] for sizes in seen.values())


@pytest.mark.parametrize("slow", [(stored, "check"), (digest, "of")])
def test_copies_that_wait_to_be_checked_are_few(tmp_path, monkeypatch, slow):
    """One on a CPU: each is as large as a linear's codes."""
    (module, name), copy, copies, done = slow, QWeight.to, [], []
    work = getattr(module, name)

    def slowly(*given):
        time.sleep(0.02)
        found = work(*given)
        done.append(found)
        return found

    def counted(self, device):
        copies.append(len(copies) - len(done))
        return copy(self, device)

    monkeypatch.setattr(module, name, slowly)
    monkeypatch.setattr(QWeight, "to", counted)
    quantize(str(model("gpt_neox")), tmp_path / "out", **SMALL)
    assert copies == [0] * 8


@pytest.mark.parametrize("fast", [True, False])
def test_kernels_are_compiled_while_the_model_is_read(tmp_path, monkeypatch, fast):
    """In the order in which they are needed. An error is for those to tell who need a kernel."""
    seen, embedded = [], threading.Event()
    embed = Blocks._embed

    def embedding(self):
        embed(self)
        embedded.set()

    def slow(scheme, refines, device):
        seen.append((scheme.group_size, refines))
        return [lambda: seen.append(embedded.wait(60))]

    monkeypatch.setattr(Blocks, "_embed", embedding)
    monkeypatch.setattr(fused, "slow_to_compile", slow)
    settings = SMALL | {"fast": fast, "rule": ["*.1.mlp.*: group=64"]}
    quantize(str(model("gpt_neox")), tmp_path / "out", **settings)
    assert seen == [(32, not fast), (64, not fast), True, True]

    def broken():
        seen.append("broken")
        raise QuantkitError("no compiler")

    monkeypatch.setattr(fused, "slow_to_compile", lambda *_: [broken])
    quantize(str(model("gpt_neox")), tmp_path / "other", **settings)
    assert seen[-1] == "broken"
    one, other = (tmp_path / kind / "model.safetensors" for kind in ("out", "other"))
    assert one.read_bytes() == other.read_bytes()
