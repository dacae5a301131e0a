"""Models from a hub: the real client against a server on this machine that speaks its protocol."""

import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
from tools import model, quantized

BIG = os.urandom(1 << 20)
WANTED = {"config.json", "generation_config.json", "model.safetensors", "LICENSE", "qwen.tiktoken"}
WANTED |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
COMMITS = {"main": "a" * 40, "v2": "b" * 40, "feature/x": "c" * 40}
COMMITS["gptq-4bit-32g-actorder_True"] = "d" * 40
RUN = "from quantkit.cli.main import run; run()"


class Hub:
    """repositories: name -> branch -> file -> content. ``gone`` answers a request in place of the
    server when it returns true; ``seen`` has the method, path and Range of every request."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: dict[str, str] = {}  # repository -> "api" or "files"
        self.seen: list[tuple[str, str, str | None]] = []
        self.instead = lambda handler: False

    def files(self, repository: str, revision: str) -> dict[str, bytes] | None:
        branches = self.repositories[repository]
        by_commit = {COMMITS[branch]: files for branch, files in branches.items()}
        return branches.get(revision) or by_commit.get(revision)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.seen.append((self.command, path, self.headers.get("Range")))
        if self.hub.instead(self):
            return
        if path.startswith("api/models/"):
            self.api(path.removeprefix("api/models/"))
        else:
            self.file(path)

    def api(self, path: str) -> None:
        repository = "/".join(path.split("/")[:2])
        verb, _, revision = path.removeprefix(repository).strip("/").partition("/")
        files = self.find(repository, revision or "main", "api")
        if files is None:
            return
        commit = next(
            COMMITS[branch]
            for branch, content in self.hub.repositories[repository].items()
            if content is files
        )
        if verb == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(raw), "oid": digest(raw)[:40]}
                for name, raw in files.items()
            ]
            self.send(200, json.dumps(entries).encode())
            return
        found = {"id": repository, "modelId": repository, "sha": commit, "private": False}
        siblings = [{"rfilename": name} for name in files]
        self.send(200, json.dumps({**found, "tags": [], "siblings": siblings}).encode())

    def file(self, path: str) -> None:
        repository = "/".join(path.split("/")[:2])
        rest = path.removeprefix(f"{repository}/resolve/")
        revision = next(
            (r for r in (*COMMITS.values(), *COMMITS) if rest.startswith(f"{r}/")), "unknown"
        )
        files = self.find(repository, revision, "files")
        if files is None:
            return
        raw = files[rest.removeprefix(f"{revision}/")]
        headers = {"ETag": f'"{digest(raw)}"', "X-Repo-Commit": COMMITS.get(revision, revision)}
        headers["Accept-Ranges"] = "bytes"
        wanted = self.headers.get("Range")
        if wanted is None:
            self.send(200, raw, headers)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
        headers["Content-Range"] = f"bytes {start}-{len(raw) - 1}/{len(raw)}"
        self.send(206, raw[start:], headers)

    def find(self, repository: str, revision: str, place: str) -> dict[str, bytes] | None:
        """The files, or an answer that says why not."""
        if repository not in self.hub.repositories:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif self.hub.gated.get(repository) == place:
            self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif (files := self.hub.files(repository, revision)) is None:
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            return files
        return None

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def hub() -> Hub:
    """One repository with two branches, one of them with weights that are pickles too."""
    tiny_model = {p.name: p.read_bytes() for p in model("gpt_neox").iterdir()}
    config = json.loads(tiny_model["config.json"])
    config["transformers_version"] = "0.0.2"
    assert tiny_model.keys() | {"LICENSE", "qwen.tiktoken"} == WANTED
    found = Hub()
    found.repositories["somebody/tiny"] = {
        "main": {
            **tiny_model,
            "pytorch_model.bin": b"pickle",
            "training.pt": b"pickle",
            "README.md": b"# tiny",
            "LICENSE": b"Apache-2.0",
            "qwen.tiktoken": b"dGhl 0",
        },
        "v2": {**tiny_model, "config.json": json.dumps(config).encode()},
        "feature/x": {**tiny_model, "config.json": b"{}"},
    }
    return found


CLIENT = """
import json, sys
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # what a broken download keeps
from quantkit.core.source import resolve
from quantkit.errors import QuantkitError
try:
    found = resolve(*json.loads(sys.argv[1]))
except QuantkitError as error:
    print(json.dumps({"message": error.message, "hint": error.hint}))
else:
    print(json.dumps({"name": found.name, "folder": str(found.folder), "at": found.revision}))
"""


def environment(endpoint: str, cache: Path) -> dict[str, str]:
    """Nothing but the server on this machine can be reached."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()
    }
    return kept | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }


def client(endpoint: str, cache: Path, *arguments: str | None, **more: str) -> dict[str, str]:
    """``resolve(*arguments)`` in a process of its own, since the client reads its settings when it
    is imported."""
    result = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(arguments)],
        env=environment(endpoint, cache) | more,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def names(found: dict[str, str]) -> set[str]:
    return {path.name for path in Path(found["folder"]).iterdir()}


