"""Tokens a second on a CPU, batch 1: our loop, transformers' on the same 4-bit model, our loop in
bfloat16, and llama.cpp on the same numbers as Q4_0, where it is importable.

    python benchmarks/generate_cpu.py [--threads 2] [--new 128] [--prompt 32] [--repeats 3]

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
from quantkit.runtime import llamacpp
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        source = built(work / "dense", options.layers)
        quantize_rtn(str(source), str(work / "int4"), bits=4, group=32)
        ids = torch.randint(2, 8000, (options.prompt,), generator=torch.manual_seed(1)).tolist()
        ours, tokenizer = load(str(work / "int4"), device="cpu", dtype="bfloat16")
        plain, _ = load(str(work / "int4"), device="cpu", dtype="bfloat16")
        dense, _ = load(str(source), device="cpu", dtype="bfloat16")
        engines = {
            "quantkit, int4": TorchEngine(ours, tokenizer),
            "cache of transformers, int4": TorchEngine(plain, tokenizer),
            "quantkit, bf16": TorchEngine(dense, tokenizer),
        }
        engines["cache of transformers, int4"]._decoder._state = CacheState(plain)
        runs = {name: partial(seconds, one, ids, options.new) for name, one in engines.items()}
        runs["transformers generate, int4"] = partial(generated, plain, ids, options.new)
        if llamacpp.installed():
            convert(str(work / "int4"), to="gguf:q4_0", out=str(work / "gguf"))
            file = next((work / "gguf").glob("*.gguf"))
            other = llamacpp.LlamaCpp(file, context=1024, threads=options.threads)
            runs["llama.cpp, Q4_0"] = partial(seconds, other, ids, options.new)
        best: dict[str, float] = {}
        for _ in range(options.repeats):
            for name, run in runs.items():
                best[name] = min(best.get(name, float("inf")), run())
    base = best["transformers generate, int4"]
    for name, took in best.items():
        print(f"{name:30} {1 / took:7.1f} tokens/s  {base / took:5.2f} x")
    print(json.dumps({name: 1 / took for name, took in best.items()}))


if __name__ == "__main__":
    main()
