"""Models that stay on the Hub while they are quantized: ``--low-disk``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub import Hub
from hub_store import sha256
from huggingface_hub import constants
from tools import QUICK, command, model, sentence

from quantkit import quantize
from quantkit.core import pull as pulling
from quantkit.core import ranges
from quantkit.core.checkpoint import Checkpoint
from quantkit.core.source import resolve
from quantkit.errors import QuantkitError
from quantkit.workflows.bnb import quantize_bnb
from quantkit.workflows.gguf import quantize_gguf
from quantkit.workflows.rtn import quantize_rtn

TINY, WEIGHTS = "somebody/tiny", "model.safetensors"


@pytest.fixture(autouse=True)
def in_pieces(monkeypatch):
    """Weights of some KB are large, and have several pieces."""
    monkeypatch.setattr(pulling, "LARGE", 10_000)
    monkeypatch.setattr(ranges, "PIECE", 1 << 18)


def weights_here(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob(WEIGHTS))


def moved(hub: Hub) -> int:
    """Bytes of weights that were asked for, in ranges alone; each from two servers."""
    wanted = [wanted for file, wanted in hub.fetched() if file == WEIGHTS]
    assert wanted and None not in wanted
    ends = [one.removeprefix("bytes=").split("-") for one in wanted]
    return sum(int(stop) - int(start) + 1 for start, stop in ends) // 2


def test_low_disk_quantizes_what_stays_on_the_hub(hub, tmp_path, monkeypatch):
    """The same bytes as from the disk; no weight file comes, no tensor's bytes come three times."""
    monkeypatch.setattr(pulling, "LARGE", 1 << 30)  # small ones are left there, too
    source = model("gpt_neox")
    hub.add_folder(TINY, source)
    raw = (source / "model.safetensors").read_bytes()
    settings = {**QUICK, "group": 32}
    local = quantize(str(source), tmp_path / "local", **settings).folder
    held = quantize(TINY, tmp_path / "streamed", low_disk=True, **settings).folder
    name = "model.safetensors"
    assert (held / name).read_bytes() == (local / name).read_bytes()
    assert (held / "config.json").read_bytes() == (local / "config.json").read_bytes()
    recorded = json.loads((held / "quantkit.json").read_text("utf-8"))["source"]
    assert recorded["files"][name] == sha256(raw)
    assert recorded["bytes"] == len(raw)
    assert not weights_here(tmp_path)
    assert moved(hub) < 2 * len(raw)
    # what is on the disk is read there
    resolve(TINY)
    hub.seen.clear()
    again = quantize(TINY, tmp_path / "again", low_disk=True, **settings).folder
    assert (again / name).read_bytes() == (local / name).read_bytes()
    assert not hub.fetched()


def test_low_disk_is_killed_and_goes_on(hub, tmp_path):
    hub.add_folder(TINY, model("gpt_neox"))
    settings = {**QUICK, "group": 32, "low_disk": True}
    whole = quantize(TINY, tmp_path / "whole", **settings).folder
    count = len(hub.fetched())
    hub.seen.clear()
    down = lambda h: len(hub.fetched()) > count * 3 // 4  # noqa: E731
    hub.instead = lambda h: down(h) and not h.refuse(503, "", "later")
    with pytest.raises(QuantkitError):
        quantize(TINY, tmp_path / "out", **settings)
    hub.instead = lambda h: False
    again = quantize(TINY, tmp_path / "out", **settings).folder
    name = "model.safetensors"
    assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_low_disk_is_refused_where_it_means_nothing(hub, monkeypatch):
    with pytest.raises(QuantkitError, match="on this disk already"):
        resolve("demo", low_disk=True)
    hub.add("some/pickles", {"config.json": b"{}", "pytorch_model.bin": b"0" * 20_000})
    with pytest.raises(QuantkitError, match="cannot be read in parts"):
        resolve("some/pickles", low_disk=True)
    hub.add_folder(TINY, model("gpt_neox"))
    resolve(TINY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(QuantkitError, match="--low-disk needs the Hub"):
        resolve(TINY, low_disk=True)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff" * 8,
        (1 << 62).to_bytes(8, "little"),
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{",
    ],
)
def test_a_header_that_is_none(hub, header):
    hub.add(TINY, {"config.json": b"{}", "model.safetensors": header.ljust(20_000, b" ")})
    found = resolve(TINY, low_disk=True)
    with pytest.raises(QuantkitError, match="is not a safetensors file"):
        Checkpoint(found.folder, remote=found.remote)


@pytest.mark.parametrize("place", [[0, 9], [-4, 12], [19_990, 20_006], [8, 0]])
def test_a_tensor_that_cannot_be_where_the_header_says(hub, place):
    entry = {"a": {"dtype": "F32", "shape": [4], "data_offsets": place}}
    header = json.dumps(entry).encode()
    raw = len(header).to_bytes(8, "little") + header + bytes(19_000)
    hub.add(TINY, {"config.json": b"{}", "model.safetensors": raw})
    found = resolve(TINY, low_disk=True)
    with pytest.raises(QuantkitError, match="puts a where it cannot be"):
        Checkpoint(found.folder, remote=found.remote)


