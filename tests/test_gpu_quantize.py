"""Quantizing on a real GPU: threads and streams beside the computation change no byte, and products
of parts are as near as they are said to be.

    QUANTKIT_TEST_GPU=1 python -m pytest tests/test_gpu_quantize.py tests/test_fused.py

Everywhere else there is neither; tests/test_threads.py checks the threads alone on a CPU, and
tests/test_products.py, test_align.py and test_refine.py the products' mathematics.
"""

import os
import sys
import threading

import pytest
import torch
from test_align import aligned_target
from tools import model, read_json

from quantkit.core import footprint, pinned
from quantkit.core.checkpoint import Checkpoint, ShardWriter
from quantkit.core.footprint import Mode
from quantkit.core.ledger import Ledger
from quantkit.core.placed_file import PlacedFile
from quantkit.core.source import resolve
from quantkit.core.stats import Moments
from quantkit.errors import QuantkitError
from quantkit.methods import products, refine
from quantkit.runtime.skeleton import Skeleton
from quantkit.runtime.staging import staging
from quantkit.runtime.walk import Walk
from quantkit.workflows import stored
from quantkit.workflows.ahead import one_behind
from quantkit.workflows.awq import quantize_awq
from quantkit.workflows.plan import Plan
from quantkit.workflows.quantize import quantize

pytestmark = pytest.mark.skipif(
    not os.environ.get("QUANTKIT_TEST_GPU") or not torch.cuda.is_available(),
    reason="QUANTKIT_TEST_GPU is not set, or there is no GPU",
)

GPU = torch.device("cuda")
BLOCKS = 6
ROWS = {"calib": ("bundled:en=16", "bundled:ja=16"), "calib_seqlen": 256}
RUNS = {
    "fast": (quantize, {"fast": True}),
    "default": (quantize, {}),
    "asymmetric": (quantize, {"fast": True, "sym": False, "group": 32}),
    "awq": (quantize_awq, {}),
}


@pytest.fixture(scope="module")
def source():
    """Wide enough that a block's work takes longer than its launches."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8}
    sizes |= {"num_hidden_layers": BLOCKS, "max_position_embeddings": 512}
    return str(model("gpt_neox", **sizes))


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory):
    """What is written without threads or streams, by run."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "threaded", False)
        for name, (run, options) in RUNS.items():
            out = tmp_path_factory.mktemp(name) / "out"
            run(source, out, **ROWS, **options)
            found[name] = content(out)
    return found


