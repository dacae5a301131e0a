"""Tokens a second on a CPU, batch 1, all in one run and in turns: quantkit's torch engine (with a
compiled token and by calls of torch), transformers' generate on the same weights, and where
llama-cpp-python is importable, llama.cpp on the same numbers as Q4_0: through quantkit's engine,
through llama-cpp-python's own loop, and llama_decode alone, one token after another with nothing
chosen, which is what llama-bench measures.

    python benchmarks/generate_cpu.py [--threads 2] [--new 128] [--prompt 32] [--repeats 5]

The model is a Llama of random weights, about 310M parameters. Runs take turns, so that what else
the machine does falls on all alike; the best of the repeats counts.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from quantkit import data
from quantkit.core.sampling import Sampling
from quantkit.runtime import llamacpp, token_loop
from quantkit.runtime.decode_cpu import LlamaState
from quantkit.runtime.load import load
from quantkit.runtime.torch_engine import CacheState, TorchEngine
from quantkit.workflows.convert import convert
from quantkit.workflows.rtn import quantize_rtn

GREEDY = Sampling(temperature=0)


def built(folder: Path, layers: int) -> Path:
    """A random Llama with the demo's tokenizer, and a vocabulary as large as usual."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=8192,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(data.demo()).save_pretrained(folder)
    return folder


def seconds(engine, ids: list[int], new: int) -> float:
    """For ``new`` tokens behind the first one, without the prompt."""
    stream = engine.stream(ids, GREEDY, new + 1)
    next(stream)
    started = perf_counter()
    count = sum(1 for _ in stream)
    return (perf_counter() - started) / count


def generated(model, ids: list[int], new: int) -> float:
    """The same through transformers' generate, which computes the prompt too: the difference of
    two lengths."""
    given = torch.tensor([ids])
    took = []
    for count in (1, new + 1):
        started = perf_counter()
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        took.append(perf_counter() - started)
        assert out.shape[1] == len(ids) + count
    return (took[1] - took[0]) / new


class Plain:
    """llama-cpp-python by itself, with the settings of quantkit's engine."""

    def __init__(self, file: Path, threads: int) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.llama = llama_cpp.Llama(
            str(file), n_ctx=1024, n_batch=512, n_threads=threads, verbose=False
        )

    def loop(self, ids: list[int], new: int) -> float:
        """Its own loop, greedy."""
        self.llama.reset()
        tokens = self.llama.generate(ids, temp=0.0)
        next(tokens)
        started = perf_counter()
        for _ in range(new):
            next(tokens)
        return (perf_counter() - started) / new

    def decode(self, ids: list[int], new: int) -> float:
        """llama_decode, called for every token."""
        api, context = self.api, self.llama.ctx
        api.llama_memory_clear(api.llama_get_memory(context), True)
        prompt = (api.llama_token * len(ids))(*ids)
        one = (api.llama_token * 1)(ids[0])
        assert api.llama_decode(context, api.llama_batch_get_one(prompt, len(ids))) == 0
        api.llama_synchronize(context)
        started = perf_counter()
        for _ in range(new):
            assert api.llama_decode(context, api.llama_batch_get_one(one, 1)) == 0
        api.llama_synchronize(context)
        return (perf_counter() - started) / new


def engines(work: Path, source: Path) -> dict[str, TorchEngine]:
    """Each with a model of its own."""
    found = {}
    for name, folder in (
        ("quantkit, int4", work / "int4"),
        ("quantkit by calls, int4", work / "int4"),
        ("cache of transformers, int4", work / "int4"),
        ("quantkit, bf16", source),
    ):
        model, tokenizer = load(str(folder), device="cpu", dtype="bfloat16")
        found[name] = TorchEngine(model, tokenizer)
    calls = LlamaState(found["quantkit by calls, int4"].model)
    calls._loop = None
    found["quantkit by calls, int4"]._decoder._state = calls
    plain = found["cache of transformers, int4"]
    plain._decoder._state = CacheState(plain.model)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if reason := token_loop.why_not():
        print(f"no token is compiled: {reason}")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        source = built(work / "dense", options.layers)
        quantize_rtn(str(source), str(work / "int4"), bits=4, group=32)
        ids = torch.randint(2, 8000, (options.prompt,), generator=torch.manual_seed(1)).tolist()
        torch_engines = engines(work, source)
        runs = {n: partial(seconds, one, ids, options.new) for n, one in torch_engines.items()}
        for kind, name in (("int4", "cache of transformers, int4"), ("bf16", "quantkit, bf16")):
            model = torch_engines[name].model
            runs[f"transformers generate, {kind}"] = partial(generated, model, ids, options.new)
        closing = []
        if llamacpp.installed():
            convert(str(work / "int4"), to="gguf:q4_0", out=str(work / "gguf"))
            file = next((work / "gguf").glob("*.gguf"))
            engine = llamacpp.LlamaCpp(file, context=1024, threads=options.threads)
            plain = Plain(file, options.threads)
            runs["quantkit's llama.cpp, Q4_0"] = partial(seconds, engine, ids, options.new)
            runs["llama-cpp-python, Q4_0"] = partial(plain.loop, ids, options.new)
            runs["llama_decode alone, Q4_0"] = partial(plain.decode, ids, options.new)
            closing = [engine, plain.llama]
        best: dict[str, float] = {}
        for _ in range(options.repeats):
            for name, run in runs.items():
                best[name] = min(best.get(name, float("inf")), run())
        for one in closing:
            one.close()
    base = best["transformers generate, int4"]
    for name, took in best.items():
        print(f"{name:30} {1 / took:7.1f} tokens/s  {base / took:5.2f} x")
    print(json.dumps({name: round(1 / took, 1) for name, took in best.items()}))


if __name__ == "__main__":
    main()