def streamed(hub, dtype: str):
    entry = {"a": {"dtype": dtype, "shape": [4096], "data_offsets": [0, 16384]}}
    header = json.dumps(entry).encode()
    hub.add(TINY, {"model.safetensors": len(header).to_bytes(8, "little") + header + bytes(16384)})
    found = resolve(TINY, low_disk=True)
    return Checkpoint(found.folder, remote=found.remote)


def test_a_dtype_that_is_not_read(hub):
    with pytest.raises(QuantkitError, match="tensor a has the dtype F4"):
        streamed(hub, "F4")


def test_a_tensor_is_kept_until_it_is_released(hub):
    """Asked for twice it comes once; released, its memory is free and it comes again."""
    held = streamed(hub, "F32")
    first = held.get("a")
    count = len(hub.fetched())
    assert held.get("a") is first and len(hub.fetched()) == count
    held.release()
    assert held.get("a") is not first and len(hub.fetched()) > count


# how often linears and everything else come; what stays plain is read again, to be compared
ROUNDERS: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[int, int]]] = {
    "rtn": (quantize_rtn, {"group": 32}, (1, 2)),
    "rtn into gguf": (quantize_rtn, {"format": "gguf:q8_0"}, (1, 2)),
    "nf4": (quantize_bnb, {"double_quant": False}, (1, 2)),
    "nf4, nested": (quantize_bnb, {}, (2, 2)),
    "q4_0": (quantize_gguf, {**QUICK, "check": True}, (2, 3)),  # for the check, too
    "q8_0": (quantize_gguf, {"type": "q8_0"}, (1, 2)),
    "f16": (quantize_gguf, {"type": "f16"}, (2, 2)),
}


@pytest.mark.parametrize("name", ROUNDERS)
def test_low_disk_of_what_reads_tensor_by_tensor(hub, tmp_path, name):
    """The same bytes as from the disk; no weight file comes, and no byte too often."""
    rounder, settings, times = ROUNDERS[name]
    hub.add_folder(TINY, model("gpt_neox"))
    plain = Checkpoint(model("gpt_neox"))
    linears = [n for n in plain if "layers." in n and len(plain.spec(n).shape) == 2]
    inside = sum(plain.spec(name).nbytes for name in linears)
    headers = plain.nbytes - sum(plain.spec(name).nbytes for name in plain)
    streamed = rounder(TINY, tmp_path / "streamed", low_disk=True, **settings).folder
    assert not weights_here(tmp_path)
    most = times[0] * inside + times[1] * (plain.nbytes - inside) + 2 * headers
    assert moved(hub) <= most
    local = rounder(TINY, tmp_path / "local", **settings).folder
    assert weights_here(tmp_path)
    for path in local.iterdir():
        if path.name not in ("quantkit.json", "README.md"):
            assert (streamed / path.name).read_bytes() == path.read_bytes(), path.name
    sources = [
        json.loads((folder / "quantkit.json").read_text("utf-8"))["source"]["files"]
        for folder in (streamed, local)
    ]
    assert sources[0] == sources[1] and WEIGHTS in sources[0]


@pytest.mark.parametrize("name", ["rtn", "q4_0"])
def test_low_disk_without_calibration_is_cut_off_and_goes_on(hub, tmp_path, name):
    rounder, settings, _ = ROUNDERS[name]
    hub.add_folder(TINY, model("gpt_neox"))
    whole = rounder(TINY, tmp_path / "whole", low_disk=True, **settings).folder
    count = len(hub.fetched())
    hub.seen.clear()
    hub.instead = lambda h: len(hub.fetched()) > count // 2 and not h.refuse(404, "", "gone")
    with pytest.raises(QuantkitError):
        rounder(TINY, tmp_path / "out", low_disk=True, **settings)
    assert not (tmp_path / "out").exists()
    hub.instead = lambda h: False
    again = rounder(TINY, tmp_path / "out", low_disk=True, **settings).folder
    (file,) = [path for path in again.iterdir() if path.suffix in (".safetensors", ".gguf")]
    assert file.read_bytes() == (whole / file.name).read_bytes()


@pytest.mark.parametrize("name", ["rtn", "bnb", "gguf"])
def test_low_disk_on_the_command_line(hub, tmp_path, name):
    hub.add_folder(TINY, model("gpt_neox"))
    kind = {"rtn": ["-g", 32], "bnb": [], "gguf": ["--type", "q8_0"]}[name]
    assert command(name, TINY, "--out", tmp_path / "out", "--low-disk", "-q", *kind) == 0
    assert not weights_here(tmp_path)


def test_low_disk_and_what_needs_a_whole_file(hub, tmp_path, capsys):
    hub.add_folder(TINY, model("gpt_neox"))
    for arguments, message in (
        (("gguf", "--type", "q4_k_m"), "larger than the original"),
        (("gptq", "-g", 32, "--calib", "self"), "needs the whole model"),
    ):
        name, *options = arguments
        assert command(name, TINY, "--out", tmp_path / "out", "--low-disk", *options) == 2
        told, hint = sentence(capsys.readouterr().err)
        assert message in told and "--low-disk" in hint
    assert not (tmp_path / "out").exists()
