"""Where hidden states are kept, and what a run does when memory ends: the numbers stay the same."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tools import QUICK, QUICK_OPTIONS, command, model, read_json, sentence

from quantkit.core import footprint
from quantkit.core.footprint import CPU_MODES, Mode, Room
from quantkit.core.progress import Progress
from quantkit.core.stats import InputStats
from quantkit.errors import QuantkitError, UsageError
from quantkit.methods import gptq
from quantkit.runtime import gather
from quantkit.runtime.states import Keeping, States
from quantkit.workflows import room
from quantkit.workflows.awq import quantize_awq
from quantkit.workflows.quantize import quantize
from quantkit.workflows.task import Report

HOMES = ("device", "ram", "disk")
SHAPES = [(2, 5), (2, 5), (1, 5), (3, 2)]


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, 4, generator=generator) for shape in SHAPES]


@pytest.fixture(params=HOMES)
def states(request, tmp_path):
    return Keeping(request.param, tmp_path).keep(iter(batches()), SHAPES)


def same(states, expected):
    return all(torch.equal(x, y) for x, y in zip(states, expected, strict=True))


def test_states_are_a_list_of_micro_batches(states):
    assert len(states) == 4 and states.shapes == SHAPES and states.width == 4
    assert states.device == torch.device("cpu")
    assert same(states, batches())
    assert same([states[3], states[0]], [batches()[3], batches()[0]])


def test_outputs_take_the_place_of_inputs(states):
    for _ in range(3):
        for index, x in enumerate(states):
            y = x * 2
            states.put(index, y)
            y.zero_()  # whoever made it may go on with it
    assert same(states, [8 * x for x in batches()])


def test_a_copy_is_a_second_one_of_the_same_kind(states):
    other = states.copy()
    assert type(other) is type(states)
    other.put(1, torch.zeros(10, 4))
    assert same(states, batches())
    assert not bool(other[1].any())


def test_several_are_read_side_by_side(states):
    other = states.copy()
    for index, x in enumerate(other):
        other.put(index, -x)
    sums = [x + y + z for x, y, z in zip(states, other, states, strict=True)]
    assert same(sums, batches())


def test_reading_can_be_given_up(states):
    for x in states:
        first = x.clone()
        break
    assert torch.equal(first, batches()[0])
    assert same(states, batches())


def test_parts_are_taken_one_at_a_time(states, tmp_path):
    alive = []

    def parts():
        for x in batches():
            assert len(alive) < 2
            alive.append(x)
            yield x
            alive.pop()

    assert same(Keeping("ram", tmp_path).keep(parts(), SHAPES), batches())


def test_a_file_has_no_name(tmp_path):
    states = Keeping("disk", tmp_path).keep(iter(batches()), SHAPES)
    assert list(tmp_path.iterdir()) == []
    assert same(states, batches())


def test_nothing_is_kept_of_nothing(tmp_path):
    for home in HOMES:
        assert len(Keeping(home, tmp_path).keep(iter([]), [])) == 0


def test_threads_end_with_the_states(tmp_path):
    before = set(threading.enumerate())  # others may end meanwhile
    states = Keeping("ram", tmp_path).keep(iter(batches()), SHAPES)
    assert same(states, batches())
    own = set(threading.enumerate()) - before
    assert own
    del states
    for thread in own:
        thread.join(10)
    assert not any(thread.is_alive() for thread in own)


# ---- whole runs


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def gptq_run(out: Path, **options) -> Report:
    return quantize(str(model("gpt_neox")), out, **{**QUICK, "fast": False, "group": 32, **options})


def awq_run(out: Path, **options) -> Report:
    settings = {key: value for key, value in QUICK.items() if key != "fast"}
    return quantize_awq(str(model("llama")), out, **{**settings, "group": 32, **options})


RUNS = {"gptq": gptq_run, "awq": awq_run}


@pytest.fixture(scope="module", autouse=True)
def several_micro_batches():
    """Two, of two rows each, where there would be one."""
    few = tuple(replace(mode, tokens=128) for mode in CPU_MODES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(footprint, "CPU_MODES", few)
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Outputs of undisturbed runs."""
    folder = tmp_path_factory.mktemp("plain")
    return {name: weights(carry(folder / name).folder) for name, carry in RUNS.items()}


