"""`quantkit serve` with a 10B GPT-NeoX in 4 bits on this GPU: what many clients get.

    python benchmarks/serve_gpu.py [--clients 1,8,32] [--new 256] [--json FILE]
    python benchmarks/serve_gpu.py --demo           the bundled model on a CPU, to see that it works

The model is that of generate_gpu.py, with random weights; nothing ends a text early. Each client
streams one completion after the other, of NEW tokens behind prompts of 96 to 160 random ids. Beside
it the same number of texts in generate's loop, in the same run: what that is faster is the price of
serving. Clients are processes of their own (serve_clients.py); every token is an event, since all
are spelled as whole characters.
"""

import argparse
import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import quantiles

import serve_clients
import torch
import uvicorn
from generate_gpu import Speed, measured, neox_of, quantize
from serve_clients import Heard
from transformers import AutoTokenizer, PreTrainedModel

from quantkit import data
from quantkit.runtime import decode
from quantkit.runtime.load import load
from quantkit.runtime.tokenizer import Tokenizer
from quantkit.serve.app import create_app
from quantkit.serve.guard import local_hosts
from quantkit.serve.model import Served
from quantkit.serve.prompts import Vocabulary
from quantkit.serve.worker import Worker
from quantkit.workflows.serve import configuration
from quantkit.workflows.serve_models import Settings, torch_backend

PROMPT = (96, 160)  # tokens
TOGETHER = 8  # clients in a process
CONTEXT = 2048


@dataclass(frozen=True)
class Found:
    """What clients saw. Times in milliseconds: to the first token, and between two of them."""

    clients: int
    tokens_per_second: float
    first_p50: float
    first_p99: float
    between_p50: float
    between_p99: float
    generate: float  # tokens/s of as many texts in generate's loop, from the first tokens on
    generate_whole: float  # with the prompt

    def __str__(self) -> str:
        return (
            f"{self.clients:3d} clients: {self.tokens_per_second:7.1f} tokens/s, first token "
            f"{self.first_p50:.0f} ms (p99 {self.first_p99:.0f}), then one every "
            f"{self.between_p50:.2f} ms (p99 {self.between_p99:.1f}); generate "
            f"{self.generate:7.1f} tokens/s, {self.generate_whole:.1f} with the prompt: served "
            f"{self.tokens_per_second / self.generate:.0%}, "
            f"{self.tokens_per_second / self.generate_whole:.0%}"
        )


# the server


class Spelled(Tokenizer):
    """The bundled tokenizer for any number of ids: each is one of its tokens that are text."""

    def __init__(self) -> None:
        super().__init__(AutoTokenizer.from_pretrained(data.demo()))
        spelled = super().decode
        every = {i: spelled([i]) for i in range(len(self.tokenizer))}
        self._text = [i for i, text in every.items() if text and "\ufffd" not in text]

    def decode(self, ids: Sequence[int]) -> str:
        return super().decode([self._text[i % len(self._text)] for i in ids])


def served_model(model: PreTrainedModel, rows: int) -> Served:
    settings = Settings(max_batch=rows)
    started = time.perf_counter()
    backend = torch_backend(model, frozenset(), CONTEXT, settings, lambda text: print(" ", text))
    print(f"  the engine was ready in {time.perf_counter() - started:.1f} s", flush=True)
    vocabulary = Vocabulary(Spelled(), model.config.vocab_size)
    return Served("random", Worker(backend, settings.queue), vocabulary, {}, 1024, {})


@contextmanager
def running(served: Served) -> Iterator[str]:
    """Its address."""
    app = create_app([served], hosts=local_hosts(()), with_page=False)
    config = configuration(app, drain_seconds=1)
    config.port = 0
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


# the clients


def asked(address: str, count: int, requests: int, vocab: int, body: dict) -> list[Heard]:
    """What ``count`` clients heard, in as many processes as keep out of each other's way."""
    processes = []
    for first in range(0, count, TOGETHER):
        options = {"address": address, "count": min(TOGETHER, count - first), "seed": first}
        options |= {"requests": requests, "vocab": vocab, "prompt": PROMPT, "body": body}
        command = [sys.executable, serve_clients.__file__, json.dumps(options)]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
    for process in processes:
        process.stdout.readline()  # it is ready
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [process.communicate()[0] for process in processes]
    return [Heard(**one) for text in told for one in json.loads(text)]


def summed_up(count: int, heard: list[Heard], plain: Speed) -> Found:
    began = min(one.started for one in heard)
    seconds = max(one.events[-1] for one in heard) - began
    first = [one.events[0] - one.started for one in heard]
    between = [b - a for one in heard for a, b in pairwise(one.events)]

    def cut(times: list[float], share: int) -> float:
        found = quantiles(times, n=100) if len(times) > 1 else times * 99
        return round(found[share - 1] * 1e3, 3)

    rate = round(sum(one.tokens for one in heard) / seconds, 1)
    return Found(
        count,
        rate,
        cut(first, 50),
        cut(first, 99),
        cut(between, 50),
        cut(between, 99),
        round(plain.rate, 1),
        round(plain.whole, 1),
    )


def made(options: argparse.Namespace) -> PreTrainedModel:
    if options.demo:
        return load("demo", device="cpu", dtype="float32")[0]
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    started = time.perf_counter()
    model = neox_of(options.layers)
    quantize(model, symmetric=True)
    gc.collect()
    torch.cuda.empty_cache()
    print(
        f"{options.layers} layers in 4 bits made in {time.perf_counter() - started:.1f} s, "
        f"{torch.cuda.memory_allocated() / 2**30:.2f} GiB",
        flush=True,
    )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    counts = [int(text) for text in options.clients.split(",")]
    model = made(options)
    plain = {count: measured(model, count, options.new, sum(PROMPT) // 2) for count in counts}
    decode.release(model)
    body = {"max_tokens": options.new, "temperature": options.temperature, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    found, vocab = [], model.config.vocab_size
    with running(served_model(model, max(counts))) as address:
        asked(address, 1, 1, vocab, body)  # connections, and what is compiled at first
        for count in counts:
            heard = asked(address, count, options.requests, vocab, body)
            found.append(summed_up(count, heard, plain[count]))
            print(found[-1], flush=True)
    if model.device.type == "cuda":
        print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