@pytest.fixture
def hurried(monkeypatch):
    """Threads change places all the time, and everything goes in small pieces."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    monkeypatch.setattr(pinned, "_PIECE", 1 << 16)
    monkeypatch.setattr(pinned, "_threads", threading.local())  # larger pieces are there already
    yield
    sys.setswitchinterval(before)


def content(out):
    """Weights, and what was told of them."""
    told = read_json(out / "quantkit.json")
    return (out / "model.safetensors").read_bytes(), told["layers"], told["measured"]


# ---- copies


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3000, 3000),  # more than one piece, and a part of one
        torch.randn(1 << 22),  # whole pieces
        torch.randint(0, 255, (2001, 999), dtype=torch.uint8).T,
        torch.tensor(7, dtype=torch.int64),
        torch.empty(0, 4),
    ],
    ids=lambda tensor: str(tuple(tensor.shape)),
)
def test_bytes_go_there_and_back(tensor, tmp_path):
    there = pinned.carried(tensor, GPU)
    assert there.is_cuda and torch.equal(there.cpu(), tensor)
    assert torch.equal(pinned.carried(there, torch.device("cpu")), tensor)
    raw = b"".join(piece.numpy().tobytes() for piece in pinned.leaving(there))
    assert raw == tensor.contiguous().numpy().tobytes()
    file = PlacedFile(tmp_path / "f", b"planned", 7 + len(raw))
    file.write(7, there)
    for device in (GPU, torch.device("cpu")):
        assert file.read(7, len(raw), device).cpu().numpy().tobytes() == raw
    file.close()
    assert (tmp_path / "f").read_bytes() == b"planned" + raw


def test_a_file_that_ends_early_is_told(tmp_path):
    file = PlacedFile(tmp_path / "f", b"", 100)
    with pytest.raises(QuantkitError, match="ends before"):
        file.read(50, 51, GPU)
    file.close()


# ---- a stream of its own


def test_what_is_given_behind_is_complete_and_stays(hurried):
    """The caller's kernels are still to run when it is given, and the caller lets go of it and asks
    for as much memory again at once; the other stream takes its time."""
    found = []

    def look(x, expected):
        torch.cuda._sleep(20_000_000)  # some 10 ms, before anything is read
        found.append((expected, {float(x.min()), float(x.max())}))

    with one_behind(True, GPU) as behind:
        for index in range(30):
            torch.cuda._sleep(20_000_000)
            x = torch.full((1 << 20,), float(index), device=GPU)
            behind(look, x, float(index))
            del x
            for _ in range(4):  # one of them would be in its place
                torch.full((1 << 20,), -1.0, device=GPU)
    assert found == [(float(index), {float(index)}) for index in range(30)]


def test_an_error_behind_comes_out_and_the_stream_ends(hurried):
    def fails(x):
        torch.cuda._sleep(20_000_000)
        raise OSError("no room")

    with one_behind(True, GPU) as behind:
        behind(fails, torch.zeros(4, device=GPU))
        with pytest.raises(OSError, match="no room"):
            behind.finish()
        behind(lambda: None)


def test_what_is_staged_is_what_is_on_the_disk(source, hurried):
    """Read ahead while the other block's memory is taken and let go of."""
    place = resolve(source, None)
    checkpoint = Checkpoint(place.folder)
    skeleton = Skeleton(place, checkpoint, GPU, torch.bfloat16)
    walk = Walk(skeleton)
    with staging(skeleton, ahead=True) as ahead:
        for index in (*range(1, BLOCKS), *range(BLOCKS)):
            ahead.begin(walk.block_name(index))
            torch.full((1 << 24,), -1.0, device=GPU).sum()
            ahead.arrived(walk.block_name(index))
            assert skeleton.staged.keys() == set(skeleton.names_below(walk.block_name(index)))
            for name, tensor in skeleton.staged.items():
                assert torch.equal(tensor.cpu(), checkpoint.get(name)), name
            with walk.block(index) as block:
                for name, parameter in block.module.named_parameters():
                    disk = skeleton.disk_names[f"{block.name}.{name}"]
                    assert torch.equal(parameter.cpu(), checkpoint.get(disk).bfloat16()), name


# ---- whole runs


@pytest.mark.parametrize("name", RUNS)
def test_threads_and_streams_change_nothing(name, source, plain, hurried, tmp_path):
    run, options = RUNS[name]
    for turn in range(3):
        run(source, tmp_path / str(turn), **ROWS, **options)
        assert content(tmp_path / str(turn)) == plain[name]


@pytest.mark.parametrize("home", ["ram", "disk"])
def test_nor_does_the_place_of_activations(home, source, plain, monkeypatch, tmp_path):
    monkeypatch.setattr(footprint, "GPU_MODES", (Mode(home, 16384),))
    quantize(source, tmp_path / "out", **ROWS)
    assert content(tmp_path / "out")[:2] == plain["default"][:2]


FAULTS = [
    (ShardWriter, "write", 1),  # the dense tensors come first
    (ShardWriter, "write", 60),
    (ShardWriter, "sync", 2),
    (Ledger, "finish", 1),
    (Ledger, "finish", 3),
    (stored, "write_linear", 6),
]


def failing(patch, owner, name, call, error):
    """The ``call``-th call of ``owner.name`` raises ``error`` behind its work."""
    original, calls = getattr(owner, name), []

    def work(*arguments, **named):
        result = original(*arguments, **named)
        calls.append(name)
        if len(calls) == call:
            raise error
        return result

    patch.setattr(owner, name, work)


