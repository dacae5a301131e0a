"""Models from the Hub: the real client against a server on this machine."""

import json
import os
import random
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import httpx2
import pytest
from checkpoints import as_legacy, opened
from hub_answers import Handler
from hub_store import READER, sha256
from huggingface_hub import constants
from tools import model, quantized

from quantkit.core import hub as client
from quantkit.core import pull as pulling
from quantkit.core import ranges
from quantkit.core.needed import needed
from quantkit.core.source import resolve
from quantkit.errors import QuantkitError

BIG = os.urandom(1 << 20)
WANTED = {"config.json", "generation_config.json", "model.safetensors", "LICENSE", "README.md"}
WANTED |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "qwen.tiktoken"}
TINY = "somebody/tiny"
USAGE = namedtuple("usage", "total used free")


@pytest.fixture(autouse=True)
def in_pieces(monkeypatch):
    """Weights of some KB are large, and have several pieces."""
    monkeypatch.setattr(pulling, "LARGE", 10_000)
    monkeypatch.setattr(ranges, "PIECE", 1 << 16)


@pytest.fixture
def tiny(hub):
    """One repository with three branches -> its files on main."""
    files = {p.name: p.read_bytes() for p in model("gpt_neox").iterdir()}
    config = json.loads(files["config.json"])
    config["transformers_version"] = "0.0.2"
    beside = {"README.md": b"# tiny", "LICENSE": b"Apache-2.0", "qwen.tiktoken": b"dGhl 0"}
    pickles = {"pytorch_model.bin": b"pickle", "training.pt": b"pickle"}
    copies = {"consolidated.safetensors": b"again", "original/model.safetensors": b"again"}
    others = {"model.onnx": b"o", "tf_model.h5": b"h", "pytorch_model.bin.index.json": b"{}"}
    main = {**files, **beside, **pickles, **copies, **others}
    hub.add(TINY, main)
    hub.add(TINY, {**files, "config.json": json.dumps(config).encode()}, "v2")
    hub.add(TINY, {**files, "config.json": b"{}"}, "feature/x")
    return main


def commit(hub, branch="main", name=TINY):
    return hub.repositories[name].branches[branch]


def names(source) -> set[str]:
    return {path.name for path in source.folder.iterdir()}


def test_a_repository_is_downloaded_without_pickles_and_copies(hub, tiny, monkeypatch):
    found = resolve(TINY)
    assert (found.name, found.revision, found.file) == (TINY, commit(hub), None)
    assert names(found) == WANTED
    for name in WANTED:
        assert (found.folder / name).read_bytes() == tiny[name], name
    # the second time nothing is downloaded again
    hub.seen.clear()
    assert resolve(TINY) == found
    assert not hub.fetched()
    # and without any network it is found where it is
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve(TINY) == found
    with pytest.raises(QuantkitError, match="the Hub cannot be reached"):
        resolve("some/other")
    (found.folder / "model.safetensors").unlink()
    with pytest.raises(QuantkitError, match="the Hub cannot be reached"):
        resolve(TINY)


def test_a_branch_by_option_or_by_name(hub, tiny):
    one = resolve(TINY, "v2")
    assert one == resolve(f"{TINY}@v2") == resolve(f"{TINY}@{commit(hub, 'v2')}")
    assert one == resolve(f"{TINY}@main", "v2")  # the option decides
    assert (one.name, one.revision) == (TINY, commit(hub, "v2"))
    assert one.read_json("config.json")["transformers_version"] == "0.0.2"
    assert resolve(f"{TINY}@feature/x").revision == commit(hub, "feature/x")


def test_all_files_are_of_one_commit_when_the_branch_moves_meanwhile(hub, tiny):
    before, moved = commit(hub), []

    def move(handler: Handler) -> bool:
        if "/tree/" in handler.path_ and not moved:
            moved.append(hub.add(TINY, dict.fromkeys(tiny, BIG)))
        return False

    hub.instead = move
    found = resolve(TINY)
    assert moved and found.revision == before != commit(hub)
    for name in WANTED:
        assert (found.folder / name).read_bytes() == tiny[name], name


# what is needed

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
GGUF = ["m.Q4_0.gguf", "m.Q8_0.gguf"]


