"""A folder from strangers is read or refused with one sentence: at once, and without taking memory.

QUANTKIT_FUZZ=20000 makes the random part as large as you have patience.
"""

import contextlib
import io
import json
import os
import pickle
import pickletools
import random
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from quantkit.core.checkpoint import INDEX, Checkpoint, read_json
from quantkit.errors import QuantkitError

SECONDS = 1.0
MEMORY = 256 << 20
fuzz = settings(
    max_examples=int(os.environ.get("QUANTKIT_FUZZ", 60)),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@contextlib.contextmanager
def cheaply():
    """Within a second of this process's time, and with no more memory than allowed."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        with contextlib.suppress(OSError):
            reset.write_text("5")
    before, started = peak(), time.process_time()
    yield
    assert time.process_time() - started < SECONDS
    assert peak() - before < MEMORY


def peak():
    """Bytes that this process has had in memory at most (0 where the system does not say)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(x.split()[1]) << 10 for x in status.open() if x.startswith("VmHWM"))


def attempt(folder):
    """Opens the folder and takes all tensors; whatever else than QuantkitError happens is a bug.
    Returns whether it was refused."""
    with cheaply():
        try:
            found = Checkpoint(folder)
            for name in found:
                spec, tensor = found.spec(name), found.get(name)
                assert tensor.dtype == spec.dtype
                assert tuple(tensor.shape) == spec.shape
        except QuantkitError as error:
            assert error.message
            assert "\n" not in error.message
            return True
    return False


def mutated(raw, flips, kept):
    """``raw`` with some bytes changed, cut off at ``kept``; positions count modulo its length."""
    raw = bytearray(raw)
    for at, bits in flips:
        raw[at % len(raw)] ^= bits
    return bytes(raw[: kept % len(raw)] if kept is not None else raw)


flips = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), max_size=6)
kept = st.none() | st.integers(0, 1 << 20)


# safetensors

TENSORS = {"a": torch.arange(40.0).reshape(8, 5), "b": torch.ones(3).half(), "c": torch.ones(2, 2)}
SAFETENSORS = save(TENSORS)


@fuzz
@given(flips=flips, kept=kept)
@example(flips=[], kept=None)
def test_damaged_safetensors(tmp_path, flips, kept):
    (tmp_path / "model.safetensors").write_bytes(mutated(SAFETENSORS, flips, kept))
    refused = attempt(tmp_path)
    assert refused or flips or kept is None


numbers = st.sampled_from([0, 1, -1, 3, 4, 40, 160, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, 1.5])
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(
            ["F32", "F16", "U8", "I64", "F4", "F6_E2M3", "F8_E8M0", "C64", "X", "", 1, None]
        ),
        "shape": st.lists(numbers, max_size=4) | st.none() | st.text(max_size=3),
        "data_offsets": st.lists(numbers, min_size=1, max_size=3) | st.none(),
        "more": st.none(),
    },
)
headers = st.dictionaries(
    st.sampled_from(["a", "b", "", "__metadata__", "\u0000", "../x"]), entries, max_size=4
)


def with_header(folder, header, length=None, data=bytes(160)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = struct.pack("<Q", len(text) if length is None else length)
    (folder / "model.safetensors").write_bytes(start + text + data)


@fuzz
@given(header=headers)
def test_invented_headers(tmp_path, header):
    with_header(tmp_path, header)
    attempt(tmp_path)


def one(**changes):
    return {"a": {"dtype": "F32", "shape": [40], "data_offsets": [0, 160]} | changes}


def test_a_header_written_by_hand_is_read(tmp_path):
    with_header(tmp_path, one())
    assert not attempt(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        one(shape=[2**40, 2**40]),
        one(shape=[2**63]),
        one(shape=[-40]),
        one(shape=[40, 0]),
        one(data_offsets=[160, 0]),
        one(data_offsets=[0, 2**63]),
        one(data_offsets=[-160, 0]),
        one(dtype="F64"),
        one(dtype="F99"),
        one() | {"b": one()["a"]},  # they overlap
        one(shape=[20], data_offsets=[80, 160]),  # a hole
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b" " * 100_000,
        b"\xff" * 1000,
        b"",
    ],
    ids=str,
)
def test_absurd_headers_are_refused(tmp_path, header):
    with_header(tmp_path, header)
    assert attempt(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 2**27, 2**31, 2**32, 2**63, 2**64 - 1])
def test_absurd_lengths_of_headers_are_refused(tmp_path, length):
    with_header(tmp_path, one(), length)
    assert attempt(tmp_path)


# files of torch.save


def torch_file():
    held = io.BytesIO()
    torch.save(TENSORS, held)
    return held.getvalue()


TORCH = torch_file()


@fuzz
@given(flips=flips, kept=kept)
@example(flips=[], kept=None)
def test_damaged_files_of_torch(tmp_path, flips, kept):
    (tmp_path / "pytorch_model.bin").write_bytes(mutated(TORCH, flips, kept))
    refused = attempt(tmp_path)
    assert refused or flips or kept is None


