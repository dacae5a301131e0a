"""Shards are read by everybody, survive an interruption, and bad folders are refused."""

import json
import os
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantkit.core import checkpoint, weight_file
from quantkit.core.checkpoint import INDEX, Checkpoint, ShardWriter, TensorSpec, write_json
from quantkit.errors import QuantkitError


def tensors():
    """One of every dtype and kind of shape, in an order that mixes their widths."""
    g = torch.Generator().manual_seed(0)
    return {
        "a.flags": torch.rand(5, generator=g) > 0.5,
        "a.weight": torch.randn(4, 6, generator=g),
        "a.scales": torch.randn(3, 5, generator=g).half(),
        "b.codes": torch.randint(0, 255, (7,), generator=g).to(torch.uint8),
        "b.weight": torch.randn(2, 3, 4, generator=g).bfloat16(),
        "b.qweight": torch.randint(-(2**31), 2**31 - 1, (8, 3), generator=g).to(torch.int32),
        "c.scalar": torch.tensor(1.5, dtype=torch.float64),
        "c.empty": torch.empty(0, 4),
        "c.count": torch.arange(3),
        "c.small": torch.tensor([-1, 2], dtype=torch.int8),
        "c.short": torch.tensor([-300], dtype=torch.int16),
    }


def specs(content):
    return {name: TensorSpec.of(tensor) for name, tensor in content.items()}


def write(folder, content, limit=1 << 20, names=None):
    writer = ShardWriter(folder, specs(content), limit)
    for name in names or content:
        writer.write(name, content[name])
    writer.close()
    return sorted(path.name for path in folder.glob("*.safetensors"))


def assert_same(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(found, expected)


# writing


def test_one_shard_is_read_by_safetensors(tmp_path):
    content = tensors()
    assert write(tmp_path, content) == ["model.safetensors"]
    assert not (tmp_path / INDEX).exists()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(content)
        assert file.metadata() == {"format": "pt"}
        for name, tensor in content.items():
            assert_same(file.get_tensor(name), tensor)


def test_many_shards_and_their_index_are_read_by_safetensors(tmp_path):
    content = tensors()
    files = write(tmp_path, content, limit=100)
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / INDEX).read_text())
    assert set(index["weight_map"]) == set(content)
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in content.values())
    for name, tensor in content.items():
        with safe_open(tmp_path / index["weight_map"][name], framework="pt") as file:
            assert_same(file.get_tensor(name), tensor)


def test_shards_stay_below_the_limit_where_tensors_allow(tmp_path):
    content = {f"x{i}": torch.full((10,), float(i)) for i in range(6)}
    content["large"] = torch.ones(100)
    write(tmp_path, content, limit=85)
    held = []
    for path in sorted(tmp_path.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            held.append(sorted(file.keys()))
    assert held == [["x0", "x1"], ["x2", "x3"], ["x4", "x5"], ["large"]]


def test_the_order_of_writing_does_not_matter(tmp_path):
    content = tensors()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    files = write(tmp_path / "a", content, 100)
    write(tmp_path / "b", content, 100, names=reversed(list(content)))
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_tensors_that_are_not_contiguous_are_written_as_they_look(tmp_path):
    content = {"x": torch.arange(12).reshape(3, 4).T}
    write(tmp_path, content)
    assert_same(Checkpoint(tmp_path).get("x"), content["x"])


def test_every_tensor_is_aligned_to_its_elements(tmp_path):
    write(tmp_path, tensors())
    raw = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    del header["__metadata__"]
    for name, entry in header.items():
        itemsize = tensors()[name].dtype.itemsize
        assert (8 + length + entry["data_offsets"][0]) % itemsize == 0, name


def test_read_gives_back_what_was_written(tmp_path):
    content = tensors()
    writer = ShardWriter(tmp_path, specs(content), 100)
    for name, tensor in content.items():
        writer.write(name, tensor)
        assert_same(writer.read(name), tensor)
    writer.abandon()


@pytest.mark.parametrize(
    "tensor", [torch.zeros(4, 7), torch.zeros(6, 4), torch.zeros(4, 6).half(), torch.zeros(24)]
)
def test_a_tensor_that_was_planned_otherwise_is_refused(tmp_path, tensor):
    content = tensors()
    writer = ShardWriter(tmp_path, specs(content), 1 << 20)
    with pytest.raises(ValueError, match=r"a\.weight"):
        writer.write("a.weight", tensor)
    writer.abandon()


def test_a_tensor_that_was_not_planned_is_refused(tmp_path):
    writer = ShardWriter(tmp_path, specs(tensors()), 1 << 20)
    with pytest.raises(KeyError):
        writer.write("d.weight", torch.zeros(1))
    writer.abandon()


@pytest.mark.parametrize("limit", [100, 1 << 20])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, limit):
    content = tensors()
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    whole.mkdir()
    pieces.mkdir()
    files = write(whole, content, limit)
    names = list(content)
    first = ShardWriter(pieces, specs(content), limit)
    for name in names[:5]:
        first.write(name, content[name])
    first.sync()
    first.abandon()
    second = ShardWriter(pieces, specs(content), limit)
    for name in names[:5]:
        assert_same(second.read(name), content[name])
    for name in names[5:]:
        second.write(name, content[name])
    second.close()
    for file in files:
        assert (pieces / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize(
    "changed",
    [TensorSpec(torch.float32, (8, 3)), TensorSpec(torch.float16, (4, 6))],
    ids=["same size", "smaller"],
)
def test_another_plan_starts_anew(tmp_path, changed):
    content = tensors()
    write(tmp_path, content)
    plan = specs(content) | {"a.weight": changed}
    writer = ShardWriter(tmp_path, plan, 1 << 20)
    assert_same(writer.read("a.weight"), torch.zeros(changed.shape, dtype=changed.dtype))
    assert_same(writer.read("b.qweight"), torch.zeros_like(content["b.qweight"]))
    writer.close()
    assert Checkpoint(tmp_path).spec("a.weight") == changed


def test_a_shard_that_was_cut_off_starts_anew(tmp_path):
    content = tensors()
    write(tmp_path, content)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 1)
    writer = ShardWriter(tmp_path, specs(content), 1 << 20)
    assert_same(writer.read("a.weight"), torch.zeros(4, 6))
    writer.close()
    assert set(Checkpoint(tmp_path)) == set(content)