def test_a_repository_is_downloaded_without_its_pickles(hub, tmp_path):
    with serving(hub) as endpoint:
        found = client(endpoint, tmp_path, "somebody/tiny")
        assert (found["name"], found["at"]) == ("somebody/tiny", COMMITS["main"])
        expected = hub.repositories["somebody/tiny"]["main"]
        assert names(found) == WANTED
        for name in names(found):
            assert (Path(found["folder"]) / name).read_bytes() == expected[name]
        assert not [path for _, path, _ in hub.seen if path.endswith((".bin", ".pt"))]
        # the second time nothing is downloaded again
        hub.seen.clear()
        assert client(endpoint, tmp_path, "somebody/tiny") == found
        assert not [path for method, path, _ in hub.seen if method == "GET" and "/resolve/" in path]
    # and without any network it is found where it is
    assert client("http://127.0.0.1:9", tmp_path, "somebody/tiny") == found
    assert client(endpoint, tmp_path, "somebody/tiny", HF_HUB_OFFLINE="1") == found


def test_a_branch_by_option_or_by_name(hub, tmp_path):
    with serving(hub) as endpoint:
        one = client(endpoint, tmp_path, "somebody/tiny", "v2")
        two = client(endpoint, tmp_path, "somebody/tiny@v2")
        three = client(endpoint, tmp_path, "somebody/tiny@feature/x")
        four = client(endpoint, tmp_path, "somebody/tiny@main", "v2")  # the option decides
        five = client(endpoint, tmp_path, "somebody/tiny@" + COMMITS["v2"])
    assert one == two == four == five
    assert (one["name"], one["at"]) == ("somebody/tiny", COMMITS["v2"])
    assert (
        json.loads((Path(one["folder"]) / "config.json").read_text())["transformers_version"]
        == "0.0.2"
    )
    assert three["at"] == COMMITS["feature/x"]


def test_what_is_not_there_is_named(hub, tmp_path):
    with serving(hub) as endpoint:
        found = client(endpoint, tmp_path, "nobody/nothing")
        assert "no such repository on the Hub" in found["message"]
        assert "nobody/nothing" in found["message"]
        assert "hf auth login" in found["hint"]
        found = client(endpoint, tmp_path, "somebody/tiny@v7")
        assert found["message"] == "somebody/tiny has no revision 'v7'"
        # a hub does not say whether a private repository exists
        hub.instead = lambda handler: not handler.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        assert "no such repository" in client(endpoint, tmp_path, "some/private")["message"]


@pytest.mark.parametrize("place", ["api", "files"])
def test_a_gated_repository(hub, tmp_path, place):
    hub.gated["somebody/tiny"] = place
    with serving(hub) as endpoint:
        found = client(endpoint, tmp_path, "somebody/tiny")
    assert found["message"].startswith("somebody/tiny is gated")
    assert "accept its terms" in found["hint"]


