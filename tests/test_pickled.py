"""Files of torch.save are read when they hold plain tensors, and are never executed."""

import collections
import io
import json
import os
import pickle
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from quantkit.core import pickled
from quantkit.core.checkpoint import Checkpoint, TensorSpec
from quantkit.errors import QuantkitError


def tensors():
    g = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4, generator=g),
        "a.transposed": torch.randn(4, 3, generator=g).T,
        "a.half": torch.randn(7, generator=g).half(),
        "b.four": torch.randn(2, 3, 4, 5, generator=g).bfloat16(),
        "b.parameter": torch.nn.Parameter(torch.randn(3, generator=g)),
        "b.scalar": torch.tensor(1.5, dtype=torch.float64),
        "b.empty": torch.empty(0, 4),
        "b.qweight": torch.arange(6, dtype=torch.int32),
        "b.part": torch.arange(100)[20:30],
        "b.short": torch.tensor([-300], dtype=torch.int16),
        "b.codes": torch.tensor([1, 255], dtype=torch.uint8),
        "b.signed": torch.tensor([-1], dtype=torch.int8),
        "b.flags": torch.tensor([True, False]),
    }


def assert_holds(found, content):
    assert set(found) == set(content)
    for name, tensor in content.items():
        assert found.spec(name) == TensorSpec.of(tensor)
        got = found.get(name)
        assert torch.equal(got, tensor)
        assert got.dtype == tensor.dtype
        assert got.is_contiguous()
        assert not got.requires_grad


def refusal(path):
    with pytest.raises(QuantkitError) as caught:
        pickled.load(path)
    assert str(path) in caught.value.message
    assert caught.value.hint
    return caught.value.message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "llama7b-4bit-128g.pt"])
def test_a_checkpoint_reads_what_torch_saved(tmp_path, name):
    torch.save(tensors(), tmp_path / name)
    found = Checkpoint(tmp_path)
    assert found.files == [name]
    assert_holds(found, tensors())


def test_state_dicts_with_metadata_and_tied_tensors_are_read(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 3))
    model[2].weight = model[0].weight
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_holds(Checkpoint(tmp_path), model.state_dict())


def test_data_is_mapped_and_not_read(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"x": torch.zeros(8)}, path)
    found = Checkpoint(tmp_path)
    before = path.read_bytes()
    at = before.index(bytes(32))
    with path.open("r+b") as file:
        file.seek(at)
        file.write(torch.ones(8).numpy().tobytes())
    assert torch.equal(found.get("x"), torch.ones(8))


# never executed


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def archive(path, program, compression=zipfile.ZIP_STORED, **others):
    """A zip file as torch lays it out, with any pickle."""
    with zipfile.ZipFile(path, "w", compression) as made:
        made.writestr("archive/data.pkl", program)
        made.writestr("archive/version", "3\n")
        for name, content in others.items():
            made.writestr(f"archive/{name}", content)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("form", ["torch", "bare", "zip"])
def test_a_pickle_that_runs_code_does_not(tmp_path, form, protocol):
    marker, path = tmp_path / "executed", tmp_path / "pytorch_model.bin"
    content = {"x": torch.ones(2), "y": Evil(marker)}
    program = pickle.dumps({"y": Evil(marker)}, protocol)
    pickle.loads(program)
    assert marker.exists()  # it would
    marker.rmdir()
    if form == "torch":
        torch.save(content, path, pickle_protocol=protocol)
    elif form == "bare":
        path.write_bytes(program)
    else:
        archive(path, program)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's are not for our users
        refusal(path)
        with pytest.raises(QuantkitError):
            Checkpoint(tmp_path)
    assert not marker.exists()


def test_the_object_that_is_asked_for_is_named(tmp_path):
    torch.save({"x": Evil(tmp_path / "executed")}, tmp_path / "x.bin")
    message = refusal(tmp_path / "x.bin")
    assert f"{os.mkdir.__module__}.mkdir" in message
    assert "weights_only" not in message  # torch's advice is to switch the protection off


@pytest.mark.parametrize(
    "value",
    [
        bytearray(3),
        collections.Counter("a"),
        torch.Size([3]),
        torch.eye(3).to_sparse(),
        torch.nn.Linear(2, 2),
        torch.ones(2, dtype=torch.complex64),
        torch.float16,
    ],
    ids=lambda value: type(value).__name__,
)
def test_objects_that_plain_tensors_do_not_need_are_refused(tmp_path, value):
    """torch would load most of them; some let a short file take all memory."""
    torch.save({"x": value}, tmp_path / "x.bin")
    assert "asks for" in refusal(tmp_path / "x.bin")


