"""vLLM behind the server: what it is told and asked, with a program in its place that answers with
the ids that it was sent."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager

import httpx2
import psutil
import pytest
from serving import demo, running, until

from quantkit.errors import QuantkitError
from quantkit.serve.engines.vllm import _arguments
from quantkit.workflows.serve_models import Settings, open_models

PROGRAM = """
    import json, os, sys, time
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Answers(BaseHTTPRequestHandler):
        def log_message(self, *_): pass
        def do_GET(self):
            self.send_response(200); self.end_headers()
        def do_POST(self):
            assert self.headers["Authorization"] == "Bearer " + os.environ["VLLM_API_KEY"]
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert asked["model"] == "model" and asked["return_token_ids"] and asked["stream"]
            if asked["max_tokens"] == 13: os._exit(3)
            self.send_response(200); self.end_headers()
            ids = (asked["prompt"] * 300)[: asked["max_tokens"]]
            for i, token in enumerate(ids):
                last = "length" if i + 1 == len(ids) else None
                numbers = None
                if asked["logprobs"] is not None:
                    top = {f"token_id:{token}": -0.5, "token_id:9": -0.25}
                    numbers = {"token_logprobs": [-0.5], "top_logprobs": [top]}
                choice = {"token_ids": [token], "finish_reason": last, "logprobs": numbers}
                self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\\n\\n".encode())
                if asked["max_tokens"] > 500: time.sleep(0.01)
            self.wfile.write(b"data: [DONE]\\n\\n")

    if "ONLY" in os.environ:
        only = sys.argv[0] + ".one"
        if os.path.exists(only): sys.exit("no memory")
        open(only, "w").close()
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Answers).serve_forever()
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bin")
    file = folder / "vllm"
    file.write_text(f"#!{sys.executable}\n{textwrap.dedent(PROGRAM)}")
    file.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder), prepend=":")
        yield file


@pytest.fixture
def server(program):
    with running(demo(engine="vllm", max_batch=2, queue=1)) as found:
        yield found


