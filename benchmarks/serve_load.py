"""Many clients at once: speed by concurrency, and whether every stream is its own text.

    python benchmarks/serve_load.py MODEL                    it starts `quantkit serve MODEL` itself
    python benchmarks/serve_load.py MODEL --url http://...   or asks one that runs (--api-key KEY)
    python benchmarks/serve_load.py MODEL --against llama-cpp-python=http://...    and another one
    python benchmarks/serve_load.py MODEL --faults           clients that vanish, garbage, SIGTERM

Each of N clients streams one answer after the other, M in all, greedily. What each prompt must give
is asked for first, one at a time (in float32, where a batch chooses what a single text does): a
stream with another text is lost or mixed, and counted. --json FILE keeps the figures.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

import httpx2
import psutil

PROMPTS = [
    f"{start}{subject}"
    for start in ("The history of ", "昔々、", "A list of ", "日本の")
    for subject in ("the city", "山と川", "music", "人々の暮らし")
]


@dataclass
class Result:
    """Of one run. Times in seconds."""

    clients: int
    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    errors: int = 0
    wrong: int = 0  # streams whose text is not that of their prompt

    def line(self) -> dict[str, float | int]:
        cut = quantiles(self.first, n=100) if len(self.first) > 1 else self.first * 99
        return {
            "clients": self.clients,
            "requests": len(self.first) + self.errors,
            "errors": self.errors,
            "wrong": self.wrong,
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "first_token_p50": round(cut[49], 4),
            "first_token_p99": round(cut[98], 4),
        }


async def stream(http: httpx2.AsyncClient, body: dict, heard: Result) -> str:
    """One answer; its text."""
    started, first, text = time.perf_counter(), None, ""
    async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        response.raise_for_status()
        ended = False
        async for line in response.aiter_lines():
            ended = ended or line == "data: [DONE]"
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line[6:])["choices"]:
                if first is None and choice["text"]:
                    first = time.perf_counter() - started
                text += choice["text"]
    if not ended:
        raise httpx2.ReadError("the stream was cut off")
    heard.first.append(first or time.perf_counter() - started)
    return text


async def load(url: str, key: str, clients: int, requests: int, body: dict, wanted: dict) -> Result:
    """``requests`` answers in all, ``clients`` at a time."""
    result, left = Result(clients), iter(range(requests))
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(
        base_url=url, headers=headers, timeout=600, limits=limits
    ) as http:

        async def client() -> None:
            for number in left:
                prompt = PROMPTS[number % len(PROMPTS)]
                try:
                    text = await stream(http, {**body, "prompt": prompt}, result)
                except httpx2.HTTPError:
                    result.errors += 1
                    continue
                expected, count = wanted[prompt]
                result.wrong += text != expected
                result.tokens += count

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        result.seconds = time.perf_counter() - started
    return result


def references(url: str, key: str, body: dict) -> dict[str, tuple[str, int]]:
    """Text and tokens of every prompt, asked for one at a time."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    found = {}
    with httpx2.Client(base_url=url, headers=headers, timeout=600) as http:
        for prompt in PROMPTS:
            answer = http.post("/v1/completions", json={**body, "prompt": prompt})
            said = answer.raise_for_status().json()
            found[prompt] = (said["choices"][0]["text"], said["usage"]["completion_tokens"])
    return found


def measure(url: str, key: str, options: argparse.Namespace) -> list[dict]:
    body = {"max_tokens": options.max_tokens, "temperature": 0}
    wanted = references(url, key, body)
    lines = []
    for clients in options.clients:
        result = asyncio.run(load(url, key, clients, options.requests, body, wanted)).line()
        print("  ".join(f"{name} {value}" for name, value in result.items()), flush=True)
        lines.append(result)
    return lines


class Server:
    """``quantkit serve`` on a free port."""

    def __init__(self, model: str, *more: str) -> None:
        program = "from quantkit.cli.main import run; run()"
        command = [sys.executable, "-c", program, "serve", model, "--port", "0", *more]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
        for line in self.process.stderr:
            print(line, end="", file=sys.stderr)
            if "ready:" in line:
                self.url = re.search(r"http://[\d.:]+", line)[0]
                return
        raise SystemExit("the server did not start")

    @property
    def memory(self) -> int:
        """MB."""
        return psutil.Process(self.process.pid).memory_info().rss >> 20

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


async def vanish(url: str, clients: int, seconds: float) -> int:
    """Clients that begin streams and leave in their middle, for so long. How many did."""
    gone, end = 0, time.monotonic() + seconds

    async def one() -> None:
        nonlocal gone
        while time.monotonic() < end:
            body = {"prompt": random.choice(PROMPTS), "max_tokens": 1000, "stream": True}
            async with (
                httpx2.AsyncClient(base_url=url, timeout=60) as http,
                http.stream("POST", "/v1/completions", json=body) as response,
            ):
                async for _ in response.aiter_bytes():
                    if random.random() < 0.2:
                        gone += 1
                        break

    await asyncio.gather(*(one() for _ in range(clients)))
    return gone


