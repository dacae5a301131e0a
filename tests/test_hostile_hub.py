"""A Hub, or a network before it, that lies: nothing outside of the cache is touched, nothing wrong
is believed, no token goes to strangers, and what happened is a sentence."""

from collections.abc import Callable

import pytest
from hub_answers import Handler
from hub_store import WRITER
from tools import model

from quantkit.core import hub as client
from quantkit.core import pull as pulling
from quantkit.core import ranges
from quantkit.core.checkpoint import Checkpoint
from quantkit.core.source import resolve
from quantkit.errors import QuantkitError

TINY, WEIGHTS = "somebody/tiny", "model.safetensors"
EVIL = "../../../../evil"


@pytest.fixture(autouse=True)
def in_pieces(monkeypatch):
    monkeypatch.setattr(pulling, "LARGE", 10_000)
    monkeypatch.setattr(ranges, "PIECE", 1 << 16)


@pytest.fixture
def tiny(hub, monkeypatch):
    """The Hub with one small model, and a token that must not get about."""
    monkeypatch.setenv("HF_TOKEN", WRITER)
    hub.add_folder(TINY, model("gpt_neox"))
    return hub


def read(low_disk: bool) -> Checkpoint:
    found = resolve(TINY, low_disk=low_disk)
    return Checkpoint(found.folder, remote=found.remote)


def instead(path: str, answer: Callable[[Handler], object]) -> Callable[[Handler], bool]:
    """``answer`` to all requests whose path holds ``path``."""

    def fault(handler: Handler) -> bool:
        if path not in handler.path_:
            return False
        answer(handler)
        return True

    return fault


def with_listing(change: Callable[[dict], object]) -> Callable[[Handler], bool]:
    """The true listing, but for what ``change`` does to the entry of the weights."""

    def answer(handler: Handler) -> None:
        entries = handler.listing(TINY, "main")
        change(next(entry for entry in entries if entry["path"] == WEIGHTS))
        handler.send_json(entries)

    return instead("/tree/", answer)


@pytest.mark.parametrize("low_disk", [False, True])
@pytest.mark.parametrize(
    "lie",
    [
        {"path": "../model.safetensors"},
        {"path": "/model.safetensors"},
        {"path": "a/./model.safetensors"},
        {"path": "a\x1b[31m.safetensors"},
        {"path": "a\n.safetensors"},
        {"size": -5},
        {"size": "5"},
        {"size": None},
        {"oid": EVIL},
        {"lfs": {"oid": EVIL, "size": 5, "pointerSize": 134}},
        {"lfs": {"oid": None, "size": 5, "pointerSize": 134}},
        {"lfs": {}},
    ],
    ids=str,
)
def test_a_listing_that_cannot_be_true(tiny, tmp_path, lie, low_disk):
    tiny.instead = with_listing(lambda entry: entry.update(lie))
    with pytest.raises(QuantkitError, match=f"what the Hub lists of {TINY} cannot be") as caught:
        resolve(TINY, low_disk=low_disk)
    assert caught.value.message.isprintable()
    assert not tiny.fetched()
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("content", [{"error": "no"}, ["model.safetensors"], [{}]])
def test_a_listing_that_is_none(tiny, content):
    tiny.instead = instead("/tree/", lambda handler: handler.send_json(content))
    with pytest.raises(QuantkitError, match=f"what the Hub lists of {TINY} cannot be"):
        resolve(TINY)