@pytest.mark.parametrize("home", ["ram", "disk"])
@pytest.mark.parametrize("method", RUNS)
def test_the_files_are_the_same_wherever_states_are(home, method, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(footprint, "CPU_MODES", (Mode(home, 128),))
    report = RUNS[method](tmp_path / "out", check=True)
    assert report.plan.way.states == home
    assert report.measured is not None
    assert weights(tmp_path / "out") == plain[method]


@pytest.mark.parametrize("method", RUNS)
def test_the_files_are_the_same_with_inputs_that_are_kept(method, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(footprint, "CPU_MODES", (Mode("device", 128, keeps=True),))
    seen = []
    advance = gather.advance

    def watching(block, hidden, kept=None):
        if kept is not None:
            seen.append(sorted(group.names[0] for group in kept))
        advance(block, hidden, kept)

    monkeypatch.setattr(gather, "advance", watching)
    report = RUNS[method](tmp_path / "out")
    assert weights(tmp_path / "out") == plain[method]
    assert (
        str(report.plan.way) == "activations and linears' inputs on the device, 128 tokens at once"
    )
    leaving = {
        "gptq": ["attention.dense", "mlp.dense_4h_to_h"],
        "awq": ["self_attn.o_proj"],
    }
    assert seen and all(names == leaving[method] for names in seen)


def test_places_may_be_wider(states):
    wide = states.empty(7)
    assert type(wide) is type(states) and wide.width == 7
    for index, (rows, tokens, *_) in enumerate(SHAPES):
        wide.put(index, torch.full((rows, tokens, 7), float(index)))
    assert [float(x.mean()) for x in wide] == [0, 1, 2, 3]
    assert states.empty().width == states.width


def test_a_limit_of_ram_sends_states_to_disk(plain, tmp_path):
    report = gptq_run(tmp_path / "out", max_memory="500MB")
    assert report.plan.way == Mode("disk", 128)
    assert weights(tmp_path / "out") == plain["gptq"]
    assert read_json(tmp_path / "out" / "quantkit.json")["memory"] == {
        "mode": "activations on disk, 128 tokens at once",
        "backoffs": [],
    }


def test_limits_do_not_keep_a_run_from_going_on(plain, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        failing(patch, gptq, "solve", 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            gptq_run(out)
    report = gptq_run(out, max_memory="500MB")
    assert report.plan.way == Mode("disk", 128)
    assert weights(out) == plain["gptq"]


def test_a_run_goes_on_with_as_many_tokens_at_once(tmp_path, monkeypatch):
    few = Mode("disk", 64)
    monkeypatch.setattr(footprint, "CPU_MODES", (few,))
    gptq_run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        failing(patch, gptq, "solve", 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            gptq_run(tmp_path / "out")
    monkeypatch.setattr(footprint, "CPU_MODES", (Mode("device", 128), few))
    assert gptq_run(tmp_path / "out").plan.way == few
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_what_blocks_told_before_memory_ended_is_told_once(tmp_path, monkeypatch):
    solve = gptq.solve
    monkeypatch.setattr(gptq, "solve", lambda *given: replace(solve(*given), damp=0.5))
    failing(monkeypatch, gptq, "solve", 7, torch.OutOfMemoryError("out of memory"))
    report = gptq_run(tmp_path / "out")
    assert len(report.backoffs) == 1
    assert len(set(report.fallbacks)) == len(report.fallbacks) == 8


class Told(Progress):
    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


def failing(patch, owner, name, call, error):
    """The ``call``-th call of ``owner.name`` raises ``error``, halfway through its work."""
    original, calls = getattr(owner, name), []

    def work(*arguments, **named):
        calls.append(name)
        if len(calls) == call:
            original(*arguments, **named)
            raise error
        return original(*arguments, **named)

    patch.setattr(owner, name, work)


PLACES = {
    "the first rows": (InputStats, "add", 1),
    "later rows": (InputStats, "add", 3),
    "statistics of a later block": (InputStats, "add", 11),
    "differences of outputs": (gather, "observe_drift", 1),
    "solving": (gptq, "solve", 3),
    "refining": (gptq.refine, "refined", 6),
    "propagating": (gather, "advance", 2),
    "embedding": (States, "put", 2),
}


@pytest.mark.parametrize("place", PLACES)
def test_memory_ends_and_the_run_goes_on(place, plain, tmp_path, monkeypatch):
    owner, name, call = PLACES[place]
    failing(monkeypatch, owner, name, call, torch.OutOfMemoryError("out of memory"))
    told = Told()
    report = gptq_run(tmp_path / "out", progress=told)
    text = (
        "RAM ran out with activations on the device, 128 tokens at once: going on with "
        "activations on disk, 128 tokens at once"
    )
    assert report.backoffs == [text] and text in told.warnings
    assert read_json(tmp_path / "out" / "quantkit.json")["memory"]["backoffs"] == [text]
    assert weights(tmp_path / "out") == plain["gptq"]


def test_memory_ends_while_sensitivity_is_measured(tmp_path, monkeypatch):
    gptq_run(tmp_path / "plain", target_bits=4.5)
    failing(monkeypatch, InputStats, "add", 5, torch.OutOfMemoryError("out of memory"))
    report = gptq_run(tmp_path / "out", target_bits=4.5)
    assert len(report.backoffs) == 1
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")


def test_finished_blocks_are_not_solved_again(tmp_path, monkeypatch):
    failing(monkeypatch, gptq, "solve", 7, torch.OutOfMemoryError("out of memory"))
    solved = []
    solve = gptq.solve
    monkeypatch.setattr(gptq, "solve", lambda *given: solved.append(1) or solve(*given))
    gptq_run(tmp_path / "out")
    assert len(solved) == 4 + 4 + 3  # of the second block, three groups were solved in vain


def test_no_smaller_mode_is_one_clear_error(tmp_path, monkeypatch, capsys):
    def short(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(gptq, "solve", short)
    with pytest.raises(QuantkitError, match="not enough RAM to go on, even with activations on"):
        gptq_run(tmp_path / "out")
    options = ["--out", tmp_path / "cli", "--group", 32, *QUICK_OPTIONS]
    assert command("gptq", model("gpt_neox"), *options) == 1
    error, hint = sentence(capsys.readouterr().err)
    assert "not enough RAM" in error and "--calib-rows" in hint
    assert not (tmp_path / "cli").exists()


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path, monkeypatch):
    failing(monkeypatch, gptq, "solve", 2, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        gptq_run(tmp_path / "out")


@pytest.mark.parametrize(
    ("error", "cuda", "place"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True, "device"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True, "device"),
        (RuntimeError("CUDA error: out of memory"), True, "device"),
        (torch.OutOfMemoryError("2.6 GB of RAM cannot be locked"), True, "ram"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True, "ram"),
        (MemoryError(), True, "ram"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), False, "ram"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True, None),
        (ValueError("out of memory"), True, None),
    ],
)
def test_which_memory_was_short(error, cuda, place):
    assert room.lacking(error, cuda) == place


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 16 GB, 10 GB free, and the shares of it that torch was allowed to take."""
    shares = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 10**9, 16 * 10**9))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *given: shares.append(given)
    )
    return shares


def test_a_limit_of_gpu_memory_is_enforced(gpu):
    context = footprint.CUDA_CONTEXT
    for device, index in (("cuda", 1), ("cuda:0", 0)):
        gpu.clear()
        with room.limited(torch.device(device), "6GB"):
            assert gpu == [(pytest.approx((6e9 - context) / 16e9), index)]
        assert gpu[1:] == [(1.0, index)]
    with room.limited(torch.device("cuda"), None):
        assert len(gpu) == 2
    with room.limited(torch.device("cuda"), "40GB"):
        assert gpu[2][0] == 1.0


def test_room_is_what_is_free_or_the_limit(gpu):
    context, device = footprint.CUDA_CONTEXT, torch.device("cuda")
    assert room.room(device, None, None).device == 10 * 10**9 + context
    assert room.room(device, "6GB", "1GB") == Room(6 * 10**9, 10**9)
    assert room.room(device, "20GB", "1GB").device == 10 * 10**9 + context
    assert room.room(torch.device("cpu"), None, "1GB") == Room(None, 10**9)
    with pytest.raises(UsageError, match="CUDA alone takes"):
        room.room(device, "400MB", None)


@pytest.mark.parametrize(
    ("option", "size", "says"),
    [
        ("--max-gpu-memory", "6GB", "--max-gpu-memory is for a GPU"),
        ("--max-memory", "much", "'much' is not a size"),
    ],
)
def test_limits_that_make_no_sense(option, size, says, tmp_path, capsys):
    assert command("gptq", "demo", "--out", tmp_path / "out", "--device", "cpu", option, size) == 2
    assert says in sentence(capsys.readouterr().err)[0]
    with pytest.raises(UsageError):
        quantize("demo", tmp_path / "out", **{option[2:].replace("-", "_"): size, "device": "cpu"})


def test_a_limit_that_cannot_be_kept_is_told(tmp_path, capsys):
    options = [*QUICK_OPTIONS, "--out", tmp_path / "out", "--device", "cpu", "--dry-run"]
    assert command("gptq", "demo", *options, "--max-memory", "1MB") == 0
    assert "warning: this takes about 0.6 GB of RAM, and 0.0 GB are" in capsys.readouterr().err
    assert command("gptq", "demo", *options, "--max-memory", "2GB") == 0
    assert "of RAM, and" not in capsys.readouterr().err