@pytest.mark.parametrize(
    ("held", "basename", "weights"),
    [
        ([*SHARDS, INDEX, "consolidated.00.pth"], None, [INDEX, *SHARDS]),
        ([*SHARDS, INDEX, "consolidated.safetensors"], None, [INDEX, *SHARDS]),
        (["pytorch_model.bin", "training_args.bin"], None, ["pytorch_model.bin"]),
        (["pytorch_model.bin", *SHARDS], None, SHARDS),
        (["part-a.safetensors", "part-b.safetensors", INDEX], None, "all"),
        (["gptq_model-4bit-128g.safetensors"], None, ["gptq_model-4bit-128g.safetensors"]),
        (["a.safetensors", "b.safetensors"], "b", ["b.safetensors"]),
        (GGUF, "m.Q8_0", ["m.Q8_0.gguf"]),
        (["model.safetensors", *GGUF], "m.Q4_0", ["m.Q4_0.gguf"]),
        (["model.safetensors", *GGUF], None, ["model.safetensors"]),
        (["m.Q4_0.gguf"], None, ["m.Q4_0.gguf"]),
    ],
)
def test_one_set_of_weights_is_needed(held, basename, weights):
    found = needed("some/model", ["config.json", "README.md", *held], basename)
    assert [name for name in found if name in held] == (
        held[-1:] + held[:-1] if weights == "all" else weights
    )
    assert "README.md" in found
    assert ("config.json" in found) != found[-1].endswith(".gguf")


@pytest.mark.parametrize(
    ("held", "basename", "message", "hint"),
    [
        (GGUF, None, "several sets of weights: m.Q4_0.gguf, m.Q8_0.gguf", "some/model/m.Q4_0.gguf"),
        (["a.safetensors", "b.safetensors"], None, "several sets of weights", "--model-basename"),
        (GGUF, "q", "no weights with the model_basename 'q'", "without its ending"),
        (["model.onnx"], None, "has no weights", "is this a model"),
        ([], "q", "has no weights", "is this a model"),
    ],
)
def test_weights_that_cannot_be_chosen(held, basename, message, hint):
    with pytest.raises(QuantkitError, match=message) as caught:
        needed("some/model", ["config.json", *held], basename)
    assert hint in caught.value.hint


def test_one_file_of_a_repository(hub):
    one, other = b"GGUF one" * 3000, b"GGUF other" * 3000
    files = {"m.Q4_0.gguf": one, "m.Q8_0.gguf": other, "README.md": b"# m", "config.json": b"{}"}
    hub.add("some/ggufs", {**files, "deep/m.Q2_K.gguf": b"GGUF deep", "deep/LICENSE": b"MIT"})
    found = resolve("some/ggufs/m.Q8_0.gguf")
    assert (found.name, found.file) == ("some/ggufs", "m.Q8_0.gguf")
    assert names(found) == {"m.Q8_0.gguf", "README.md"}
    assert found == resolve("some/ggufs", None, "m.Q8_0")
    assert (found.folder / found.file).read_bytes() == other
    deep = resolve("some/ggufs/deep/m.Q2_K.gguf@main")
    assert (deep.file, deep.folder.name, names(deep)) == (
        "m.Q2_K.gguf",
        "deep",
        {"m.Q2_K.gguf", "LICENSE"},
    )
    hub.add("some/ggufs", {"a[b].gguf": one, "ab.gguf": other})  # a name, not a pattern
    assert names(resolve("some/ggufs/a[b].gguf")) == {"a[b].gguf"}
    with pytest.raises(QuantkitError, match="has no file m"):
        resolve("some/ggufs/m.gguf")


def test_a_repository_of_pickles_alone(hub):
    import torch
    from safetensors.torch import load_file

    files = {p.name: p.read_bytes() for p in model("llama").iterdir()}
    tensors = load_file(model("llama") / "model.safetensors")
    del files["model.safetensors"]
    torch.save(tensors, pickled := Path(os.environ.get("TMPDIR", "/tmp")) / f"{os.getpid()}.bin")
    hub.add("some/pickles", {**files, "pytorch_model.bin": pickled.read_bytes()})
    pickled.unlink()
    found = resolve("some/pickles")
    assert set(opened(found.folder).dense) == set(tensors)


# what is not there, or not for everybody


def test_what_is_not_there_is_named(hub, tiny):
    with pytest.raises(QuantkitError, match=r"nobody/nothing here.*no such repository") as caught:
        resolve("nobody/nothing")
    assert "hf auth login" in caught.value.hint
    with pytest.raises(QuantkitError) as caught:
        resolve(f"{TINY}@v7")
    assert caught.value.message == f"{TINY} has no revision 'v7'"


