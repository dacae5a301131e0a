"""A killed run goes on where it stopped, and ends with the same bytes.

A kill is an exception that nothing catches, at every place where a run can stop: while a block is
solved, in the middle of writing it, in front of and behind its entry in the ledger, and at every
step of the end. Once it is a real ``kill -9``.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tools import QUICK, QUICK_OPTIONS, command, model, read_json, sentence

from quantkit.core import checkpoint
from quantkit.core.checkpoint import ShardWriter
from quantkit.core.ledger import Ledger
from quantkit.errors import QuantkitError, UsageError
from quantkit.workflows import gptq_block, seal
from quantkit.workflows.check import RideAlong
from quantkit.workflows.gptq_block import solve_block
from quantkit.workflows.output import Output
from quantkit.workflows.quantize import quantize

BLOCKS = 4
MODES = {"fast": QUICK, "default": {**QUICK, "fast": False}}


class Killed(BaseException):
    """Nothing catches it."""


def content(folder: Path) -> dict[str, object]:
    """Every file's bytes; quantkit.json without the seconds that it took."""
    found: dict[str, object] = {path.name: path.read_bytes() for path in folder.iterdir()}
    if "quantkit.json" in found:
        record = read_json(folder / "quantkit.json")
        record["seconds"] = {}
        found["quantkit.json"] = json.dumps(record)  # with the order of its keys
    return found