def test_its_tokens_become_text_here(server):
    body = {"prompt": "日本の首都", "temperature": 0, "max_tokens": 4}
    found = server.post("/v1/completions", **body, logprobs=1).json()
    assert found["choices"][0]["text"].startswith("日本の首都")
    numbers = found["choices"][0]["logprobs"]
    assert numbers["token_logprobs"] == [-0.5] * 4
    assert [list(one.values()) for one in numbers["top_logprobs"]] == [[-0.25]] * 4
    stopped = server.post("/v1/completions", **body, stop="の首").json()["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == ("日本", "stop")


def test_a_client_that_is_gone_ends_its_text_and_a_full_queue_is_said(server):
    engine = server.models[0].engine
    body = {"prompt": "a", "max_tokens": 1000, "stream": True}
    with server.client() as http, http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # kept: without it the response is closed
        next(lines)
        assert server.post("/v1/completions", prompt="a", n=3).status_code == 429
    until(lambda: engine.load().running == 0, 5)


def test_when_it_dies_the_server_knows(server, capfd):
    died = []
    server.models[0].engine.watch(lambda: died.append(True))
    assert server.post("/v1/completions", prompt="a", max_tokens=13).status_code == 503
    until(lambda: died == [True])
    assert "vLLM ended with code 3" in capfd.readouterr().err
    with server.client() as http:
        assert http.get("/health").status_code == 503


def test_what_cannot_start_says_why(program, tmp_path, monkeypatch):
    broken = tmp_path / "vllm"
    broken.write_text(f"#!{sys.executable}\nraise RuntimeError('no device')\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(QuantkitError, match="did not start") as refused:
        demo(engine="vllm")
    assert "no device" in refused.value.hint
    monkeypatch.setenv("PATH", "")
    with pytest.raises(QuantkitError, match="not installed"):
        demo(engine="vllm")


# the process


@contextmanager
def started(*models: str, before: str = ""):
    """``quantkit serve``, in a group of its own as a terminal has it; after some other code."""
    code = before + "from quantkit.cli.main import run; run()"
    options = ["serve", *models, "--engine", "vllm", "--port", "0"]
    found = subprocess.Popen(
        [sys.executable, "-c", code, *options],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield found
    finally:
        found.kill()
        found.wait()
        found.stderr.close()


def beside(process: subprocess.Popen) -> list[psutil.Process]:
    """vLLM, which it has started; imports of libraries start others for a moment."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [one for one in found if "vllm" in _command(one)]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def ended(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=20)[1]


def test_ctrl_c_is_not_for_it(program):
    """A terminal sends it to all processes; the answers that run are finished first."""
    with started("demo") as process:
        line = next(line for line in process.stderr if "ready:" in line)
        url = re.search(r"http://[\d.:]+", line)[0]
        body = {"prompt": "a", "max_tokens": 501, "stream": True}
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            vllm = beside(process)
            os.killpg(process.pid, signal.SIGINT)
            assert "data: [DONE]" in list(lines)
        assert process.wait(20) == 0
        assert ended(vllm) and vllm


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A file that a vLLM writes which loads for ever."""
    slow, begun = tmp_path / "vllm", tmp_path / "begun"
    slow.write_text(
        f"#!{sys.executable}\nimport pathlib, time\n"
        f"pathlib.Path({str(begun)!r}).touch()\ntime.sleep(60)\n"
    )
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return begun


def test_ctrl_c_in_an_import_while_it_loads(tmp_path, begun):
    """While libraries are imported it ends the program at once, but not without what this began."""
    importing = tmp_path / "importing"
    (tmp_path / "slowly.py").write_text(
        f"import pathlib, time\npathlib.Path({str(importing)!r}).touch()\ntime.sleep(60)\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from quantkit.serve.engines.vllm import httpx2\n"
        "httpx2.get = lambda *args, **settings: __import__('slowly')\n"
    )
    with started("demo", before=code) as process:
        until(importing.exists)
        vllm = beside(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert ended(vllm) and vllm


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_the_server_is_told_to_while_it_loads(begun, told):
    with started("demo") as process:
        until(begun.exists)
        vllm = beside(process)
        process.send_signal(told)
        assert process.wait(20) == 128 + told
        assert ended(vllm)


def test_ctrl_c_in_the_moment_in_which_it_starts(program, monkeypatch):
    """It comes behind Popen, when there is a process that nobody knows of."""
    begun = []

    def interrupted(*args, start=subprocess.Popen, **settings):
        begun.append(start(*args, **settings))
        signal.raise_signal(signal.SIGINT)
        return begun[0]

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("quantkit.serve.engines.vllm.subprocess.Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_models(["demo"], ["demo"], Settings(engine="vllm"), print)
    assert begun[0].poll() is not None
    assert signal.getsignal(signal.SIGINT) is before


def test_one_that_does_not_start_ends_the_others(program, monkeypatch):
    """They would keep their memory."""
    monkeypatch.setenv("ONLY", "1")
    before = psutil.Process().children()
    with pytest.raises(QuantkitError, match="did not start"):
        open_models(["demo", "demo"], ["a", "b"], Settings(engine="vllm"), lambda text: None)
    assert psutil.Process().children() == before


def test_one_that_ends_while_others_load_is_not_missed(program):
    model, died = demo(engine="vllm"), []
    model.engine._process.kill()
    until(lambda: model.engine.dead)
    model.engine.watch(lambda: died.append(True))
    assert died == [True]
    model.engine.close()


def test_what_it_is_told(tmp_path):
    said = _arguments(tmp_path, "http://127.0.0.1:81", 512, 4, "float16")
    assert said[0] == str(tmp_path)
    assert said[said.index("--port") + 1] == "81"
    assert said[said.index("--max-model-len") + 1] == "512"
    assert said[said.index("--dtype") + 1] == "float16"