def test_a_private_repository_needs_a_token(hub, tiny, monkeypatch):
    hub.repositories[TINY].private = True
    with pytest.raises(QuantkitError, match="no such repository") as caught:
        resolve(TINY)
    assert "for a private repository run 'hf auth login'" in caught.value.hint
    monkeypatch.setenv("HF_TOKEN", READER)
    assert names(resolve(TINY)) == WANTED  # the storage saw no token, or it would have complained
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    hub.instead = lambda h: not h.refuse(401, "", "Invalid credentials in Authorization header")
    with pytest.raises(QuantkitError, match="does not accept the token") as caught:
        resolve("some/other")
    assert "hf_x" not in caught.value.message


@pytest.mark.parametrize("place", ["api", "files"])
def test_a_gated_repository(hub, tiny, place):
    hub.repositories[TINY].gated = place
    with pytest.raises(QuantkitError, match="is gated") as caught:
        resolve(TINY)
    assert "accept its terms on its Hub page" in caught.value.hint


# faults


def test_a_disk_that_is_too_small(hub, tiny, monkeypatch):
    tight = USAGE(0, 0, (64 << 20) + 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: tight)
    with pytest.raises(QuantkitError, match=r"needs .* GB more in .*cache") as caught:
        resolve(TINY)
    assert "--low-disk" in caught.value.hint
    assert not hub.fetched()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("reset", [False, True])
def test_connections_that_are_cut_at_random_bytes(hub, tiny, seed, reset):
    """Every answer with weights breaks off at least once."""
    hub.add(TINY, {**tiny, "model.safetensors": BIG})
    chance, cut = random.Random(seed), set()

    def break_off(handler: Handler) -> bool:
        wanted = handler.headers.get("Range")
        if not wanted or "/resolve/" not in handler.path_ or wanted in cut:
            return False
        cut.add(wanted)
        handler.send_half(bytes(chance.randrange(1, 1 << 16)), 1 << 16, reset)
        return True

    hub.instead = break_off
    found = resolve(TINY)
    assert len(cut) == len(BIG) >> 16
    assert (found.folder / "model.safetensors").read_bytes() == BIG


def test_a_download_that_failed_goes_on_when_repeated(hub, tiny, monkeypatch):
    hub.add(TINY, {**tiny, "model.safetensors": BIG})
    half = f"bytes={len(BIG) // 2}-"
    down = lambda h: (h.headers.get("Range") or "").startswith(half)  # noqa: E731
    hub.instead = lambda h: down(h) and not h.send_half(b"", 1 << 16, reset=True)
    with pytest.raises(QuantkitError, match=f"downloading {TINY} failed") as caught:
        resolve(TINY)
    assert caught.value.hint == "run the same command again to continue"
    hub.instead = lambda h: False
    hub.seen.clear()
    # the disk has to hold only what is missing
    rest = sum(len(tiny[name]) for name in WANTED - {"model.safetensors"}) + len(BIG) // 2
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: USAGE(0, 0, (64 << 20) + rest))
        found = resolve(TINY)
        patch.setattr(shutil, "disk_usage", lambda path: USAGE(0, 0, 0))
        assert resolve(TINY) == found
    assert (found.folder / "model.safetensors").read_bytes() == BIG
    starts = {int(wanted[6:].partition("-")[0]) for _, wanted in hub.fetched() if wanted}
    assert min(starts) == len(BIG) // 2
    assert not list(found.folder.parents[1].glob("blobs/*.part*"))


def test_two_at_once_fetch_everything_once(hub, tiny):
    with ThreadPoolExecutor(2) as both:
        one, other = both.map(resolve, [TINY, TINY])
    assert one == other
    pieces = [wanted for file, wanted in hub.fetched() if file == "model.safetensors" and wanted]
    assert len(pieces) == 2 * len(set(pieces))  # of the two servers