def assert_same(folder: Path, expected: dict[str, object]) -> None:
    found = content(folder)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def assert_only(folder: Path) -> None:
    """Nothing of the run is left beside its result."""
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert not list(folder.glob("*.tmp")) and not (folder / "ledger.json").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The demo, by mode, without any interruption."""
    found = {}
    for mode, settings in MODES.items():
        out = tmp_path_factory.mktemp(mode) / "out"
        quantize("demo", out, **settings)
        found[mode] = content(out)
    return found


@pytest.fixture
def solved(monkeypatch):
    """The names of the blocks that were solved, as they are."""
    names: list[str] = []

    def counting(block, *arguments):
        names.append(block.name)
        return solve_block(block, *arguments)

    monkeypatch.setattr(gptq_block, "solve_block", counting)
    return names


def kill_at(patch: pytest.MonkeyPatch, owner: object, name: str, call: int, late: bool) -> None:
    """The ``call``-th call of ``owner.name`` is the last thing that happens; with ``late`` after
    it has done its work."""
    original, calls = getattr(owner, name), []

    def killing(*arguments, **named):
        calls.append(name)
        if len(calls) < call:
            return original(*arguments, **named)
        if late:
            original(*arguments, **named)
        raise Killed

    patch.setattr(owner, name, killing)


def kill(out: Path, owner: object, name: str, call: int, late: bool = False, **settings) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, owner, name, call, late)
        with pytest.raises(Killed):
            quantize("demo", out, **settings)


def finished(out: Path) -> list[str]:
    return list(read_json(out.with_name(out.name + ".partial") / "ledger.json")["done"])


@pytest.mark.parametrize("mode", MODES)
def test_killed_at_every_block(tmp_path, whole, solved, mode):
    """One run that is killed twice in every block: in the middle of writing it, and right behind
    it. No block is solved again that was finished."""
    out, settings = tmp_path / "out", MODES[mode]
    for block in range(BLOCKS):
        # the dense tensors come first, when they have not been written yet
        before = 10 if block == 0 else 0
        kill(out, ShardWriter, "write", before + 11, **settings)
        assert len(finished(out)) == block + 1
        kill(out, Ledger, "finish", 1, late=True, **settings)
        assert finished(out)[-1] == f"model.layers.{block}"
        assert not out.exists()
    assert solved == [f"model.layers.{i}" for i in range(BLOCKS) for _ in range(2)]
    quantize("demo", out, **settings)
    assert len(solved) == 2 * BLOCKS
    assert_same(out, whole[mode])
    assert_only(out)


@pytest.mark.parametrize("name", ["before", "after"])
@pytest.mark.parametrize("mode", MODES)
def test_a_block_is_kept_before_anything_else_is_computed(tmp_path, mode, name):
    """On a CPU: it took minutes. ``after`` comes behind it, ``before`` in front of the next one."""
    out = tmp_path / "out"
    kill(out, RideAlong, name, 1 if name == "after" else 2, **MODES[mode])
    assert finished(out)[-1] == "model.layers.0"


def test_only_the_unfinished_blocks_are_solved(tmp_path, whole, solved):
    out = tmp_path / "out"
    kill(out, Ledger, "finish", 1 + 3, late=True, **QUICK)  # the first is for the dense tensors
    assert solved == ["model.layers.0", "model.layers.1", "model.layers.2"]
    quantize("demo", out, **QUICK)
    assert solved[3:] == ["model.layers.3"]
    assert_same(out, whole["fast"])


# a small model with biases, in several shards: a kill at every place

SMALL = {**QUICK, "group": 32, "fast": False, "refine": 1, "scale_search": False}
SMALL |= {"calib_seqlen": 32, "max_shard_size": "1MB"}
PLACES = [
    # owner, function, which call, behind it
    (gptq_block, "solve_block", 1, False),
    (gptq_block, "solve_block", 2, False),
    (gptq_block, "solve_block", 2, True),
    (ShardWriter, "write", 5, False),
    (ShardWriter, "sync", 1, False),
    (ShardWriter, "sync", 3, False),
    (ShardWriter, "sync", 3, True),
    (Ledger, "finish", 1, False),
    (Ledger, "finish", 1, True),
    (Ledger, "finish", 3, False),
    (Ledger, "finish", 3, True),
    (Output, "copy_companions", 1, False),
    (Output, "copy_companions", 1, True),
    (seal, "write_json", 1, True),
    (seal, "write_json", 2, False),
    (seal, "write_json", 3, True),
    (seal, "write_text", 1, False),
    (ShardWriter, "close", 1, False),
    (ShardWriter, "close", 1, True),
    (Output, "complete", 1, False),
    (checkpoint.os, "replace", 1, False),
    (checkpoint.os, "replace", 4, False),
    (checkpoint.os, "replace", 5, False),
    (checkpoint.os, "fsync", 1, False),
    (checkpoint.os, "fsync", 9, False),
]


def quantize_small(out: Path, **settings) -> None:
    quantize(str(model("gpt_neox")), out, **{**SMALL, **settings})


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("small") / "out"
    quantize_small(out)
    assert len(list(out.glob("*.safetensors"))) > 1
    return content(out)


@pytest.mark.parametrize("place", PLACES, ids=lambda p: f"{p[1]}-{p[2]}{'-late' * p[3]}")
def test_killed_anywhere(tmp_path, small, place):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, *place)
        with pytest.raises(Killed):
            quantize_small(out)
    assert not out.exists()
    assert out.with_name("out.partial").exists()
    quantize_small(out)
    assert_same(out, small)
    assert_only(out)


def test_text_that_rides_along_is_measured_the_same(tmp_path):
    for name, killed in (("one", False), ("two", True)):
        if killed:
            with pytest.MonkeyPatch.context() as patch:
                kill_at(patch, Ledger, "finish", 2, True)
                with pytest.raises(Killed):
                    quantize_small(tmp_path / name, check=True)
        quantize_small(tmp_path / name, check=True)
    one, two = (read_json(tmp_path / name / "quantkit.json")["measured"] for name in ("one", "two"))
    assert one == two
    assert one["kl"] > 0


def test_killed_behind_the_last_rename(tmp_path, small):
    """The result is complete then, and the same command says that it is there."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        # unlink: of the ledger, in the finished folder
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            quantize_small(out)
    assert (out / "ledger.json").exists()
    with pytest.raises(UsageError, match="out already exists"):
        quantize_small(out)
    assert_same(out, small)
    assert_only(out)


