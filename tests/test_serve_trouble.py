"""Clients that vanish, crowd or dawdle, an engine that fails, a process that is told to stop."""

import asyncio
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx2
import pytest
import torch
from serving import demo, running, until
from tools import command, sentence

from quantkit.core.sampling import Sampling
from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime.batch import Batch
from quantkit.serve import pace
from quantkit.serve.asking import ask
from quantkit.serve.engine import Job, Load
from quantkit.serve.guard import TAKING
from quantkit.serve.metrics import Metrics
from quantkit.serve.schemas import CompletionRequest
from quantkit.workflows import serve_models
from quantkit.workflows.serve import serve
from quantkit.workflows.serve_models import names_of

LONG = {"prompt": "The history of", "max_tokens": 1500, "temperature": 0}


@pytest.fixture(scope="module")
def server():
    with running(demo(max_batch=2, queue=2)) as found:
        yield found


@pytest.fixture
def idle(server):
    """The server with nothing to do, before and after."""
    assert server.models[0].engine.load().running == 0
    yield server
    until(lambda: server.models[0].engine.load().running == 0)


def endless(server, **body):
    """A connection that reads a long stream."""
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    content = json.dumps({**LONG, "stream": True, **body}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def occupied(server, texts: int) -> None:
    load = server.models[0].engine.load
    until(lambda: load().running + load().waiting == texts)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_is_gone_stops_its_text(idle, stream):
    load = idle.models[0].engine.load
    connection = endless(idle, stream=stream)
    until(lambda: load().kv_used > 1500)
    started = time.monotonic()
    connection.close()
    until(lambda: load().running == 0)
    assert time.monotonic() - started < 2  # the whole text takes ten seconds
    assert load().kv_used == 0
    assert idle.models[0].engine._backend._running.batch.rows == 0


def test_a_full_queue_is_said_at_once_and_empties(idle):
    connections = [endless(idle) for _ in range(4)]
    until(lambda: idle.models[0].engine.load().waiting == 2)
    refused = idle.post("/v1/completions", prompt="a", max_tokens=1)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    # two that wait leave, so there is room for two
    for connection in connections:
        connection.close()
    until(lambda: idle.models[0].engine.load().running == 0)
    body = {"prompt": "a", "max_tokens": 1}
    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(lambda _: idle.post("/v1/completions", **body).status_code, range(4)))
    assert codes == [200] * 4


def test_those_that_left_the_queue_take_no_memory_in_it():
    """Also when the first who waits has to wait for long."""

    async def left(engine) -> int:
        first, second = engine.submit([Job([5], Sampling(), 1500)] * 2)
        await anext(first)
        for _ in range(50):
            engine.submit([Job([5] * 1000, Sampling(), 1)])[0].cancel()
        waiting = engine.load().waiting
        for stream in (first, second):
            stream.cancel()
        while engine.load() != Load(kv_room=engine.load().kv_room):
            await asyncio.sleep(0.01)
        return waiting

    engine = demo(max_batch=1, queue=2).engine
    assert asyncio.run(left(engine)) == 2
    engine.close()


def test_more_choices_than_there_is_room_for_are_refused_together(idle):
    assert idle.post("/v1/completions", prompt="a", max_tokens=1, n=5).status_code == 429
    assert idle.post("/v1/completions", prompt="a", max_tokens=1, n=4).status_code == 200


def test_a_reader_that_does_not_read_holds_up_nobody(idle):
    """Its text is finished all the same, its memory free; others get theirs meanwhile."""
    slow = endless(idle, logprobs=20, max_tokens=200)
    occupied(idle, 1)
    body = {**LONG, "max_tokens": 20}
    started = time.monotonic()
    assert idle.post("/v1/completions", **body).status_code == 200
    assert time.monotonic() - started < 5
    until(lambda: idle.models[0].engine.load().running == 0)
    received = b""
    while b"[DONE]" not in received:
        received += slow.recv(1 << 16)
    slow.close()
    texts = [json.loads(m)["choices"] for m in re.findall(rb"data: (\{.*\})\n", received)]
    assert sum(len(c[0]["logprobs"]["tokens"]) for c in texts if c[0]["logprobs"]) == 200


def test_a_stop_string_ends_a_text_that_nobody_reads():
    """And nothing is left of a stream that was dropped."""

    async def dropped(served) -> list[asyncio.Task]:
        request = CompletionRequest(prompt="The", max_tokens=1500, temperature=0, n=2, stop="the")
        asking = await ask(request, served, Metrics([served]))
        events = asking.events(include_usage=False)
        await anext(events)
        while served.engine.load().running:
            await asyncio.sleep(0.01)
        assert max(answer.count for answer in asking.answers) < 100
        await events.aclose()
        await asyncio.sleep(0.01)
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    served = demo()
    assert asyncio.run(dropped(served)) == []
    served.engine.close()