def test_a_hub_that_is_down(hub, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"  # nobody listens
        found = client(endpoint, tmp_path, "somebody/tiny")
        offline = client(endpoint, tmp_path, "somebody/tiny", HF_HUB_OFFLINE="1")
    assert found == offline
    assert "the Hub cannot be reached" in found["message"]
    hub.instead = lambda handler: not handler.send(503, b"try later")
    with serving(hub) as endpoint:
        assert "the Hub cannot be reached" in client(endpoint, tmp_path, "some/model")["message"]


def fetched(hub: Hub) -> list[tuple[str, str | None]]:
    """File and Range of every download so far."""
    return [
        (path.rpartition("/")[2], wanted)
        for method, path, wanted in hub.seen
        if method == "GET" and "/resolve/" in path
    ]


def cut_in_the_middle(hub: Hub, then_down: bool):
    """The first download of the weights ends after half of them."""
    cut = []

    def half(handler: Handler) -> bool:
        if handler.command != "GET" or not handler.path.endswith("model.safetensors"):
            return False
        if cut:
            if then_down:
                handler.send(500, b"")
            return then_down
        cut.append(1)
        for _ in range(200):  # until the other files are through
            if len({name for name, _ in fetched(hub)}) == len(WANTED):
                break
            time.sleep(0.02)
        time.sleep(0.2)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(BIG)))
        handler.end_headers()
        handler.wfile.write(BIG[: len(BIG) // 2])
        handler.close_connection = True
        return True

    return half


def test_a_download_that_is_cut_off_goes_on_in_the_middle(hub, tmp_path):
    hub.repositories["somebody/tiny"]["main"]["model.safetensors"] = BIG
    hub.instead = cut_in_the_middle(hub, then_down=False)
    with serving(hub) as endpoint:
        found = client(endpoint, tmp_path, "somebody/tiny")
    assert (Path(found["folder"]) / "model.safetensors").read_bytes() == BIG
    ranges = [wanted for name, wanted in fetched(hub) if name == "model.safetensors"]
    assert ranges == [None, f"bytes={len(BIG) // 2}-"]


def test_a_download_that_failed_goes_on_when_repeated(hub, tmp_path):
    """What was complete is not downloaded again."""
    hub.repositories["somebody/tiny"]["main"]["model.safetensors"] = BIG
    hub.instead = cut_in_the_middle(hub, then_down=True)
    with serving(hub) as endpoint:
        found = client(endpoint, tmp_path, "somebody/tiny")
        assert found["message"].startswith("downloading somebody/tiny failed")
        assert found["hint"] == "run the same command again to continue"
        assert {name for name, _ in fetched(hub)} == WANTED
        hub.instead = lambda handler: False
        hub.seen.clear()
        found = client(endpoint, tmp_path, "somebody/tiny")
    assert (Path(found["folder"]) / "model.safetensors").read_bytes() == BIG
    assert [name for name, _ in fetched(hub)] == ["model.safetensors"]
    assert names(found) == WANTED


def test_a_connection_that_breaks(hub, tmp_path):
    """The client passes the socket's error on as it is."""

    def reset(handler: Handler) -> bool:
        if not handler.path.endswith("model.safetensors") or handler.command != "GET":
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        handler.wfile.flush()
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(handler.connection.detach())  # at once, and not politely
        return True

    hub.instead = reset
    with serving(hub) as endpoint:
        found = client(endpoint, tmp_path, "somebody/tiny")
    assert found["message"].startswith("downloading somebody/tiny failed")
    assert "again" in found["hint"]


WHOLE_WAY = """
import json, sys
import torch
torch.set_num_threads(1)
from quantkit.workflows.quantize import quantize
from quantkit.workflows.verify import verify
report = quantize("somebody/tiny@v2", calib="bundled:ja=2", calib_seqlen=64, group=32, fast=True,
                  check=False)
found = verify(str(report.folder), rows=1, seqlen=32, samples=False)
print(json.dumps([str(report.folder), found.against, found.comparison.described()["kl"]]))
"""


def test_from_the_hub_to_a_verified_model(hub, tmp_path):
    """The commit is recorded, and verify takes the original from there."""
    work = tmp_path / "work"
    work.mkdir()
    with serving(hub) as endpoint:
        result = subprocess.run(
            [sys.executable, "-c", WHOLE_WAY],
            env=environment(endpoint, tmp_path / "cache"),
            cwd=work,
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert result.returncode == 0, result.stderr
    folder, against, kl = json.loads(result.stdout.splitlines()[-1])
    assert folder == "tiny-gptq-4bit-32g"
    assert against == "somebody/tiny"
    assert 0 < kl < 1
    source = json.loads((work / folder / "quantkit.json").read_text("utf-8"))["source"]
    assert (source["name"], source["revision"]) == ("somebody/tiny", COMMITS["v2"])
    card = (work / folder / "README.md").read_text("utf-8")
    assert "base_model: somebody/tiny\nbase_model_relation: quantized" in card
    assert f"(revision `{COMMITS['v2'][:12]}`)" in card
    for path in (work / folder).iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def as_legacy(folder: Path) -> dict[str, bytes]:
    """As AutoGPTQ laid repositories out: no word of quantization in config.json, weights under a
    name that says it."""
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    config = json.loads(files["config.json"])
    said = config.pop("quantization_config")
    old = {key: said[key] for key in ("bits", "group_size", "desc_act", "sym", "damp_percent")}
    name = f"gptq_model-{said['bits']}bit-{said['group_size']}g.safetensors"
    del files["quantkit.json"], files["README.md"]
    files["config.json"] = json.dumps(config).encode()
    files["quantize_config.json"] = json.dumps(old).encode()
    files[name] = files.pop("model.safetensors")
    return files


def test_a_branch_of_a_legacy_gptq_repository_generates(hub, tmp_path):
    """One branch per variant, as of TheBloke's repositories; the one with act-order in groups."""
    branch = "gptq-4bit-32g-actorder_True"
    variants = {"main": {}, branch: {"group": 32, "act_order": "group"}}
    made = {name: quantized(**settings) for name, settings in variants.items()}
    repository = {name: as_legacy(folder) for name, folder in made.items()}
    hub.repositories["TheBloke/demo-GPTQ"] = repository

    def generated(*arguments: object) -> str:
        command = [sys.executable, "-c", RUN, "generate", *map(str, arguments)]
        result = subprocess.run(
            [*command, "Once upon a time", "-n", "8", "-q", "--raw"],
            env=environment(endpoint, tmp_path),
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    with serving(hub) as endpoint:
        texts = {name: generated("TheBloke/demo-GPTQ", "--revision", name) for name in variants}
        basename = ("--model-basename", "gptq_model-4bit-32g")
        assert generated(f"TheBloke/demo-GPTQ@{branch}", *basename) == texts[branch]
        for name, folder in made.items():
            assert texts[name] == generated(folder)