def test_killed_while_an_old_output_is_replaced(tmp_path, small):
    """Between the two renames there is no output; afterwards nothing of the old one is left."""
    out = tmp_path / "out"
    quantize_small(out, bits=8)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, Path, "rename", 2, late=False)
        with pytest.raises(Killed):
            quantize_small(out, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out.partial", "out.partial.old"}
    quantize_small(out, overwrite=True)
    assert_same(out, small)
    assert_only(out)


def test_an_old_output_stays_until_the_new_one_is_complete(tmp_path):
    out = tmp_path / "out"
    quantize_small(out, bits=8)
    before = content(out)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, Output, "complete", 1, late=False)
        with pytest.raises(Killed):
            quantize_small(out, overwrite=True)
    assert_same(out, before)


def test_stray_files_of_a_killed_run_do_not_survive(tmp_path, small):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, Ledger, "finish", 2, True)
        with pytest.raises(Killed):
            quantize_small(out)
    for name in ("ledger.json.tmp", "config.json.tmp", "tokenizer.json.tmp"):
        (tmp_path / "out.partial" / name).write_text("half of")
    quantize_small(out)
    assert_same(out, small)
    assert_only(out)


def test_lost_shards_are_made_again(tmp_path, small):
    """A ledger without the tensors that it calls finished would end in a model of zeros."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, Ledger, "finish", 2, True)
        with pytest.raises(Killed):
            quantize_small(out)
    next((tmp_path / "out.partial").glob("model-00001-*")).unlink()
    quantize_small(out)
    assert_same(out, small)


# what refuses to go on


@pytest.fixture
def begun(tmp_path):
    """A folder with a model, and a run on it that was killed in its second block."""
    source = tmp_path / "model"
    shutil.copytree(model("gpt_neox"), source)
    (tmp_path / "text.txt").write_text("The tortoise was older than the lighthouse. " * 50)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, Ledger, "finish", 3, False)
        with pytest.raises(Killed):
            quantize_begun(tmp_path)
    return tmp_path


def quantize_begun(folder: Path, **settings) -> None:
    quick = {**QUICK, "group": 32, "calib": (f"{folder}/text.txt=2",)}
    quantize(str(folder / "model"), folder / "out", **{**quick, **settings})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bits": 8}, ["bits was 4, is now 8"]),
        ({"group": 64}, ["group was 32, is now 64"]),
        ({"sym": False}, ["sym was True, is now False", "format was gptq, is now gptq_v2"]),
        ({"act_order": "none"}, ["act_order was static, is now none"]),
        ({"damp": 0.02}, ["damp was 0.01, is now 0.02"]),
        (
            {"fast": False},
            [
                "align was 0.0, is now 0.5",
                "refine was 0, is now 2",
                "tokens_per_input was 10, is now all",
            ],
        ),
        ({"scale_search": False}, ["scale_search was True, is now False"]),
        ({"bias_correction": False}, ["bias_correction was True, is now False"]),
        ({"dtype": "float32", "max_shard_size": "1MB"}, ["max_shard_size was 5000000000, is now"]),
        ({"format": "gptq_v2"}, ["format was gptq, is now gptq_v2"]),
        ({"calib": ("bundled:ja=2",)}, ["calibration is another"]),
        ({"calib_seqlen": 32}, ["calibration is another"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_other_settings_refuse_to_resume_and_are_named(begun, settings, named):
    before = content(begun / "out.partial")
    with pytest.raises(UsageError) as caught:
        quantize_begun(begun, **settings)
    for text in named:
        assert text in caught.value.message
    if "dtype" not in settings:
        assert caught.value.message.count(" is ") == len(named)
    assert "--overwrite" in caught.value.hint
    assert content(begun / "out.partial") == before
    assert not (begun / "out").exists()


def test_another_source_refuses_to_resume_and_is_named(begun):
    file = begun / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"] *= 1.5
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UsageError, match=r"source file model\.safetensors was .* is now"):
        quantize_begun(begun)


def test_a_source_of_another_name_refuses_to_resume(begun):
    (begun / "model").rename(begun / "other")
    with pytest.raises(UsageError, match="model was model, is now other"):
        quantize(
            str(begun / "other"),
            begun / "out",
            **{**QUICK, "group": 32, "calib": (f"{begun}/text.txt=2",)},
        )


def test_other_calibration_text_of_the_same_name_refuses_to_resume(begun):
    text = (begun / "text.txt").read_text()
    (begun / "text.txt").write_text(text.replace("tortoise", "heron"))
    with pytest.raises(UsageError, match="calibration is another"):
        quantize_begun(begun)
    (begun / "text.txt").write_text(text)
    quantize_begun(begun)
    assert (begun / "out" / "quantkit.json").exists()


def test_overwrite_starts_over_with_the_new_settings(begun, solved):
    quantize_begun(begun, bits=8, overwrite=True)
    assert solved == ["gpt_neox.layers.0", "gpt_neox.layers.1"]
    finished = content(begun / "out")
    shutil.rmtree(begun / "out")
    quantize_begun(begun, bits=8)
    assert_same(begun / "out", finished)
    assert not (begun / "out.partial").exists()


def test_two_runs_do_not_share_a_folder(begun, capsys):
    """One that has begun keeps the others out, whatever they were asked for, until it ends."""
    held = (
        "import sys, time; from pathlib import Path; from quantkit.workflows.output import Output;"
        "output = Output(Path(sys.argv[1]), True); output.begin(); print('held', flush=True);"
        "time.sleep(60)"
    )
    arguments = [sys.executable, "-c", held, str(begun / "out")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        before = content(begun / "out.partial")
        for settings in ({}, {"bits": 8, "overwrite": True}):
            with pytest.raises(QuantkitError, match=r"another run is at work in .*out\.partial"):
                quantize_begun(begun, **settings)
        assert content(begun / "out.partial") == before
        with pytest.raises(QuantkitError, match="another run is at work"):
            Output(begun / "out", True).discard()
        other.kill()
    quantize_begun(begun)
    assert not (begun / "out.partial").exists() and not (begun / "out" / "lock").exists()


def test_the_command_says_what_changed_with_exit_code_2(begun, capsys):
    options = [
        *QUICK_OPTIONS[4:],
        "-c",
        f"{begun}/text.txt=2",
        "--group",
        32,
        "--out",
        begun / "out",
    ]
    assert command("gptq", begun / "model", *options, "--bits", 8, "-q") == 2
    message, hint = sentence(capsys.readouterr().err)
    assert "unfinished run with other settings: bits was 4, is now 8" in message
    assert "--overwrite" in hint
    assert command("gptq", begun / "model", *options, "-q") == 0


def test_kill_9_and_the_same_command_again(tmp_path, whole, capsys):
    """The real thing: a process that is gone from one moment to the next."""
    out = tmp_path / "out"
    arguments = ["gptq", "demo", "--out", str(out), *QUICK_OPTIONS]
    process = subprocess.Popen(
        [sys.executable, "-c", "from quantkit.cli.main import main; main()", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as in this process
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        book = tmp_path / "out.partial" / "ledger.json"
        for _ in range(6000):
            if process.poll() is not None or (book.exists() and "layers.1" in book.read_text()):
                break
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it could be killed"
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {"out.partial"}
    assert 2 <= len(finished(out)) <= BLOCKS
    assert command(*arguments) == 0
    assert_same(out, whole["fast"])
    assert_only(out)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_came_to_be_meanwhile_is_not_replaced(tmp_path, overwrite, monkeypatch):
    out = tmp_path / "out"

    def somebody(*args, **options):
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
        return sealed(*args, **options)

    sealed = seal.seal
    with monkeypatch.context() as patch:
        patch.setattr(seal, "seal", somebody)
        with pytest.raises(QuantkitError, match="came to be at"):
            quantize("demo", out, overwrite=overwrite, **QUICK)
    assert (out / "thesis.txt").read_text() == "mine"
    out.rename(tmp_path / "away")
    quantize("demo", out, **QUICK)
    assert (out / "quantkit.json").exists()