@pytest.mark.parametrize(("owner", "name", "call"), FAULTS)
def test_a_run_that_was_cut_off_goes_on(owner, name, call, source, plain, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, owner, name, call, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "out", **ROWS)
    quantize(source, tmp_path / "out", **ROWS)
    assert content(tmp_path / "out")[:2] == plain["default"][:2]


@pytest.mark.parametrize(("owner", "name", "call"), FAULTS)
def test_memory_that_ends_behind_is_less_from_then_on(
    owner, name, call, source, plain, monkeypatch, tmp_path
):
    failing(monkeypatch, owner, name, call, torch.OutOfMemoryError("CUDA out of memory"))
    report = quantize(source, tmp_path / "out", **ROWS)
    (told,) = report.backoffs
    assert told.endswith("going on with activations on the device, 16,384 tokens at once")
    assert content(tmp_path / "out")[:2] == plain["default"][:2]


def test_a_byte_that_the_disk_changes_is_found(source, monkeypatch, tmp_path):
    put = PlacedFile._put

    def spoiled(self, offset, raw):
        changed = bytearray(raw)
        if len(changed) > 1 << 20:  # the codes of a large linear
            changed[12345] ^= 16
        put(self, offset, memoryview(changed))

    monkeypatch.setattr(PlacedFile, "_put", spoiled)
    with pytest.raises(QuantkitError, match="reads back differently"):
        quantize(source, tmp_path / "out", fast=True, **ROWS)


def test_memory_stays_within_its_limit(source, tmp_path):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    quantize(source, tmp_path / "out", max_gpu_memory="1.5GB", **ROWS)
    assert torch.cuda.max_memory_reserved() <= 1.5e9 - footprint.CUDA_CONTEXT


# ---- mathematics: against float64


@pytest.fixture(scope="module")
def problem():
    """A Hessian of 3,000 inputs (no multiple of any block) with some large directions, and a weight
    of 700 rows, float64."""
    generator = torch.Generator(GPU).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=GPU, dtype=torch.float64)

    x = normal(8000, 300) @ normal(300, 3000) / 17 + 0.3 * normal(8000, 3000)
    x[:, :5] *= 20
    return normal(700, 3000), x.T @ x / len(x), x


def test_energy(problem):
    weight, hessian, _ = problem
    rounded = (weight * 4).round() / 4
    for rows in (weight, weight - rounded):
        expected = ((rows @ hessian) * rows).sum()
        for coarse, off in ((False, 5e-4), (True, 2e-3)):
            found = products.energy(hessian.float(), rows.float(), coarse)
            assert float(found / expected) == pytest.approx(1, abs=off)


def test_aligned_targets(problem):
    weight, hessian, x = problem
    generator = torch.Generator(GPU).manual_seed(1)
    lost = 0.1 * torch.randn(weight.shape, generator=generator, device=GPU, dtype=torch.float64)
    cross = (x @ lost.T).T @ x / len(x)
    exact = Moments(hessian.clone(), x.mean(0), cross, x.mean(0))
    ours = Moments(hessian.float(), x.mean(0).float(), cross.float(), x.mean(0).float())
    expected = aligned_target(weight, exact, 0.5, 0.01) - weight
    found = aligned_target(weight.float(), ours, 0.5, 0.01).double() - weight
    assert float((found - expected).norm() / expected.norm()) < 1e-3
    assert torch.equal(ours.gram, hessian.float())  # given back whole


@pytest.mark.parametrize(("rows", "groups"), [(1452, 152), (4864, 38), (5, 1), (3, 24)])
def test_scales_that_are_refitted(rows, groups):
    generator = torch.Generator(GPU).manual_seed(2)
    root = torch.randn(rows, groups, 2 * groups, generator=generator, device=GPU)
    system = (root @ root.mT).permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as equations has it
    right = torch.randn(rows, groups, generator=generator, device=GPU)
    found = refine._by_cholesky(system, right)
    expected = torch.linalg.solve(system.double(), right.double())
    assert float((found - expected).norm() / expected.norm()) < 1e-3
    system[1] = 0  # nothing to solve for there
    assert torch.equal(refine._by_cholesky(system, right)[2:], found[2:])