@pytest.mark.parametrize("fault", ["damaged", "short", "whole"])
def test_bytes_that_are_not_those_of_the_listing(hub, tiny, fault):
    hub.add(TINY, {**tiny, "model.safetensors": BIG})

    def wrong(handler: Handler) -> bool:
        if not handler.headers.get("Range") or handler.headers["Host"] in hub.endpoint:
            return False
        if fault == "damaged":
            handler.send_file(BIG[:-1] + bytes([BIG[-1] ^ 1]), {})
        elif fault == "short":
            told = f"bytes {handler.headers['Range'].removeprefix('bytes=')}/{len(BIG)}"
            handler.send(206, b"few", {"Content-Range": told})
        else:
            handler.send(200, BIG)
        return True

    hub.instead = wrong
    message = "arrived damaged" if fault == "damaged" else "did not send the 65536 bytes"
    with pytest.raises(QuantkitError, match=message):
        resolve(TINY)
    hub.instead = lambda h: False
    assert (resolve(TINY).folder / "model.safetensors").read_bytes() == BIG


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_waited_for(hub, tiny, status):
    """Every address answers with an error twice before it works."""
    asked: dict[tuple[str, str | None], int] = {}

    def busy(handler: Handler) -> bool:
        if handler.path_.startswith("api/") or handler.headers["Host"] in hub.storage:
            key = (handler.path_, handler.headers.get("Range"))
            asked[key] = asked.get(key, 0) + 1
            if asked[key] <= 2:
                handler.refuse(status, "", "later")
                return True
        return False

    hub.instead = busy
    assert names(resolve(TINY)) == WANTED
    assert len(asked) > 3


def test_a_hub_that_says_when_to_come_again(hub, tiny, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    asked: set[str] = set()

    def busy(handler: Handler) -> bool:
        wanted = handler.headers.get("Range")
        if not wanted or wanted in asked:
            return False
        asked.add(wanted)
        handler.refuse(429, "", "later", **{"Retry-After": "7"})
        return True

    hub.instead = busy
    assert names(resolve(TINY)) == WANTED
    assert slept.count(7.0) == len(asked) > 1


def test_what_waiting_would_not_help(hub, tiny, monkeypatch):
    """A repository that is not there, one that is closed, and a Hub that cannot be reached."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    hub.repositories[TINY].gated = "api"
    for name in ("nobody/nothing", TINY):
        with pytest.raises(QuantkitError):
            resolve(name)
    with pytest.raises(httpx2.ConnectError):
        client.patiently(Mock(side_effect=httpx2.ConnectError("no route")))
    assert not slept


def test_a_hub_that_stays_down(hub, tiny):
    hub.instead = lambda h: not h.refuse(503, "", "later")
    with pytest.raises(QuantkitError, match="the Hub cannot be reached"):
        resolve("some/model")
    hub.instead = lambda h: "/resolve/" in h.path_ and not h.refuse(503, "", "later")
    with pytest.raises(QuantkitError, match=f"downloading {TINY} failed") as caught:
        resolve(TINY)
    assert "\n" not in caught.value.message


def test_a_full_disk_is_a_sentence_and_the_download_goes_on(hub, tiny, monkeypatch):
    hub.add(TINY, {**tiny, "model.safetensors": BIG})
    original = ranges.Remote.pieces

    def fill(self, start, stop):
        for index, piece in enumerate(original(self, start, stop)):
            if index == 4:
                raise OSError(28, "No space left on device")
            yield piece

    monkeypatch.setattr(ranges.Remote, "pieces", fill)
    with pytest.raises(QuantkitError, match="No space left"):
        resolve(TINY)
    monkeypatch.setattr(ranges.Remote, "pieces", original)
    hub.seen.clear()
    assert sha256((resolve(TINY).folder / "model.safetensors").read_bytes()) == sha256(BIG)
    assert min(int(r[6:].partition("-")[0]) for _, r in hub.fetched() if r) == 4 << 16


# the variants of a repository


def test_a_branch_of_a_legacy_gptq_repository_generates(hub):
    """One branch per variant, as of TheBloke's repositories; the one with act-order in groups."""
    from quantkit import generate

    branch, name = "gptq-4bit-32g-actorder_True", "TheBloke/demo-GPTQ"
    variants = {"main": {}, branch: {"group": 32, "act_order": "group"}}
    made = {at: quantized(**settings) for at, settings in variants.items()}
    for at, folder in made.items():
        hub.add(name, as_legacy(folder), at)

    def text(*arguments, **more):
        return generate(
            *arguments, "Once upon", max_new_tokens=8, chat=False, temperature=0, **more
        ).text

    texts = {at: text(name, revision=at) for at in variants}
    assert text(f"{name}@{branch}", model_basename="gptq_model-4bit-32g") == texts[branch]
    assert texts == {at: text(str(folder)) for at, folder in made.items()}
