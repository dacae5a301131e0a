"""Memory and speed of ``quantkit verify``, for models of more and more blocks.

    python benchmarks/verify_speed.py --blocks 3,6,12 --hidden 2048 --mlp 8192 \
        --rows 16 --seqlen 256 --folder SCRATCH --out benchmarks/results/verify_speed.json

Makes GPT-NeoX models of random weights (float16, one file a block) that differ in the number of
blocks alone, and their 4-bit rounding. Then, each in a process of its own: ``quantkit verify``
(without continuations) of each, whose memory is watched; and for the largest, verify of one row of
two tokens ("start": imports, reading both models), and what it is held against, transformers'
forward passes of both models on the same rows, both whole in memory. Tokens a second of verify are
those of what it takes longer than its start. Memory is looked at every 10 ms: RssAnon is what a
process has for itself; RssFile are mapped pages of files, which the system takes back when it needs
them. OUT with the ending .md is a table of it.
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
    counts = sorted(int(count) for count in args.blocks.split(","))
    rows = torch.randint(0, 8192, (args.rows, args.seqlen), generator=_generator()).tolist()
    args.folder.mkdir(parents=True, exist_ok=True)
    text, short = args.folder / "rows.jsonl", args.folder / "short.jsonl"
    text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows), "utf-8")
    short.write_text(json.dumps({"input_ids": rows[0][:2]}) + "\n", "utf-8")
    pairs = {count: _pair(args, count) for count in counts}
    verify = {count: _verify(args, text, *pair) for count, pair in pairs.items()}
    most = counts[-1]
    start = _verify(args, short, *pairs[most])
    forwards = [sys.executable, "-c", _FORWARDS, *map(str, pairs[most]), json.dumps(rows)]
    commands = {"start": start, "forwards": [*forwards, args.dtype]}
    commands |= {f"verify {count}": verify[count] for count in counts}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for number in range(args.rounds):
        for name, command in commands.items():
            runs[name].append(_watched(command))
            print(f"round {number + 1}  {name:10} {runs[name][-1]}", flush=True)
    seconds = {name: min(run["seconds"] for run in some) for name, some in runs.items()}
    spent = {
        "verify": seconds[f"verify {most}"] - seconds["start"],
        "forwards": seconds["forwards"],
    }
    tokens = 2 * args.rows * args.seqlen
    one = pairs[most][0]
    result = {
        "command": _command(args),
        "machine": {"device": provenance.machine(torch.device("cpu")), "cores": os.cpu_count()},
        "versions": {**provenance.versions(), "platform": platform.platform()},
        "model_mb": {count: [_megabytes(folder) for folder in pairs[count]] for count in counts},
        "largest_file_mb": max(_size(file) for file in one.glob("*.safetensors")),
        "hidden_states_mb": round(2 * args.rows * args.seqlen * args.hidden * 2 / 1e6, 1),
        "runs": runs,
        "tokens_per_s": {name: round(tokens / took, 1) for name, took in spent.items()},
    }
    table = _table(result, counts)
    print(table)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        args.out.with_suffix(".md").write_text(table, "utf-8")


def _command(args: argparse.Namespace) -> str:
    """What was called, without the folders of this machine."""
    told = {"folder": "SCRATCH", "out": "OUT.json"}
    options = (f"--{name} {told.get(name, value)}" for name, value in vars(args).items())
    return " ".join(["verify_speed.py", *options])


def _pair(args: argparse.Namespace, blocks: int) -> tuple[Path, Path]:
    """The original of so many blocks and its 4-bit rounding, made where they are not there yet."""
    original, quantized = args.folder / f"original-{blocks}", args.folder / f"rtn-4bit-{blocks}"
    if not original.exists():
        make(original, blocks, args.hidden, args.mlp)
    if not quantized.exists():
        _watched(_cli("rtn", original, "--bits", 4, "--out", quantized, "-q"))
    return original, quantized


def _verify(args: argparse.Namespace, text: Path, original: Path, quantized: Path) -> list[str]:
    command = _cli("verify", quantized, "--against", original, "--text", text, "--no-samples")
    command += ["--no-write", "-q", "--device", "cpu", "--dtype", args.dtype]
    return [*command, "--rows", str(args.rows), "--seqlen", str(args.seqlen)]


def _table(result: dict[str, Any], counts: list[int]) -> str:
    """The result as Markdown."""
    lines = [
        "# Memory and speed of `quantkit verify`",
        "",
        f"`{result['command']}` on {result['machine']['device']}, "
        f"{os.environ.get('OMP_NUM_THREADS', 'all')} used. A block has "
        f"{result['largest_file_mb']} MB in the file; the hidden states of both models together "
        f"{result['hidden_states_mb']} MB.",
        "",
        "| blocks | original, quantized (MB) | RssAnon at most (MB) | RssAnon + RssFile (MB) |",
        "|---|---|---|---|",
    ]
    for count in counts:
        runs = result["runs"][f"verify {count}"]
        own, all_of_it = (max(run[key] for run in runs) for key in ("anon_mb", "rss_mb"))
        sizes = ", ".join(f"{size:,.0f}" for size in result["model_mb"][count])
        lines.append(f"| {count} | {sizes} | {own:.0f} | {all_of_it:.0f} |")
    speed, runs = result["tokens_per_s"], result["runs"]
    seconds = {name: min(run["seconds"] for run in some) for name, some in runs.items()}
    own, all_of_it = (max(run[key] for run in runs["forwards"]) for key in ("anon_mb", "rss_mb"))
    lines += [
        "",
        f"Tokens a second, both models together, {counts[-1]} blocks: verify {speed['verify']} "
        f"({seconds[f'verify {counts[-1]}']:.0f} s in all, {seconds['start']:.0f} s of them to "
        "start and to read both models), plain forward passes with both models in memory "
        f"{speed['forwards']} ({seconds['forwards']:.0f} s without loading; RssAnon {own:.0f} MB, "
        f"with RssFile {all_of_it:.0f} MB). The loaded model multiplies its weights out for every "
        "row, verify once for all rows.",
    ]
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", default="3,6,12", help="how many, of each model")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1)
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
    return round(sum(_size(file) for file in folder.glob("*.safetensors")), 1)


def _size(file: Path) -> float:
    return round(file.stat().st_size / 1e6, 1)


def _cli(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "quantkit", *map(str, arguments)]


def _watched(command: list[str]) -> dict[str, float]:
    """A process of its own: its seconds (or those that it prints, without loading), and the most
    memory that it had."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    own = both = 0
    while process.poll() is None:
        anon, file = _memory(process.pid)
        own, both = max(own, anon), max(both, anon + file)
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    assert process.stdout is not None
    printed = process.stdout.read()  # a few lines, which wait in the pipe
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed")
    if command[2] == _FORWARDS:
        seconds = float(printed)
    return {
        "seconds": round(seconds, 2),
        "anon_mb": round(own * 1024 / 1e6, 1),
        "rss_mb": round(both * 1024 / 1e6, 1),
    }


def _memory(pid: int) -> tuple[int, int]:
    """RssAnon and RssFile of a process now, in KiB; nothing when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    status = dict(line.split(":", 1) for line in lines)
    anon, file = (status.get(key, "0 kB").split()[0] for key in ("RssAnon", "RssFile"))
    return int(anon), int(file)


if __name__ == "__main__":
    main()