def allocates(module, name, size):
    """The pickle of ``module.name(size)``."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickle.dumps((size,), 2)[2:-1] + b"R."


@pytest.mark.parametrize(
    ("module", "name"),
    [("__builtin__", "bytearray"), ("torch", "Tensor"), ("torch.storage", "UntypedStorage")],
)
def test_a_pickle_that_takes_memory_is_refused(tmp_path, module, name):
    assert "asks for" in refusal(archive(tmp_path / "x.bin", allocates(module, name, 1 << 44)))


DICT = b"ccollections\nOrderedDict\nq\x02"
PUT_AND_GET = [b"q" + bytes([i]) + b"h" + bytes([i]) for i in range(3, 40)]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (b"}K\x01" + b"".join(x + b"\x86" for x in PUT_AND_GET) + b"Ns.", "tuples"),
        (b"}K\x01" + b"\x85" * 1_000_000 + b"Ns.", "tuples"),
        (b"}(" + b"N" * 1000 + b"tNs.", "tuples"),
        (b"}q\x01(K\x01Nu0" + DICT + b"h\x01\x85R" + b"h\x02h\x01\x85R" * 1000 + b".", "call"),
        (b"]q\x01N\x85a" + DICT + b"h\x01R.", "call"),
        (DICT + b")R}b" + b"h\x02)R}b" * 1000 + b".", "changes"),
        (b"t.", "damaged"),
        (b"}h\x07.", "damaged"),
    ],
    ids=[
        "hash forever",
        "hash too deep",
        "wide",
        "copies",
        "call with a list",
        "build",
        "",
        "memo",
    ],
)
def test_programs_that_take_all_time_or_memory_are_refused(tmp_path, program, said):
    """torch's interpreter would be busy for hours with the first, and the second ends Python."""
    assert said in refusal(archive(tmp_path / "x.bin", b"\x80\x02" + program))


# what is no dictionary of tensors


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.ones(1)], "list"),
        (torch.ones(1), "Tensor"),
        ({"x": torch.ones(1), "step": 5}, "'step'"),
        ({"model": {"x": torch.ones(1)}}, "'model'"),
        ({1: torch.ones(1)}, "int"),
        ({"x": torch.ones(1).expand(10**12)}, "larger"),
    ],
)
def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path, content, said):
    torch.save(content, tmp_path / "x.bin")
    assert said in refusal(tmp_path / "x.bin")


def test_files_before_torch_1_6_are_refused(tmp_path):
    torch.save(tensors(), tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    assert "1.6" in refusal(tmp_path / "x.bin")


def test_newer_pickles_are_refused(tmp_path):
    torch.save(tensors(), tmp_path / "x.bin", pickle_protocol=4)
    assert "protocol 4" in refusal(tmp_path / "x.bin")


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04" + bytes(100), bytes(1000)])
def test_what_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    refusal(tmp_path / "x.bin")


def test_a_missing_file_is_refused(tmp_path):
    refusal(tmp_path / "x.bin")


def test_a_zip_bomb_is_refused(tmp_path):
    path = archive(tmp_path / "x.bin", bytes(64 << 20), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    assert "compressed" in refusal(path)


def test_an_archive_that_claims_more_than_it_has_is_refused(tmp_path):
    path = archive(tmp_path / "x.bin", pickle.dumps({}, 2), data=bytes(1000))
    raw = path.read_bytes()
    path.write_bytes(raw.replace((1000).to_bytes(4, "little"), (1 << 30).to_bytes(4, "little")))
    assert "more than the whole file" in refusal(path)


def test_a_huge_program_is_refused(tmp_path):
    path = archive(tmp_path / "x.bin", b"N" * (5 << 20))
    assert "5 MiB" in refusal(path)


@pytest.mark.parametrize("names", [[], ["a/data.pkl", "b/data.pkl"]])
def test_other_archives_are_refused(tmp_path, names):
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as made:
        for name in ["a/other", *names]:
            made.writestr(name, pickle.dumps({}, 2))
    assert "not one of torch.save" in refusal(tmp_path / "x.bin")


def storage(numel, size, stride, offset=0):
    """The pickle of one float32 tensor ``x`` with these claims about its storage ``0``."""

    class Claim:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (
                Stored(),
                offset,
                size,
                stride,
                False,
                collections.OrderedDict(),
            )

    class Stored:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, value):
            if isinstance(value, Stored):
                return ("storage", torch.FloatStorage, "0", "cpu", numel)
            return None

    held = io.BytesIO()
    Pickler(held, 2).dump({"x": Claim()})
    return held.getvalue()


def claiming(tmp_path, *claims):
    return archive(tmp_path / "x.bin", storage(*claims), **{"data/0": bytes(64)})


def test_claims_that_are_true_are_read(tmp_path):
    assert torch.equal(pickled.load(claiming(tmp_path, 16, (4, 4), (4, 1)))["x"], torch.zeros(4, 4))


@pytest.mark.parametrize(
    "claims",
    [
        (1 << 40, (1 << 40,), (1,)),
        (1 << 62, (1 << 62,), (1,)),
        (16, (1 << 40,), (1,)),
        (16, (1 << 40,), (0,)),
        (16, (17,), (1,)),
        (16, (16,), (1,), 1),
        (16, (16,), (1,), -1),
        (16, (16,), (-1,)),
        (16, (-16,), (1,)),
        (-16, (16,), (1,)),
        (16, (1 << 70,), (1,)),
        ("16", (16,), (1,)),
        (16, ("a",), (1,)),
        (16, (4, 4), (1,)),
        (1.5, (1,), (1,)),
    ],
    ids=str,
)
def test_claims_that_are_false_are_refused(tmp_path, claims):
    refusal(claiming(tmp_path, *claims))


# which files


def save(folder, name, **content):
    torch.save(content, folder / name)


def test_safetensors_go_before_pickles(tmp_path):
    save(tmp_path, "pytorch_model.bin", x=torch.zeros(1))
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    assert Checkpoint(tmp_path).files == ["other.safetensors"]
    assert Checkpoint(tmp_path, basename="pytorch_model").files == ["pytorch_model.bin"]
    assert Checkpoint(tmp_path, ["pytorch_model.bin"]).get("x").item() == 0


def test_shards_of_pickles_are_read_through_their_index(tmp_path):
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    save(tmp_path, names[0], x=torch.ones(1))
    save(tmp_path, names[1], y=torch.ones(1))
    save(tmp_path, "training_args.bin", z=5)
    assert set(Checkpoint(tmp_path)) == {"x", "y"}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip("xy", names))}))
    assert Checkpoint(tmp_path).files == names
    (tmp_path / names[1]).unlink()
    with pytest.raises(QuantkitError, match="not in"):
        Checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "../x.bin"}}))
    with pytest.raises(QuantkitError, match="outside"):
        Checkpoint(tmp_path)