async def dawdle(url: str, clients: int, seconds: float) -> None:
    """Clients that ask for much and read nothing."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps({"prompt": "a", "max_tokens": 1000, "stream": True, "logprobs": 20})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode()
    writers = []
    for _ in range(clients):
        _, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.write(request)
        writers.append(writer)
    await asyncio.sleep(seconds)
    for writer in writers:
        writer.close()


GARBAGE = [
    b"",
    b"[",
    b"\xff\xfe",
    b'{"prompt": ' + b"[" * 50_000,
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": [1e5]}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "' + b"a" * (6 << 20) + b'"}',
]


async def garbage(url: str, seconds: float) -> dict[int, int]:
    """Bodies that are no requests: how often each status came back."""
    seen: dict[int, int] = {}
    headers, end = {"content-type": "application/json"}, time.monotonic() + seconds
    async with httpx2.AsyncClient(base_url=url, timeout=60) as http:
        while time.monotonic() < end:
            for content in GARBAGE:
                try:
                    status = (
                        await http.post("/v1/completions", content=content, headers=headers)
                    ).status_code
                except httpx2.WriteError:  # refused before all of it was sent
                    status = 413
                seen[status] = seen.get(status, 0) + 1
            await asyncio.sleep(0.05)
    return seen


async def besides(server: Server, options: argparse.Namespace, wanted: dict) -> tuple[Result, dict]:
    """Good clients, and all the others at the same time."""
    body = {"max_tokens": options.max_tokens, "temperature": 0}
    good = load(server.url, "", 4, options.requests, body, wanted)
    others = [vanish(server.url, 4, options.seconds), dawdle(server.url, 4, options.seconds)]
    result, gone, _, seen = await asyncio.gather(
        good, *others, garbage(server.url, options.seconds)
    )
    return result, {"vanished": gone, "garbage": seen}


def faults(server: Server, options: argparse.Namespace) -> dict:
    """What good clients get beside bad ones, the memory after each round, and the end."""
    body = {"max_tokens": options.max_tokens, "temperature": 0}
    wanted = references(server.url, "", body)
    memory, told = [server.memory], {}
    for number in range(options.rounds):
        result, told = asyncio.run(besides(server, options, wanted))
        memory.append(server.memory)
        print(f"round {number + 1}: {result.line()} {told} {memory[-1]} MB", flush=True)
    if options.schemathesis:
        told["schemathesis"] = fuzzed(options.model)
    told["code_after_sigterm_under_load"] = asyncio.run(ended(server))
    return {"good": result.line(), "memory_mb": memory, **told}


def fuzzed(model: str) -> int:
    """The exit code of schemathesis with a server of its own, whose answers are short. A request
    that its schema allows may be refused: which ids and roles, and how long, the model decides."""
    server = Server(model, "--dtype", "float32", "--context", "128")
    command = ["schemathesis", "run", f"{server.url}/openapi.json", "--max-examples", "30"]
    command += ["--exclude-checks", "positive_data_acceptance", "--request-timeout", "60"]
    try:
        return subprocess.run(command, check=False).returncode
    finally:
        server.process.kill()


async def ended(server: Server) -> dict:
    """SIGTERM while four streams run: their ends, and the exit code."""
    body = {"prompt": PROMPTS[0], "max_tokens": 200, "temperature": 0}
    heard = Result(4)
    async with httpx2.AsyncClient(base_url=server.url, timeout=60) as http:
        streams = [asyncio.create_task(stream(http, body, heard)) for _ in range(4)]
        await asyncio.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        texts = await asyncio.gather(*streams, return_exceptions=True)
    whole = sum(isinstance(text, str) for text in texts)
    return {"streams_completed": whole, "exit_code": server.process.wait(60)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--url")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--against", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="of a round of faults")
    parser.add_argument("--schemathesis", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, object] = {}
    if options.faults:
        server = Server(options.model, "--dtype", "float32")
        try:
            found["faults"] = faults(server, options)
        finally:
            server.process.kill()
        print(json.dumps(found["faults"]))
    else:
        # one at a time: the same server, with a batch of one
        for name, more in (("quantkit", ()), ("one at a time", ("--max-batch", "1"))):
            if options.url and more:
                continue
            print(f"== {name}")
            if options.url:
                found[name] = measure(options.url, options.api_key, options)
                continue
            server = Server(options.model, "--dtype", "float32", "--queue", "1000", *more)
            try:
                found[name] = measure(server.url, "", options)
                server.stop()
            finally:
                server.process.kill()
        for name, _, url in (one.partition("=") for one in options.against):
            print(f"== {name}")
            found[name] = measure(url, options.api_key, options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
