"""The GGUF container: read as the gguf package wrote it, written as it reads it, and safe to open.

The files in golden/gguf were made by the gguf package; make.py there says how.
"""

import os
import re
import struct
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.core import gguf_file, gguf_values
from quantkit.core.gguf_file import GgufFile
from quantkit.core.gguf_values import GgufTensor, Value, nbytes
from quantkit.core.gguf_writer import GgufWriter
from quantkit.errors import QuantkitError
from quantkit.formats import gguf

GOLDEN = Path(__file__).parent / "golden" / "gguf"
FUZZ = int(os.environ.get("QUANTKIT_FUZZ", "60"))
SMALL = (GOLDEN / "small.gguf").read_bytes()

METADATA = {
    "general.architecture": gguf_values.string("llama"),
    "general.alignment": gguf_values.u32(64),
    "a.u8": Value("u8", 255),
    "a.i8": Value("i8", -128),
    "a.u16": Value("u16", 65535),
    "a.i16": Value("i16", -32768),
    "a.u32": gguf_values.u32(2**32 - 1),
    "a.i32": gguf_values.i32(-(2**31)),
    "a.f32": gguf_values.f32(0.1),
    "a.u64": Value("u64", 2**64 - 1),
    "a.i64": Value("i64", -(2**63)),
    "a.f64": Value("f64", 0.1),
    "a.bool": gguf_values.boolean(True),
    "a.str": gguf_values.string("日本の首都"),
    "b.strings": gguf_values.array("str", ["<s>", "", "日本", "\n"]),
    "b.ints": gguf_values.array("i32", [3, -1, 7]),
    "b.floats": gguf_values.array("f32", [0.5, -1e30]),
    "b.bools": gguf_values.array("bool", [True, False]),
}
PLAN = {
    "f32": ("F32", (2, 3)),
    "f16": ("F16", (5,)),
    "experts": ("I32", (2, 3, 4)),
    "bf16": ("BF16", (1, 2)),
    "q4_0": ("Q4_0", (3, 64)),
    "q8_0": ("Q8_0", (2, 32)),
    "q6_k": ("Q6_K", (2, 256)),
}


def content():
    """The bytes of PLAN's tensors, as make.py made them."""
    plain = {
        "f32": torch.arange(6).float().reshape(2, 3) / 4,
        "f16": torch.arange(5).half(),
        "experts": torch.arange(24, dtype=torch.int32).reshape(2, 3, 4),
    }
    found = {name: gguf.pack_dense(tensor, PLAN[name][0]) for name, tensor in plain.items()}
    for name, (type, shape) in PLAN.items():
        if name not in found:
            count = torch.arange(nbytes(shape, type))
            found[name] = (count * 7 % 256).to(torch.uint8).reshape(shape[0], -1)
    return found


def put(folder, raw):
    path = folder / "model.gguf"
    path.write_bytes(raw)
    return path


def refused(folder, raw):
    """The message with which the bytes of a file are refused."""
    path = put(folder, raw)
    with pytest.raises(QuantkitError) as caught:
        GgufFile(path)
    assert str(path) in caught.value.message
    return caught.value.message


# reading what the gguf package wrote


def test_every_kind_of_value_is_read():
    file = GgufFile(GOLDEN / "small.gguf")
    assert file.version == 3
    assert file.alignment == 64
    assert list(file.typed) == list(METADATA)
    for key, expected in METADATA.items():
        found = file.typed[key]
        assert (found.kind, found.of) == (expected.kind, expected.of)
        assert file.metadata[key] == (
            pytest.approx(expected.value, rel=1e-7)
            if "f32" in (expected.kind, expected.of)
            else expected.value
        )


def test_every_tensor_is_read():
    file = GgufFile(GOLDEN / "small.gguf")
    assert list(file.tensors) == list(PLAN)
    for name, raw in content().items():
        tensor = file.tensors[name]
        assert (tensor.type, tensor.shape) == PLAN[name]
        assert tensor.nbytes == raw.nbytes
        assert torch.equal(file.raw(name), raw)
    assert torch.equal(
        gguf.dense(file.raw("experts"), "I32", (2, 3, 4)), torch.arange(24).reshape(2, 3, 4)
    )