def test_a_prompt_that_is_long_does_not_stop_the_others(idle):
    """While it is read in pieces, a running text goes on."""
    running_text = endless(idle)
    occupied(idle, 1)
    running_text.recv(1000)
    with ThreadPoolExecutor(1) as pool:
        body = {"prompt": [5] * 2040, "max_tokens": 1}
        answer = pool.submit(idle.post, "/v1/completions", **body)
        heard = 0
        while not answer.done():
            heard += running_text.recv(1 << 16).count(b"data:")
    assert heard >= 2
    running_text.close()


def test_a_bad_request_beside_a_good_one(idle):
    """Refusals happen in front of the engine, so the text beside them is what it is alone."""
    body = {**LONG, "max_tokens": 60}
    alone = idle.post("/v1/completions", **body).json()["choices"]
    with ThreadPoolExecutor(1) as pool:
        good = pool.submit(idle.post, "/v1/completions", **body)
        for bad in (
            {"prompt": [10**6]},
            {"prompt": "a", "temperature": "hot"},
            {"prompt": [5] * 5000},
        ):
            assert idle.post("/v1/completions", **bad).status_code == 400
        assert good.result().json()["choices"] == alone


# requests that arrive slowly


def connected(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10)


def trickled(connection: socket.socket, content: bytes) -> bytes:
    """What comes back when one byte is sent after the other, up to the end of the connection."""
    for byte in content:
        with suppress(OSError):  # closed on the other side
            connection.sendall(bytes([byte]))
        if select.select([connection], [], [], 0.05)[0]:
            break
    received = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            received += part
    return received


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("size", [b"Content-Length: 1000\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_a_body_that_is_slow_is_answered_and_not_waited_for(idle, monkeypatch, size):
    monkeypatch.setattr(pace, "SECONDS", 0.5)
    started = time.monotonic()
    with connected(idle) as connection:
        connection.sendall(HEAD + size + b"\r\n" + b"3e8\r\n" * (b"chunked" in size))
        received = trickled(connection, b" " * 1000)
    assert 0.4 < time.monotonic() - started < 5
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in received.lower()
    assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["message"].endswith("seconds")


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_a_head_that_is_slow_ends_the_connection(idle, monkeypatch, before):
    """The first of a connection, and one behind another request."""
    monkeypatch.setattr(pace, "SECONDS", 0.5)
    with connected(idle) as connection:
        connection.sendall(before)
        if before:
            while b"}" not in connection.recv(1 << 16):
                pass
        started = time.monotonic()
        assert trickled(connection, HEAD * 10) == b""
        assert 0.4 < time.monotonic() - started < 5


@pytest.mark.parametrize("line", [b"POST /v1/nothing", b"GET /v1/models"])
def test_the_rest_of_a_body_that_has_its_answer_is_not_waited_for(idle, monkeypatch, line):
    """Nobody reads it, so it is nobody's to be late for."""
    monkeypatch.setattr(pace, "SECONDS", 0.5)
    started = time.monotonic()
    with connected(idle) as connection:
        head = HEAD.replace(b"POST /v1/completions", line)
        connection.sendall(head + b"Content-Length: 1000\r\n\r\n")
        while b"}" not in connection.recv(1 << 16):
            pass
        assert trickled(connection, b" " * 1000) == b""
    assert 0.4 < time.monotonic() - started < 5


def test_a_body_that_has_its_answer_may_still_come(idle, monkeypatch):
    """And another request behind it."""
    monkeypatch.setattr(pace, "SECONDS", 0.5)
    with connected(idle) as connection:
        connection.sendall(HEAD.replace(b"completions", b"nothing") + b"Content-Length: 9\r\n\r\n")
        while b"}" not in connection.recv(1 << 16):
            pass
        connection.sendall(b" " * 9)
        time.sleep(0.1)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("stream", [True, False])
def test_who_takes_nothing_loses_the_connection(monkeypatch, stream):
    """Also where the answer is whole."""
    monkeypatch.setattr(pace, "STALLED", 0.5)
    with running(demo()) as server:
        for one in server.server.servers[0].sockets:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connections = server.server.server_state.connections
        with endless(server, stream=stream, logprobs=20, max_tokens=300):
            until(lambda: connections)
            until(lambda: not connections)
        until(lambda: server.models[0].engine.load().running == 0)


def test_an_answer_may_take_longer_than_a_request(idle, monkeypatch):
    monkeypatch.setattr(pace, "SECONDS", 0.2)
    started = time.monotonic()
    answer = idle.post("/v1/completions", **{**LONG, "max_tokens": 600})
    assert answer.status_code == 200 and time.monotonic() - started > 0.4


# an engine that fails


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_is_known_everywhere(monkeypatch):
    """Its streams end with an error, /health says it, and whoever watches is told."""
    model = demo()
    died = []
    model.engine.watch(lambda: died.append(True))
    with running(model) as server:
        connection = endless(server)
        connection.recv(1000)

        def broken(tokens):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(model.engine._backend._running.batch, "step", broken)
        received = b""
        while part := connection.recv(1 << 16):
            received += part
            if b"error" in received:
                break
        assert b"the engine of demo failed" in received
        assert b"[DONE]" not in received
        until(lambda: died == [True])
        with server.client() as http:
            assert http.get("/health").status_code == 503
            assert http.get("/health").json() == {"status": "failed"}
            refused = http.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503
        assert "has failed" in refused.json()["error"]["message"]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1, "top_p": 0.9}])