# reading


@pytest.mark.parametrize("limit", [100, 1 << 20])
def test_a_checkpoint_knows_its_tensors(tmp_path, limit):
    content = tensors()
    files = write(tmp_path, content, limit)
    found = Checkpoint(tmp_path)
    assert set(found) == set(content)
    assert found.files == files
    assert found.nbytes == sum((tmp_path / file).stat().st_size for file in files)
    assert "a.weight" in found
    assert "a.bias" not in found
    for name, tensor in content.items():
        assert found.spec(name) == TensorSpec.of(tensor)
        assert_same(found.get(name), tensor)
        with safe_open(tmp_path / found.file_of(name), framework="pt") as file:
            assert name in set(file.keys())


def test_spec_counts_bytes():
    assert TensorSpec(torch.bfloat16, (3, 5)).nbytes == 30
    assert TensorSpec(torch.float64, ()).nbytes == 8
    assert TensorSpec(torch.int32, (4, 0)).nbytes == 0


def test_only_named_files_are_opened(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "one.safetensors")
    (tmp_path / "two.safetensors").write_bytes(b"rubbish")
    assert set(Checkpoint(tmp_path, ["one.safetensors"])) == {"x"}


def refusal(folder, files=None):
    with pytest.raises(QuantkitError) as caught:
        Checkpoint(folder, files)
    assert caught.value.hint
    return caught.value.message


