"""Memory and speed of ``quantkit verify``, beside the sizes of the models and plain forward passes.

    python benchmarks/verify_speed.py --blocks 24 --hidden 4096 --mlp 16384 --rows 4 --seqlen 512 \
        --folder SCRATCH --out benchmarks/results/verify_speed.json

Makes a GPT-NeoX model of random weights (float16, one file a block) and its 4-bit rounding. Then,
each in a process of its own: ``quantkit verify`` (without continuations) on one row of two tokens
("start": imports, reading both models) and on all rows; and what it is held against, transformers'
forward passes of both models on the same rows, both whole in memory. Tokens a second of verify are
those of what it takes longer than its start. Its peak should be that of the quantized model and a
block of the original, and not of the original.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from quantkit import data
from quantkit.core import provenance
from quantkit.core.checkpoint import ShardWriter, TensorSpec, write_json

_CLI = "from quantkit.cli.main import run; run()"
_FORWARDS = """
import json, sys, time, torch
from quantkit import load
models, rows = sys.argv[1:3], json.loads(sys.argv[3])
loaded = [load(model, device="cpu", dtype=sys.argv[4])[0] for model in models]
for start in range(2):  # the first time warms up
    begin = time.perf_counter()
    with torch.no_grad():
        for row in rows[: None if start else 1]:
            for model in loaded:
                model(input_ids=torch.tensor([row]), use_cache=False)
print(time.perf_counter() - begin)
"""


def main() -> None:
    args = _arguments()
    original, quantized = args.folder / "original", args.folder / "rtn-4bit"
    if not original.exists():
        make(original, args.blocks, args.hidden, args.mlp)
    if not quantized.exists():
        _timed(_cli("rtn", original, "--bits", 4, "--out", quantized, "-q"))
    rows = torch.randint(0, 8192, (args.rows, args.seqlen), generator=_generator()).tolist()
    text = args.folder / "rows.jsonl"
    text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows), "utf-8")
    measure = _cli("verify", quantized, "--against", original, "--text", text, "--no-samples")
    measure += ["--no-write", "-q", "--device", "cpu", "--dtype", args.dtype]
    forwards = [sys.executable, "-c", _FORWARDS, str(original), str(quantized), json.dumps(rows)]
    commands = {
        "start": [*measure, "--rows", "1", "--seqlen", "2"],
        "verify": [*measure, "--rows", str(args.rows), "--seqlen", str(args.seqlen)],
        "forwards": [*forwards, args.dtype],
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for number in range(args.rounds):
        for name, command in commands.items():
            runs[name].append(_timed(command))
            print(f"round {number + 1}  {name:10} {runs[name][-1]}", flush=True)
    seconds = {name: min(run["seconds"] for run in some) for name, some in runs.items()}
    seconds["verify"] -= seconds.pop("start")
    tokens = 2 * args.rows * args.seqlen
    sizes = {folder.name: _megabytes(folder) for folder in (original, quantized)}
    block = max(file.stat().st_size for file in original.glob("*.safetensors")) / 1e6
    result = {
        "command": " ".join(["verify_speed.py", *sys.argv[1:]]),
        "machine": {"device": provenance.machine(torch.device("cpu")), "cores": os.cpu_count()},
        "versions": {**provenance.versions(), "platform": platform.platform()},
        "model_mb": sizes,
        "largest_file_mb": round(block, 1),
        "runs": runs,
        "tokens_per_s": {name: round(tokens / took, 1) for name, took in seconds.items()},
    }
    peak = min(run["peak_mb"] for run in runs["verify"])
    print(f"verify: {peak:.0f} MB at most; the original has {sizes['original']:.0f} MB")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=16384)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def make(folder: Path, blocks: int, hidden: int, mlp: int) -> None:
    """A GPT-NeoX checkpoint of random weights with the demo's tokenizer, a file a block."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = _config(blocks, hidden, mlp)
    shapes = _shapes(config)
    specs = {name: TensorSpec(torch.float16, shape) for name, shape in shapes.items()}
    in_block = sum(spec.nbytes for name, spec in specs.items() if ".layers.0." in name)
    writer = ShardWriter(partial, specs, in_block)
    generator = _generator()
    for name, shape in shapes.items():
        if "layernorm.weight" in name or "layer_norm.weight" in name:
            tensor = torch.ones(shape)
        else:
            tensor = torch.randn(shape, generator=generator) * 0.02
        writer.write(name, tensor.half())
    writer.close()
    write_json(partial / "config.json", config)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(data.demo() / file, partial / file)
    partial.rename(folder)


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, mlp, words = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    shapes: dict[str, tuple[int, ...]] = {"gpt_neox.embed_in.weight": (words, hidden)}
    linears = {
        "attention.query_key_value": (3 * hidden, hidden),
        "attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (mlp, hidden),
        "mlp.dense_4h_to_h": (hidden, mlp),
    }
    for block in range(config["num_hidden_layers"]):
        prefix = f"gpt_neox.layers.{block}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{prefix}{norm}.{part}": (hidden,) for part in ("weight", "bias")}
        for name, shape in linears.items():
            shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[:1]}
    for part in ("weight", "bias"):
        shapes[f"gpt_neox.final_layer_norm.{part}"] = (hidden,)
    return {**shapes, "embed_out.weight": (words, hidden)}


def _config(blocks: int, hidden: int, mlp: int) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": max(1, hidden // 128),
        "num_hidden_layers": blocks,
        "vocab_size": json.loads((data.demo() / "config.json").read_text("utf-8"))["vocab_size"],
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float16",
    }


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _megabytes(folder: Path) -> float:
    return round(sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6, 1)


def _cli(*arguments: object) -> list[str]:
    return [sys.executable, "-c", _CLI, *map(str, arguments)]


def _timed(command: list[str]) -> dict[str, float]:
    """A process of its own: its seconds (or those that it prints, without loading) and its peak."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command[:4])} failed")
    seconds = time.perf_counter() - start
    if command[2] == _FORWARDS:
        seconds = float(printed)
    return {"seconds": round(seconds, 2), "peak_mb": round(usage.ru_maxrss * 1024 / 1e6, 1)}


if __name__ == "__main__":
    main()