def test_a_text_whose_predictions_are_no_numbers_fails_alone(idle, monkeypatch, settings):
    read = Batch.read

    def broken(batch, most):
        found = read(batch, most)
        return None if found is None else torch.full_like(found, torch.nan)

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "read", broken)
        answer = idle.post("/v1/completions", prompt="a", **settings)
        assert answer.status_code == 503
        said = answer.json()["error"]["message"]
        assert said == "demo failed: its predictions are not numbers"
        streamed = idle.post("/v1/completions", prompt="a", stream=True, **settings).text
        assert said in streamed and "[DONE]" not in streamed
    assert idle.post("/v1/completions", prompt="a", max_tokens=2).status_code == 200


def test_settings_that_leave_nothing_but_the_likeliest(idle):
    body = {"prompt": "a", "max_tokens": 2, "temperature": 1}
    assert idle.post("/v1/completions", **body, top_p=1e-300).status_code == 200
    refused = idle.post("/v1/completions", **body, repetition_penalty=1e-39)
    assert refused.status_code == 400 and "repetition_penalty" in refused.text


# the process


@pytest.fixture
def process():
    """``quantkit serve demo`` as a process of its own: (process, url)."""
    started = []

    def start(*options: str, program: str = "from quantkit.cli.main import run; run()"):
        arguments = [sys.executable, "-c", program, "serve", "demo", "--port", "0", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        found = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment)
        started.append(found)
        for line in found.stderr:
            if "ready:" in line:
                return found, re.search(r"http://[\d.:]+", line)[0]
        raise AssertionError("the server did not start")

    yield start
    for one in started:
        one.kill()
        one.wait()
        one.stderr.close()


def test_told_to_stop_it_ends_what_it_began(process):
    server, url = process("--dtype", "float32")
    body = {**LONG, "max_tokens": 150, "stream": True}
    with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{url}/health")
        rest = list(lines)
    assert "data: [DONE]" in rest[-2:]
    assert server.wait(20) == 0


def test_answers_that_take_longer_than_the_server_waits_are_ended(capfd):
    """With an error that clients understand, and no traceback."""
    with ThreadPoolExecutor(2) as pool:
        with running(demo()) as server:
            asked = [
                pool.submit(server.post, "/v1/completions", **LONG, stream=stream)
                for stream in (False, True)
            ]
            occupied(server, 2)
        whole, stream = (one.result() for one in asked)
    assert whole.status_code == 503 and stream.status_code == 200
    for body in (whole.text, stream.text.split("data: ")[-1]):
        assert "the server ends" in json.loads(body)["error"]["message"]
    assert "Traceback" not in capfd.readouterr().err


def test_a_failed_engine_ends_the_process_with_an_error(process):
    program = (
        "from quantkit.cli.main import run; from quantkit.serve.engines import torch as t\n"
        "def broken(self): raise RuntimeError('the GPU is gone')\n"
        "t.TorchBackend._step = broken; run()"
    )
    server, url = process(program=program)
    assert httpx2.post(f"{url}/v1/completions", json={"prompt": "a"}, timeout=30).status_code == 503
    assert server.wait(20) == 1
    said = server.stderr.read()
    assert "the GPU is gone" in said
    assert "error: the engine of demo has failed" in said


# who may ask


