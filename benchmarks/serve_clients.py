"""Clients of `quantkit serve` that do little but note when something comes.

    python benchmarks/serve_clients.py '{"address": "127.0.0.1:8000", "count": 8, "requests": 2,
        "vocab": 8192, "prompt": [96, 160], "seed": 0, "body": {"max_tokens": 64, "stream": true,
        "stream_options": {"include_usage": true}}}'

Each of ``count`` clients streams one completion behind random ids after the other, once a line is
on the standard input. They read sockets and count events, so that many fit into a process that
imports nothing; serve_gpu.py starts several. Answers are a line of JSON: of each stream when it
began, when each of its events with text came, and the tokens that the server counted.
"""

import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

_EVENT = b'"text": "'


@dataclass
class Heard:
    """Of one stream; times are those of the machine's clock."""

    started: float
    events: list[float]
    tokens: int


async def stream(address: str, body: dict[str, Any]) -> Heard:
    host, port = address.split(":")
    content = json.dumps(body).encode()
    started, events, last = time.time(), [], b""
    reader, writer = await asyncio.open_connection(host, int(port))
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    while b"data: [DONE]" not in last:
        part = await reader.read(1 << 16)
        if not part:
            raise ConnectionError(f"the stream was cut off: {last[-200:]!r}")
        # what a read has cut in two is looked at with the next one
        cut = last[-len(_EVENT) + 1 :] if last else b""
        events += [time.time()] * (cut + part).count(_EVENT)
        last = last[-200:] + part
    writer.close()
    told = last.rpartition(b'"completion_tokens": ')[2]
    return Heard(started, events, int(told.partition(b",")[0]))


async def clients(options: dict[str, Any]) -> list[Heard]:
    chance, found = random.Random(options["seed"]), []

    async def client() -> None:
        for _ in range(options["requests"]):
            length = chance.randint(*options["prompt"])
            prompt = [chance.randrange(options["vocab"]) for _ in range(length)]
            found.append(await stream(options["address"], options["body"] | {"prompt": prompt}))

    await asyncio.gather(*(client() for _ in range(options["count"])))
    return found


def main() -> None:
    options = json.loads(sys.argv[1])
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps([asdict(one) for one in asyncio.run(clients(options))]))


if __name__ == "__main__":
    main()