def test_version_2_is_the_same(tmp_path):
    file = GgufFile(put(tmp_path, SMALL[:4] + struct.pack("<I", 2) + SMALL[8:]))
    assert file.version == 2
    assert list(file.tensors) == list(PLAN)


def test_data_is_mapped_and_the_file_is_safe(tmp_path):
    path = put(tmp_path, SMALL)
    raw = GgufFile(path).raw("q4_0")
    raw.zero_()
    assert path.read_bytes() == SMALL


def test_a_tensor_that_is_gone_meanwhile_is_said(tmp_path):
    path = put(tmp_path, SMALL)
    file = GgufFile(path)
    path.write_bytes(SMALL[:100])
    with pytest.raises(QuantkitError, match="q6_k"):
        file.raw("q6_k")


def test_arrays_of_arrays_are_read_and_written(tmp_path):
    pairs = [gguf_values.array("i32", [1, 2]), gguf_values.array("str", ["x"])]
    path = tmp_path / "nested.gguf"
    GgufWriter(path, {"pairs": gguf_values.array("array", pairs)}, {}).close()
    file = GgufFile(path)
    assert file.metadata == {"pairs": [[1, 2], ["x"]]}
    assert file.typed["pairs"].value == pairs


def test_a_large_vocabulary_is_quick(tmp_path):
    tokens = [f"token {i}" for i in range(150_000)]
    metadata = {
        "tokens": gguf_values.array("str", tokens),
        "scores": gguf_values.array("f32", [0.0] * len(tokens)),
    }
    path = tmp_path / "vocabulary.gguf"
    GgufWriter(path, metadata, {}).close()
    start = time.process_time()
    file = GgufFile(path)
    assert time.process_time() - start < 2
    assert file.metadata["tokens"] == tokens


# writing


def write(path, names=None):
    raw = content()
    writer = GgufWriter(path, METADATA, PLAN)
    for name in names or raw:
        writer.write(name, raw[name])
    return writer


def test_the_same_bytes_as_the_gguf_package(tmp_path):
    path = tmp_path / "mine.gguf"
    writer = write(path, reversed(PLAN))  # in any order
    assert writer.nbytes == len(SMALL)
    writer.close()
    assert path.read_bytes() == SMALL


def test_what_was_read_can_be_written_again(tmp_path):
    file = GgufFile(GOLDEN / "small.gguf")
    plan = {name: (tensor.type, tensor.shape) for name, tensor in file.tensors.items()}
    writer = GgufWriter(tmp_path / "again.gguf", file.typed, plan)
    for name in plan:
        writer.write(name, file.raw(name))
        assert torch.equal(writer.read(name), file.raw(name))
    writer.close()
    assert (tmp_path / "again.gguf").read_bytes() == SMALL


def test_an_interrupted_run_is_continued(tmp_path):
    path = tmp_path / "model.gguf"
    writer = write(path, ["q4_0", "f32"])
    assert not writer.complete
    writer.sync()
    writer.abandon()
    again = GgufWriter(path, METADATA, PLAN)
    assert again.complete
    assert torch.equal(again.read("q4_0"), content()["q4_0"])
    assert int(again.read("q8_0").max()) == 0
    for name in PLAN:
        again.write(name, content()[name])
    again.close()
    assert path.read_bytes() == SMALL


def test_another_plan_starts_anew(tmp_path):
    path = tmp_path / "model.gguf"
    write(path).close()
    other = GgufWriter(path, METADATA, {**PLAN, "q4_0": ("Q4_0", (3, 32))})
    assert not other.complete
    assert int(other.read("f32").max()) == 0
    other.abandon()


def test_wrong_bytes_are_not_written(tmp_path):
    writer = GgufWriter(tmp_path / "model.gguf", METADATA, PLAN)
    raw = content()["q4_0"]
    for wrong in (raw[:-1], raw[:, :-1], raw.flatten(), raw.to(torch.int16)):
        with pytest.raises(ValueError, match="q4_0"):
            writer.write("q4_0", wrong)
    writer.abandon()