def test_other_names_and_other_sites_are_refused(server):
    with server.client() as http:
        for headers, code in (
            ({"Host": "evil.example"}, 403),
            ({"Host": "localhost:1"}, 200),
            ({"Host": "LOCALHOST"}, 200),
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Origin": "http://["}, 403),
            ({"Origin": server.url}, 200),
        ):
            assert http.get("/v1/models", headers=headers).status_code == code, headers
        assert "access-control-allow-origin" not in http.get("/v1/models").headers


def test_what_a_page_may_send_to_other_sites_is_taken_nowhere(server):
    """Every path that there is takes JSON, or no body."""
    with server.client() as http:
        paths = http.get("/openapi.json").json()["paths"]
        for path, methods in paths.items():
            for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
                sent = http.post(path, content=b"{}", headers={"content-type": kind})
                assert sent.status_code == (415 if "post" in methods else 405), path
    assert {path for path, methods in paths.items() if "post" in methods} == set(TAKING)


def test_a_key_is_needed_where_there_is_one():
    with running(demo(), api_key="right", hosts=None) as server, server.client() as http:
        for given, code in (
            (None, 401),
            ("Bearer wrong", 401),
            ("Bearer righ", 401),
            ("Basic right", 401),
            ("Bearer", 401),
            ("Bearer right", 200),
            ("bearer right", 200),
        ):
            headers = {} if given is None else {"Authorization": given}
            for path in ("/v1/models", "/metrics", "/openapi.json"):
                assert http.get(path, headers=headers).status_code == code, given
        assert http.get("/health").status_code == 200
        assert http.get("/", headers={"Host": "anything"}).status_code == 200


# starting


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--host", "::"], "--api-key"),
        (["--host", "example.com"], "--api-key"),
        (["--engine", "onnx"], "onnx"),
        (["--engine", "llama.cpp"], "GGUF"),
        (["--context", "4096"], "2048 tokens"),
        (["--context", "1"], "--context"),
        (["--max-batch", "0"], "--max-batch"),
        (["--queue", "-1"], "--queue"),
        (["--kv-tokens", "0"], "--kv-tokens"),
        (["--api-key", "é"], "--api-key"),
        (["--api-key", "a "], "--api-key"),
        (["--template", "nonsuch"], "alpaca-ja"),
    ],
)
def test_options_that_cannot_be(capsys, options, named, monkeypatch):
    monkeypatch.delenv("QUANTKIT_API_KEY", raising=False)
    assert command("serve", "demo", "--port", 0, *options) == 2
    message, hint = sentence(capsys.readouterr().err)
    assert named in f"{message} {hint}"


def test_a_port_that_is_taken_is_said_before_anything_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(QuantkitError, match=r"cannot listen on 127\.0\.0\.1 port"):
            serve(["no such model"], port=taken.getsockname()[1])


def test_a_port_that_another_server_takes_meanwhile(monkeypatch):
    """Both have bound it, which the system lets them until one listens."""
    opened = serve_models.open_models

    def open_slowly(*arguments):
        other.listen()
        return opened(*arguments)

    monkeypatch.setattr(serve_models, "open_models", open_slowly)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        with pytest.raises(QuantkitError, match=r"cannot listen on 127\.0\.0\.1 port"):
            serve(["demo"], port=other.getsockname()[1])


def test_every_address_of_the_loopback_is_a_name_of_the_server(process):
    """It is the one that is said at the start."""
    _, url = process("--host", "127.0.0.2")
    assert "127.0.0.2" in url
    assert httpx2.get(f"{url}/health").status_code == 200
    assert httpx2.get(f"{url}/health", headers={"Host": "127.0.0.3"}).status_code == 403


def test_the_environment_has_the_key(monkeypatch):
    """With it the address is no reason to refuse; the model is, which comes later."""
    monkeypatch.setenv("QUANTKIT_API_KEY", "secret")
    with pytest.raises(QuantkitError, match="no folder"):
        serve(["no/such/model"], host="0.0.0.0", port=0)
    monkeypatch.setenv("QUANTKIT_API_KEY", "")
    with pytest.raises(UsageError, match="everybody"):
        serve(["no/such/model"], host="0.0.0.0", port=0)


def test_models_have_different_names(tmp_path):
    folders = []
    for parent in ("a", "b"):
        folder = tmp_path / parent / "model"
        folder.mkdir(parents=True)
        folders.append(str(folder))
    assert names_of((*folders, "demo", "demo")) == ["model", "model-2", "demo", "demo-2"]
    assert names_of(("owner/name",)) == ["owner/name"]