def write_index(folder, *files):
    weight_map = {f"x{i}": file for i, file in enumerate(files)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_a_missing_shard_is_refused(tmp_path):
    files = write(tmp_path, tensors(), 100)
    (tmp_path / files[1]).unlink()
    assert f"{INDEX} names {files[1]}" in refusal(tmp_path)


def test_a_named_file_that_is_missing_is_refused(tmp_path):
    assert "gone.safetensors" in refusal(tmp_path, ["gone.safetensors"])


def test_a_file_that_the_system_does_not_map_is_read_tensor_by_tensor(tmp_path, monkeypatch):
    """As Linux refuses to map files that are larger than its memory."""
    content = tensors() | {"none": torch.empty(0, 3)}
    save_file(content, tmp_path / "model.safetensors")

    def refusing(path, framework):
        if framework == "pt":
            raise RuntimeError(f"unable to mmap 27103602256 bytes from file <{path}>")
        return safe_open(path, framework)

    monkeypatch.setattr(weight_file, "safe_open", refusing)
    before = (tmp_path / "model.safetensors").read_bytes()
    found = Checkpoint(tmp_path)
    assert {name: found.spec(name) for name in found} == specs(content)
    for name in found:
        assert_same(found.get(name), content[name])
    for name in found:
        found.get(name).zero_()
    found.release()
    for name in found:
        assert_same(found.get(name), content[name])
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_link_that_leads_nowhere_is_refused(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    assert "model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("form", ["../{}", "{folder}/{}", "sub/{}", "..", ".", 7, None])
def test_an_index_cannot_lead_out_of_the_folder(tmp_path, form):
    outside, folder = tmp_path / "secret.safetensors", tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    save_file({"x0": torch.ones(1)}, outside)
    save_file({"x0": torch.ones(1)}, folder / "sub" / outside.name)
    name = form.format(outside.name, folder=tmp_path) if isinstance(form, str) else form
    write_index(folder, name)
    assert "outside" in refusal(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": []}', "null", "\xff"])
def test_an_index_that_is_none_is_refused(tmp_path, content):
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_bytes(content.encode("latin-1"))
    assert "index" in refusal(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    save_file({"x": torch.ones(100)}, tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(raw[:kept])
    assert "truncated" in refusal(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all",
        b'{"x":{"dtype":"F32","shape":[100],"data_offsets":[0,4000]}}',
        b'{"x":{"dtype":"F32","shape":[100],"data_offsets":[0,396]}}',
        b'{"x":{"dtype":"F99","shape":[100],"data_offsets":[0,400]}}',
    ],
    ids=["text", "past the end", "size and shape disagree", "no such dtype"],
)
def test_a_corrupt_header_is_refused(tmp_path, header):
    raw = struct.pack("<Q", len(header)) + header + bytes(400)
    (tmp_path / "model.safetensors").write_bytes(raw)
    assert "model.safetensors" in refusal(tmp_path)


def test_a_header_of_absurd_length_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + bytes(400))
    assert "model.safetensors" in refusal(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    """Of one set of shards. (Files of two sets are never read together.)"""
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({"x": torch.ones(1), "y": torch.ones(1)}, tmp_path / files[0])
    save_file({"x": torch.ones(1)}, tmp_path / files[1])
    message = refusal(tmp_path)
    assert all(word in message for word in ("tensor x", *files))


def test_an_index_hides_files_that_it_does_not_name(tmp_path):
    save_file({"x0": torch.ones(1)}, tmp_path / "model.safetensors")
    save_file({"x0": torch.ones(1)}, tmp_path / "old.safetensors")
    write_index(tmp_path, "model.safetensors")
    assert Checkpoint(tmp_path).files == ["model.safetensors"]


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model-Q4_0.gguf"])
def test_weights_in_another_format_are_named(tmp_path, file):
    (tmp_path / file).write_bytes(b"x")
    assert file in refusal(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    assert "no model weights" in refusal(tmp_path)


def test_a_folder_where_a_file_should_be_is_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    assert "not a regular file" in refusal(tmp_path)


def test_a_dtype_that_quantkit_does_not_know_is_named(tmp_path):
    save_file({"x": torch.ones(4).to(torch.float8_e8m0fnu)}, tmp_path / "model.safetensors")
    with pytest.raises(QuantkitError, match="F8_E8M0"):
        Checkpoint(tmp_path).spec("x")


# small files


def test_write_json_is_readable_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"name": "日本語", "n": 1})
    assert json.loads(path.read_text("utf-8")) == {"name": "日本語", "n": 1}
    assert "日本語" in path.read_text("utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_write_json_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch, broken):
    path = tmp_path / "config.json"
    write_json(path, {"version": "old"})

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(checkpoint.os, broken, fail)
    with pytest.raises(OSError, match="full"):
        write_json(path, {"version": "new"})
    assert json.loads(path.read_text()) == {"version": "old"}


def test_write_json_shows_the_new_file_only_when_it_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_json(path, {"version": "old"})
    seen = []

    def replace(new, old):
        seen.append((json.loads(new.read_text()), json.loads(old.read_text())))

    monkeypatch.setattr(checkpoint.os, "replace", replace)
    write_json(path, {"version": "new"})
    assert seen == [({"version": "new"}, {"version": "old"})]


def test_write_json_of_what_is_no_json_changes_nothing(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"version": "old"})
    with pytest.raises(TypeError):
        write_json(path, {"version": object()})
    assert json.loads(path.read_text()) == {"version": "old"}