def with_program(folder, program):
    """The archive with another pickle in it, whose checksum is right."""
    with (
        zipfile.ZipFile(io.BytesIO(TORCH)) as old,
        zipfile.ZipFile(folder / "pytorch_model.bin", "w") as new,
    ):
        for name in old.namelist():
            new.writestr(name, program if name.endswith("data.pkl") else old.read(name))


def program():
    with zipfile.ZipFile(io.BytesIO(TORCH)) as archive:
        return next(archive.read(n) for n in archive.namelist() if n.endswith("data.pkl"))


PROGRAM = program()


def test_the_archive_with_its_own_program_is_read(tmp_path):
    with_program(tmp_path, PROGRAM)
    assert not attempt(tmp_path)


@fuzz
@given(flips=flips, kept=kept)
def test_damaged_programs(tmp_path, flips, kept):
    with_program(tmp_path, mutated(PROGRAM, flips, kept))
    attempt(tmp_path)


@fuzz
@given(seed=st.integers(0, 2**32))
def test_programs_of_random_instructions(tmp_path, seed):
    """Instructions of a real program in another order, some of them twice."""
    dice = random.Random(seed)
    starts = [at for _, _, at in pickletools.genops(PROGRAM)]
    parts = [PROGRAM[a:b] for a, b in zip(starts, [*starts[1:], len(PROGRAM)])]
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(parts))
        parts[at : at + dice.randint(0, 2)] = dice.choices(parts, k=dice.randint(0, 3))
    with_program(tmp_path, b"".join(parts))
    attempt(tmp_path)


class Marker:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "gptq_model-4bit-128g.pt", "model.safetensors"]
)
def test_no_file_runs_code(tmp_path, name):
    marker, folder = tmp_path / "executed", tmp_path / "model"
    folder.mkdir()
    torch.save({"x": Marker(marker)}, folder / name)
    assert attempt(folder)
    (folder / name).write_bytes(pickle.dumps({"x": Marker(marker)}))
    assert attempt(folder)
    assert not marker.exists()


def test_a_bomb_of_a_gigabyte_is_refused(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made,
        made.open("a/data.pkl", "w", force_zip64=True) as file,
    ):
        for _ in range(64):
            file.write(bytes(1 << 20))
    assert attempt(tmp_path)


# the index and the folder itself


def fifo(path):
    os.mkfifo(path)


def loop(path):
    path.symlink_to(path)


def loop_of_two(path):
    other = path.with_name("other")
    path.symlink_to(other)
    other.symlink_to(path)


def dangling(path):
    path.symlink_to(path.with_name("nothing"))


def device(path):
    path.symlink_to("/dev/zero")


ODD = [fifo, loop, loop_of_two, dangling, device, Path.mkdir]


@pytest.mark.parametrize("make", ODD)
@pytest.mark.parametrize(
    "name",
    [INDEX, "model.safetensors", "pytorch_model.bin", "a.pt", "pytorch_model.bin.index.json"],
)
def test_files_that_are_none_are_refused(tmp_path, name, make):
    make(tmp_path / name)
    assert attempt(tmp_path)


@pytest.mark.parametrize("make", ODD)
def test_an_index_cannot_name_what_is_no_file(tmp_path, make):
    make(tmp_path / "shard")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "shard"}}))
    assert attempt(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe{}",
        b"[" * 1_000_000,
        b'{"weight_map":' * 200_000,
        b"9" * 100_000,
        b'{"weight_map": null}',
        b'{"weight_map": {}}',
        b'{"weight_map": "abc"}',
        b'{"weight_map": {"a": ["b"]}}',
        b'{"weight_map": {"a": {}}}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": ""}}',
        b'{"weight_map": {"a": "../model.safetensors"}}',
        b'{"weight_map": {"a": "/etc/passwd"}}',
        b'{"weight_map": {"a": "x/../model.safetensors"}}',
        b'{"weight_map": {"a": "model.safetensors/"}}',
        b'{"weight_map": {"a": ".."}}',
        b'{"weight_map": {"a": "\\u0000"}}',
        b'{"weight_map": {"a": "\\ud800"}}',
        b'{"weight_map": {"a": "\\u001b[2J"}}',
        b'{"weight_map": {"a": "%s"}}' % (b"x" * 100_000),
    ],
    ids=range(21),
)
def test_hostile_indexes_are_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(SAFETENSORS)
    (tmp_path / INDEX).write_bytes(content)
    assert attempt(tmp_path)


def test_a_huge_index_is_refused(tmp_path):
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    assert attempt(tmp_path)


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.just("model.safetensors"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@fuzz
@given(value=values | st.fixed_dictionaries({"weight_map": values}))
def test_invented_indexes(tmp_path, value):
    (tmp_path / "model.safetensors").write_bytes(SAFETENSORS)
    (tmp_path / INDEX).write_text(json.dumps(value))
    attempt(tmp_path)


@pytest.mark.parametrize("make", ODD)
def test_read_json_does_not_wait_for_what_is_no_file(tmp_path, make):
    make(tmp_path / "config.json")
    with cheaply(), pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("content", [b"[" * 1_000_000, b'{"a":' * 200_000])
def test_read_json_says_that_a_file_is_nested_too_deeply(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with cheaply(), pytest.raises(ValueError, match="nested"):
        read_json(tmp_path / "config.json")