@pytest.mark.parametrize(
    ("name", "type", "shape", "said"),
    [
        ("", "F32", (2,), "0 bytes"),
        ("n" * 64, "F32", (2,), "64 bytes"),
        ("あ" * 22, "F32", (2,), "66 bytes"),
        ("x", "Q4_9", (2,), "Q4_9"),
        ("x", "F32", (), "shape"),
        ("x", "F32", (1, 2, 3, 4, 5), "shape"),
        ("x", "F32", (0, 4), "shape"),
        ("x", "Q4_0", (2, 48), "blocks of 32"),
        ("x", "Q6_K", (2, 128), "blocks of 256"),
    ],
)
def test_plans_that_no_reader_takes_are_refused(tmp_path, name, type, shape, said):
    with pytest.raises(QuantkitError, match=said):
        GgufWriter(tmp_path / "model.gguf", {}, {name: (type, shape)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "value",
    [
        gguf_values.u32(-1),
        Value("u8", 256),
        gguf_values.array("i32", [2**31]),
        gguf_values.f32(1e39),
    ],
)
def test_values_that_their_kind_cannot_hold_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match="a key"):
        GgufWriter(tmp_path / "model.gguf", {"a key": value}, {})


@pytest.mark.parametrize("value", [gguf_values.u32(0), gguf_values.u32(48), Value("u64", 32)])
def test_an_alignment_that_is_none_is_not_written(tmp_path, value):
    with pytest.raises(QuantkitError, match="alignment"):
        GgufWriter(tmp_path / "model.gguf", {"general.alignment": value}, {})


def test_the_gguf_package_reads_what_is_written(tmp_path):
    reader = pytest.importorskip("gguf", reason="needs the gguf package (quantkit[gguf])")
    path = tmp_path / "model.gguf"
    write(path).close()
    found = reader.GGUFReader(path)
    for key, value in GgufFile(path).metadata.items():
        assert found.get_field(key).contents() == value
    raw = content()
    assert [tensor.name for tensor in found.tensors] == list(PLAN)
    for tensor in found.tensors:
        assert tensor.tensor_type.name == PLAN[tensor.name][0]
        assert tuple(reversed(tensor.shape.tolist())) == PLAN[tensor.name][1]
        assert tensor.data.tobytes() == raw[tensor.name].numpy().tobytes()


# files that are not what they seem


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def tensor(name="x", dims=(2,), type=0, offset=0, count=None):
    count = len(dims) if count is None else count
    sizes = struct.pack(f"<I{len(dims)}Q", count, *dims)
    return text(name) + sizes + struct.pack("<IQ", type, offset)


def build(keys=(), tensors=(), data=b"", version=3, counts=None, alignment=32):
    n_tensors, n_keys = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def array(of, count, items=b""):
    return struct.pack("<IQ", of, count) + items


U32 = struct.pack("<I", 7)
HUGE = 2**64 - 1