def test_a_file_that_is_listed_twice_comes_once(tiny):
    def twice(handler: Handler) -> None:
        handler.send_json(handler.listing(TINY, "main") * 2)

    tiny.instead = instead("/tree/", twice)
    names = [path.name for path in resolve(TINY).folder.iterdir()]
    assert names.count(WEIGHTS) == 1


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"size": 20_000}, "arrived damaged"),
        ({"size": 1 << 24}, "did not send the"),
        ({"size": 1 << 60}, "needs .* GB more"),
        ({"lfs": {"oid": "0" * 64, "size": 5, "pointerSize": 134}}, "arrived damaged"),
    ],
)
def test_sizes_and_hashes_of_something_else(tiny, tmp_path, lie, message):
    tiny.instead = with_listing(lambda entry: entry.update(lie))
    with pytest.raises(QuantkitError, match=message):
        resolve(TINY)
    assert not list(tmp_path.rglob(WEIGHTS))
    tiny.instead = lambda handler: False
    assert list(read(False))


@pytest.mark.parametrize("low_disk", [False, True])
@pytest.mark.parametrize("fault", ["endless", "no range", "endless, no range", "another range"])
def test_an_answer_of_other_bytes_is_not_read_to_its_end(tiny, low_disk, fault):
    raw, sent = tiny.repositories[TINY].files()[WEIGHTS], []

    def answer(handler: Handler) -> None:
        wanted = handler.headers.get("Range", "bytes=0-7").removeprefix("bytes=")
        first, last = map(int, wanted.split("-"))
        handler.send_response(200 if "no range" in fault else 206)
        if fault == "another range":
            first, last = first + 1, last + 1
        if "no range" not in fault:
            handler.send_header("Content-Range", f"bytes {first}-{last}/{len(raw)}")
        if "endless" not in fault:
            body = raw[first : last + 1] if fault == "another range" else raw
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)
            return
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.close_connection = True
        for _ in range(1 << 10):  # 1 GB, unless the other side hangs up
            handler.wfile.write(b"%x\r\n%b\r\n" % (1 << 20, bytes(1 << 20)))
            sent.append(1 << 20)

    tiny.instead = instead(WEIGHTS, answer)
    with pytest.raises(QuantkitError, match=r"did not send the \d+ bytes of model.safetensors"):
        read(low_disk)
    assert sum(sent) < 256 << 20


@pytest.mark.parametrize("place", ["api/", "/tree/"])
def test_a_page_that_is_not_of_the_hub(tiny, place):
    """What a hotel's network answers."""
    page = b"<html>log in</html>"
    tiny.instead = instead(place, lambda h: h.send(200, page, {"Content-Type": "text/html"}))
    with pytest.raises(QuantkitError) as caught:
        resolve(TINY)
    assert "HF_ENDPOINT or a proxy" in caught.value.hint


@pytest.mark.parametrize("low_disk", [False, True])
@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://127.0.0.1/x", "{endpoint}{path}"])
def test_redirects_that_lead_nowhere(tiny, address, low_disk):
    def redirect(handler: Handler) -> None:
        place = address.format(endpoint=tiny.endpoint, path=handler.path)
        handler.send(302, b"", {"Location": place})

    tiny.instead = instead(WEIGHTS, redirect)
    with pytest.raises(QuantkitError, match=f"downloading {TINY} failed"):
        read(low_disk)


@pytest.mark.parametrize("low_disk", [False, True])
def test_the_token_does_not_go_to_another_host(tiny, low_disk):
    """Large files lie elsewhere; the Hub sees the token, the other place does not."""
    seen: dict[bool, set[str | None]] = {True: set(), False: set()}

    def watch(handler: Handler) -> bool:
        if handler.path_.endswith(WEIGHTS):
            at_hub = handler.headers["Host"] in tiny.endpoint
            seen[at_hub].add(handler.headers.get("Authorization"))
        return False

    tiny.instead = watch
    assert list(read(low_disk))
    assert seen == {True: {f"Bearer {WRITER}"}, False: {None}}


def test_a_message_that_repeats_the_token():
    """As that of a proxy may, which complains of what it got."""
    with pytest.raises(QuantkitError) as caught, client.told(TINY, None, "downloading"):
        raise OSError(f"bad header: Bearer {WRITER}")
    assert "Bearer hf_..." in caught.value.message and WRITER not in caught.value.message
