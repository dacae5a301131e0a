"""vLLM as the engine: ``vllm serve`` runs beside this process with the same files, and is asked for
tokens only. Prompts are sent as token ids, so that templates, stop strings and the form of answers
stay the same as with every other engine.
"""

import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx2

from quantkit.core import outside
from quantkit.errors import QuantkitError
from quantkit.serve.engine import Busy, Dead, Job, Limits, Load, Stream, Token

_MODEL = "model"  # its name between the two processes
_READS = ("dense", "gptq", "gptq_v2", "awq", "compressed_tensors", "bnb", "gguf")
_PREFIX = "token_id:"  # how vLLM writes tokens when it shall not decode them


class VllmEngine:
    """``path``: a folder, or a GGUF file; ``ends``: the tokens that end a text; ``rows`` texts run
    together, ``queue`` may wait. Raises QuantkitError when vLLM is not installed or does not start,
    with what it said last."""

    name = "vllm"

    def __init__(
        self,
        path: Path,
        form: str,
        ends: frozenset[int],
        *,
        context: int,
        rows: int,
        queue: int,
        dtype: str,
    ) -> None:
        if form not in _READS:
            raise QuantkitError(f"vLLM does not read {form}", "quantkit convert --to gptq")
        program = shutil.which("vllm")
        if program is None:
            raise QuantkitError("vLLM is not installed", "pip install vllm")
        self.limits = Limits(context)
        self.dead = False
        self._ends, self._rows, self._room = sorted(ends), rows, rows + queue
        self._streams: set[Stream] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._died: Callable[[], None] | None = None
        self._closing = False
        self._client: httpx2.AsyncClient | None = None
        self._key, self._url = secrets.token_hex(16), f"http://127.0.0.1:{_free_port()}"
        self._log = tempfile.TemporaryFile(prefix="quantkit-vllm-")
        command = [program, "serve", *_arguments(path, self._url, context, rows, dtype)]
        with ExitStack() as undo:
            with _unbroken():
                self._process = subprocess.Popen(
                    command,
                    stdout=self._log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "VLLM_API_KEY": self._key, "VLLM_NO_USAGE_STATS": "1"},
                    start_new_session=True,  # a Ctrl-C is not for it: answers are finished first
                )
                outside.begun.add(self)
                undo.callback(self.close)
            self._wait()
            undo.pop_all()
        threading.Thread(target=self._watched, name="engine vllm", daemon=True).start()

    def submit(self, jobs: list[Job]) -> list[Stream]:
        if self.dead or self._closing:
            raise Dead
        if len(self._streams) + len(jobs) > self._room:
            raise Busy
        streams = [Stream(job) for job in jobs]
        for stream in streams:
            self._streams.add(stream)
            task = asyncio.create_task(self._fill(stream))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return streams

    def load(self) -> Load:
        count = len(self._streams)
        return Load(min(count, self._rows), max(0, count - self._rows))

    def watch(self, died: Callable[[], None]) -> None:
        self._died = died
        if self.dead:  # while another model was loaded
            died()

    def close(self) -> None:
        self._closing = True
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        outside.begun.discard(self)
        self._log.close()

    # one text

    async def _fill(self, stream: Stream) -> None:
        """Its tokens, until it ends or nobody wants them: vLLM stops when the connection does."""
        try:
            async for choice in self._choices(stream.job):
                if stream.cancelled:
                    return
                tokens = [t for t in _tokens(choice, stream.job) if t.id not in self._ends]
                stream.put(tokens, choice.get("finish_reason"))
            if stream.finish is None:
                stream.fail()
        except (httpx2.HTTPError, ValueError):
            stream.fail()
        finally:
            self._streams.discard(stream)

    async def _choices(self, job: Job) -> AsyncIterator[dict[str, Any]]:
        if self._client is None:
            headers = {"Authorization": f"Bearer {self._key}"}
            limits = httpx2.Limits(max_connections=None)
            self._client = httpx2.AsyncClient(
                base_url=self._url, headers=headers, timeout=None, limits=limits
            )
        settings = {
            name: value for name, value in asdict(job.sampling).items() if value is not None
        }
        body = {
            **settings,
            "model": _MODEL,
            "prompt": job.prompt,
            "max_tokens": job.max_tokens,
            "stream": True,
            "stop_token_ids": self._ends,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "logprobs": job.logprobs,
        }
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line.removeprefix("data: ")).get("choices", ()):
                        yield choice

    # the process

    def _wait(self) -> None:
        """Until it answers."""
        while True:
            if self._process.poll() is not None:
                raise QuantkitError("vLLM did not start", self._last_words())
            try:
                if httpx2.get(f"{self._url}/health", timeout=5).status_code == 200:
                    return
            except httpx2.HTTPError:
                time.sleep(0.5)

    def _watched(self) -> None:
        code = self._process.wait()
        if self._closing:
            return
        self.dead = True
        print(f"vLLM ended with code {code}: {self._last_words()}", file=sys.stderr, flush=True)
        for stream in list(self._streams):
            stream.call(stream.fail)
        if self._died is not None:
            self._died()

    def _last_words(self) -> str:
        """The last error in its log, or the last line."""
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        wrong = [line for line in said if "Error" in line]
        return (wrong or said or ["it said nothing"])[-1][-400:]


def _arguments(path: Path, url: str, context: int, rows: int, dtype: str) -> list[str]:
    """What ``vllm serve`` is told. How weights are quantized it finds in config.json, or in the
    GGUF file; sampling settings of the model come with every request, so it takes none itself."""
    found = [str(path), "--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
    found += ["--served-model-name", _MODEL, "--generation-config", "vllm", "--dtype", dtype]
    return [*found, "--max-model-len", str(context), "--max-num-seqs", str(rows)]


def _tokens(choice: dict[str, Any], job: Job) -> list[Token]:
    ids, numbers = choice.get("token_ids") or [], choice.get("logprobs")
    if job.logprobs is None or not numbers:
        return [Token(token) for token in ids]
    found = []
    for token, log, top in zip(ids, numbers["token_logprobs"], numbers["top_logprobs"]):
        likely = [(int(name.removeprefix(_PREFIX)), one) for name, one in (top or {}).items()]
        likely.sort(key=lambda one: -one[1])
        found.append(Token(token, log, tuple(likely[: job.logprobs])))
    return found


@contextmanager
def _unbroken() -> Iterator[None]:
    """Signals that end the program come behind this: a process that was just started, and that
    nobody knows of yet, would go on for ever."""
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for each in came:
        signal.raise_signal(each)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