HOSTILE = {
    "empty": (b"", "too short"),
    "magic alone": (b"GGUF", "too short"),
    "another file": (b"PK\3\4" + bytes(40), "not a GGUF file"),
    "ggjt": (b"tjgg" + bytes(40), "old GGML"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "version 0": (build(version=0), "version 0"),
    "version 1": (build(version=1), "version 1"),
    "version 4": (build(version=4), "version 4"),
    "big-endian": ((GOLDEN / "big_endian.gguf").read_bytes(), "big-endian"),
    "too many tensors": (build(counts=(HUGE, 0)), "tensors"),
    "too many keys": (build(counts=(0, HUGE)), "keys"),
    "tensors that do not fit": (build(counts=(4, 0)), "4 tensors"),
    "keys that are missing": (build(counts=(0, 1)), "ends|key of 0"),
    "empty key": (build([key("", 4, U32)]), "key of 0 bytes"),
    "endless key": (build([struct.pack("<Q", HUGE) + b"x" * 40]), "key of"),
    "key twice": (build([key("a", 4, U32), key("a", 4, U32)]), "'a' twice"),
    "key that is no text": (build([key(b"\xff", 4, U32)]), "UTF-8"),
    "text that is none": (build([key("a", 8, text(b"a\xc3("))]), "UTF-8.*'a'"),
    "unknown kind": (build([key("a", 13, U32)]), "kind 13"),
    "flag of 2": (build([key("a", 7, b"\2")]), "neither 0 nor 1"),
    "flags of 2": (build([key("a", 9, array(7, 3, b"\0\2\1"))]), "neither 0 nor 1"),
    "endless string": (build([key("a", 8, struct.pack("<Q", HUGE))]), "'a'"),
    "endless array": (build([key("a", 9, array(4, HUGE))]), "too many elements"),
    "long array": (build([key("a", 9, array(4, 1 << 20))]), "ends inside.*'a'"),
    "long array of strings": (build([key("a", 9, array(8, 1 << 20))]), "ends inside.*'a'"),
    "string past the end": (build([key("a", 9, array(8, 2, text("x")))]), "ends inside.*'a'"),
    "a last string past the end": (
        build([key("a", 9, array(8, 1, struct.pack("<Q", 200)))]),
        "ends inside.*'a'",
    ),
    "long array of arrays": (build([key("a", 9, array(9, 1 << 17))]), "too many elements"),
    "arrays in arrays": (build([key("a", 9, array(9, 1) * 5000)]), "inside of each other"),
    "unknown kind of array": (build([key("a", 9, array(99, 1, U32))]), "kind 99"),
    "alignment 0": (build([key("general.alignment", 4, struct.pack("<I", 0))]), "alignment"),
    "alignment 48": (build([key("general.alignment", 4, struct.pack("<I", 48))]), "alignment"),
    "alignment of a kind": (build([key("general.alignment", 8, text("32"))]), "alignment"),
    "alignment flag": (build([key("general.alignment", 7, b"\1")]), "alignment"),
    "tensor twice": (build([], [tensor(), tensor(offset=32)], bytes(64)), "'x' twice"),
    "nameless": (build([], [tensor("")], bytes(32)), "name of 0"),
    "endless name": (build([], [tensor("n" * 5000)], bytes(32)), "name of 5000"),
    "name that is no text": (build([], [tensor(b"\xff\xfe")], bytes(32)), "UTF-8"),
    "no dimensions": (build([], [tensor(dims=())], bytes(32)), "0 dimensions"),
    "five dimensions": (build([], [tensor(dims=(1,) * 5)], bytes(32)), "5 dimensions"),
    "2**32 - 1 dimensions": (build([], [tensor(count=2**32 - 1)], bytes(32)), "dimensions"),
    "a dimension of 0": (build([], [tensor(dims=(2, 0))], bytes(32)), "without elements"),
    "overflow": (build([], [tensor(dims=(2**62, 2**62, 2**62, 4))], bytes(32)), "ends before"),
    "wrapped to 0": (build([], [tensor(dims=(2**32, 2**32))], bytes(32)), "ends before"),
    "half a block": (build([], [tensor(dims=(48,), type=2)], bytes(64)), "blocks of 32"),
    "unknown type": (build([], [tensor(type=77)], bytes(64)), "type number 77"),
    "past the end": (build([], [tensor(dims=(9,))], bytes(32)), "ends before.*'x'"),
    "offset past the end": (build([], [tensor(offset=64)], bytes(32)), "ends before.*'x'"),
    "endless offset": (build([], [tensor(offset=2**64 - 32)], bytes(32)), "ends before"),
    "unaligned": (build([], [tensor(offset=16)], bytes(64)), "unaligned"),
    "overlap": (build([], [tensor(dims=(16,)), tensor("y", offset=32)], bytes(64)), "one place"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(tmp_path, name):
    raw, said = HOSTILE[name]
    path = put(tmp_path, raw)
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(QuantkitError, match=said) as caught:
            GgufFile(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 1
    assert str(path) in caught.value.message
    assert len(caught.value.message) < len(str(path)) + 250


def test_the_helpers_build_files_that_are_read(tmp_path):
    """Otherwise the files above could be refused for no reason of theirs."""
    keys = [key("a", 9, array(8, 2, text("x") + text(""))), key("b", 7, b"\1")]
    tensors = [tensor(dims=(3, 2)), tensor("n" * 200, (32,), 2, 32)]
    file = GgufFile(put(tmp_path, build(keys, tensors, bytes(64))))
    assert file.metadata == {"a": ["x", ""], "b": True}
    start = file.tensors["x"].offset
    assert file.tensors["x"] == GgufTensor("x", (2, 3), "F32", start, 24)
    assert file.tensors["n" * 200] == GgufTensor("n" * 200, (32,), "Q4_0", start + 32, 18)


def test_names_are_safe_to_print(tmp_path):
    raw = build([], [tensor("\x1b[2J" + "n" * 1000, type=77)], bytes(32))
    message = refused(tmp_path, raw)
    assert "\x1b" not in message


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [
        ("_MAX_ELEMENTS", 5, "too many elements"),
        ("_MAX_HEADER", 300, "too large"),
        ("_MAX_ENTRIES", 6, "claims to have"),
    ],
)
def test_limits(tmp_path, monkeypatch, limit, value, said):
    monkeypatch.setattr(gguf_file, limit, value)
    assert said in refused(tmp_path, SMALL)


def test_only_regular_files_are_opened(tmp_path):
    with pytest.raises(QuantkitError, match="regular"):
        GgufFile(tmp_path)
    with pytest.raises(QuantkitError, match="No such file"):
        GgufFile(tmp_path / "missing.gguf")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no FIFOs in folders")
def test_a_fifo_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(QuantkitError, match="regular"):
        GgufFile(tmp_path / "model.gguf")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    last = GgufFile(GOLDEN / "small.gguf").tensors["q6_k"]
    needed = last.offset + last.nbytes
    assert needed < len(SMALL)  # the padding at the end may be missing
    path = put(tmp_path, SMALL[:needed])
    assert list(GgufFile(path).tensors) == list(PLAN)
    for length in reversed(range(needed)):
        os.truncate(path, length)
        with pytest.raises(QuantkitError, match=re.escape(str(path))):
            GgufFile(path)


def survives(path, raw):
    """Open and read everything: it works, or is a QuantkitError, soon and in little memory."""
    path.write_bytes(raw)
    tracemalloc.start()
    start = time.process_time()
    try:
        file = GgufFile(path)
        for name, found in file.tensors.items():
            held = file.raw(name)
            if found.type in gguf.QUANTIZED:
                gguf.unpack(held, found.type, found.shape, name)
            elif found.type in gguf.DENSE:
                gguf.dense(held, found.type, found.shape, name)
    except QuantkitError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 22
    assert time.process_time() - start < 1


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "model.gguf"


flips = st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(1, 255)), max_size=8)


@settings(max_examples=FUZZ)
@given(flips, st.integers(0, len(SMALL)))
def test_fuzz_flipped_bits(target, changes, length):
    raw = bytearray(SMALL)
    for at, mask in changes:
        raw[at] ^= mask
    survives(target, bytes(raw))
    survives(target, bytes(raw[:length]))


numbers = st.one_of(
    st.integers(0, 40), st.sampled_from([2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 32, 2**64 - 1])
)


@settings(max_examples=FUZZ)
@given(st.integers(0, len(SMALL) // 2), numbers, st.sampled_from("IQ"))
def test_fuzz_numbers_in_the_header(target, at, number, letter):
    """Lengths, counts, sizes and offsets that are possible, nearly possible or absurd."""
    number &= (1 << 8 * struct.calcsize("<" + letter)) - 1
    raw = bytearray(SMALL)
    struct.pack_into("<" + letter, raw, at, number)
    survives(target, bytes(raw))


values = st.binary(max_size=40)
names = st.one_of(st.binary(max_size=10), st.sampled_from(["x", "y", "general.alignment"]))
keys = st.builds(key, names, st.integers(0, 14), values)
arrays = st.builds(array, st.integers(0, 13), numbers, values)
tensors = st.builds(tensor, names, st.lists(numbers, max_size=5), st.integers(0, 45), numbers)


@settings(max_examples=FUZZ)
@given(
    st.lists(st.one_of(keys, st.builds(lambda n, a: key(n, 9, a), names, arrays)), max_size=4),
    st.lists(tensors, max_size=4),
    st.binary(max_size=200),
    st.one_of(st.none(), st.tuples(numbers, numbers)),
)
def test_fuzz_headers(target, keys, tensors, data, counts):
    survives(target, build(keys, tensors, data, counts=counts))