def fill(folder, *names):
    """One tensor a file, called like the file."""
    for name in names:
        content = {name: torch.ones(1)}
        if name.endswith(".safetensors"):
            save_file(content, folder / name)
        else:
            torch.save(content, folder / name)


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("names", "basename", "chosen"),
    [
        (["model.safetensors", "gptq_model-4bit-128g.safetensors"], None, ["model.safetensors"]),
        ([*SHARDS, "consolidated.safetensors"], None, SHARDS),
        (["gptq_model-4bit-128g.safetensors"], None, ["gptq_model-4bit-128g.safetensors"]),
        (
            ["model.safetensors", "gptq_model-4bit-128g.safetensors"],
            "gptq_model-4bit-128g",
            ["gptq_model-4bit-128g.safetensors"],
        ),
        ([*SHARDS, "consolidated.safetensors"], "model", SHARDS),
        (["a.pt", "b.bin"], "a", ["a.pt"]),
        (["a.pt", "a.safetensors"], "a", ["a.safetensors"]),
        (["pytorch_model.bin", "training_args.bin"], None, ["pytorch_model.bin"]),
        (["a-00001-of-00002.pt", "a-00002-of-00002.pt"], None, None),
    ],
)
def test_the_files_of_one_model_are_chosen(tmp_path, names, basename, chosen):
    fill(tmp_path, *names)
    found = Checkpoint(tmp_path, basename=basename)
    assert found.files == (names if chosen is None else chosen)
    assert set(found) == set(found.files)


@pytest.mark.parametrize(
    ("names", "basename", "said"),
    [
        (["a.safetensors", "b.safetensors"], None, "a.safetensors, b.safetensors"),
        (["a.pt", "b.bin"], None, "a.pt, b.bin"),
        (["a.safetensors", "b.bin"], "c", "'c', only a.safetensors, b.bin"),
        (["a.safetensors"], "../a", "'../a'"),
        (["a.safetensors"], "a.safetensors", "'a.safetensors'"),
        (SHARDS[:1], None, "part of the shards"),
    ],
)
def test_a_folder_without_a_single_choice_is_refused(tmp_path, names, basename, said):
    fill(tmp_path, *names)
    with pytest.raises(QuantkitError) as caught:
        Checkpoint(tmp_path, basename=basename)
    assert said in caught.value.message
    if basename is None and len(names) > 1:
        assert "model_basename" in caught.value.hint


def test_a_tensor_in_two_files_of_a_set_is_refused(tmp_path):
    for name in SHARDS:
        save_file({"x": torch.ones(1)}, tmp_path / name)
    with pytest.raises(QuantkitError, match=f"tensor x is in both {SHARDS[0]} and {SHARDS[1]}"):
        Checkpoint(tmp_path)


def test_a_file_that_the_system_does_not_map_is_no_damaged_one(tmp_path, monkeypatch):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, path)

    def refusing(*args, **how):
        raise RuntimeError(f"unable to mmap 27103602256 bytes from file <{path}>")

    monkeypatch.setattr(torch, "load", refusing)
    with pytest.raises(QuantkitError, match="larger than this machine's memory") as caught:
        pickled.load(path)
    assert "safetensors" in caught.value.hint
