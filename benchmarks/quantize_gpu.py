"""Time and memory of quantizing a model of weblab-10b's shape on a GPU, disk to sealed folder.

    python benchmarks/quantize_gpu.py --blocks 36 --run fast --run default --folder SCRATCH \\
        --ranks 1 --ranks 2 --out results.json

Makes a GPT-NeoX with random weights (hidden 4864, 38 heads, MLP 19456, vocabulary 50277, float16)
and random calibration rows, then quantizes it once for every --run, each in a process of its own:

    fast, default        quantkit gptq --fast, quantkit gptq
    low, low-default     the same within --low-memory of GPU memory and --low-ram of RAM
    awq                  quantkit awq

With --ranks N (repeatable) every run is started by torchrun as N processes, each on a GPU of its
own; speed-ups are over the first N, whole and per block.

Seconds by phase come from --profile, which waits for the GPU at every phase's ends and so takes a
little longer. The floor is the arithmetic that cannot be avoided (a forward pass, the Hessians'
upper halves, Cholesky, one pass of rounding) at --tflops.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from quantkit import data
from quantkit.core.checkpoint import ShardWriter, TensorSpec, write_json

HIDDEN, MLP, HEADS, VOCABULARY = 4864, 19456, 38, 50277
IDS = 8192  # what the tokenizer that is lent to the model knows
LINEARS = {
    "attention.query_key_value": (3 * HIDDEN, HIDDEN),
    "attention.dense": (HIDDEN, HIDDEN),
    "mlp.dense_h_to_4h": (MLP, HIDDEN),
    "mlp.dense_4h_to_h": (HIDDEN, MLP),
}


def main() -> None:
    args = _arguments()
    if args.child:
        _child(args)
        return
    source, rows = args.folder / f"source-{args.blocks}", args.folder / "rows.jsonl"
    made = time.perf_counter()
    if not source.exists():
        make(source, args.blocks)
    _make_rows(rows, args.rows, args.tokens)
    print(f"model of {args.blocks} blocks made in {time.perf_counter() - made:.0f} s", flush=True)
    result: dict[str, Any] = {
        "command": " ".join(["quantize_gpu.py", *sys.argv[1:]]),
        "machine": {
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "floor_s_per_block": round(floor(args.rows * args.tokens) / args.tflops / 1e12, 3),
        "runs": {},
    }
    for run in args.run:
        first = None
        for ranks in args.ranks or [1]:
            found = _measured(args, run, ranks)
            if found is None:
                continue
            first = first or found
            if ranks > 1:
                found["speed_up"] = {
                    key: round(first[key] / found[key], 2) for key in ("s_per_block", "wall_s")
                }
            name = run if ranks == 1 else f"{run}, {ranks} GPUs"
            result["runs"][name] = found
            print(name, json.dumps(found), flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def _measured(args: argparse.Namespace, run: str, ranks: int) -> dict[str, Any] | None:
    """What a run by so many processes took, or None when it failed."""
    shutil.rmtree(args.folder / "out", ignore_errors=True)
    shutil.rmtree(args.folder / "out.partial", ignore_errors=True)
    several = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *several, __file__, *sys.argv[1:], "--child", run]
    threads = max(1, (os.cpu_count() or 1) // ranks)  # torchrun would leave one to each
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if several else {})}
    start = time.perf_counter()
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    wall = time.perf_counter() - start
    if process.returncode:
        print(f"{run} on {ranks} failed with exit code {process.returncode}")
        return None
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found | {
        "wall_s": round(wall, 2),
        "s_per_block": round(found["blocks_s"] / args.blocks, 3),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--run", action="append", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--ranks", action="append", type=int, help="GPUs, 1 if not given")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--low-memory", default="6GB")
    parser.add_argument("--low-ram", default="4GB")
    parser.add_argument("--tflops", type=float, default=750.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def floor(tokens: int) -> float:
    """FLOP of a block."""
    weights = sum(out * width for out, width in LINEARS.values())
    forward = 2 * tokens * weights
    hessians = sum(tokens * width * (width + 1) for _, width in LINEARS.values())
    factors = sum(width**3 / 3 for _, width in LINEARS.values())
    rounding = sum(out * width * width for out, width in LINEARS.values())
    return forward + hessians + factors + rounding


def make(folder: Path, blocks: int) -> None:
    """A GPT-NeoX of random weights, made on the GPU."""
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True)
    matrices = {
        "gpt_neox.embed_in.weight": (VOCABULARY, HIDDEN),
        "embed_out.weight": (VOCABULARY, HIDDEN),
    }
    vectors = {"gpt_neox.final_layer_norm": HIDDEN}
    biases = {}
    for block in range(blocks):
        prefix = f"gpt_neox.layers.{block}"
        vectors |= dict.fromkeys(
            (f"{prefix}.input_layernorm", f"{prefix}.post_attention_layernorm"), HIDDEN
        )
        for name, (out, width) in LINEARS.items():
            matrices[f"{prefix}.{name}.weight"] = (out, width)
            biases[f"{prefix}.{name}.bias"] = out
    half = torch.float16
    specs = {name: TensorSpec(half, shape) for name, shape in matrices.items()}
    specs |= {name: TensorSpec(half, (out,)) for name, out in biases.items()}
    for name, width in vectors.items():
        specs |= {f"{name}.{kind}": TensorSpec(half, (width,)) for kind in ("weight", "bias")}
    writer = ShardWriter(partial, specs, 4_000_000_000)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    for name, shape in matrices.items():
        weight = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        writer.write(name, (weight * 0.02).half())
    for name, spec in specs.items():
        if name not in matrices:
            is_scale = name.endswith("norm.weight")
            writer.write(name, (torch.ones if is_scale else torch.zeros)(spec.shape).half())
    writer.close()
    write_json(
        partial / "config.json",
        {
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": "gpt_neox",
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_attention_heads": HEADS,
            "num_hidden_layers": blocks,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 2048,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": True,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(data.demo() / file, partial / file)
    partial.rename(folder)


def _make_rows(path: Path, rows: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, IDS, (rows, tokens), generator=generator)
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()))


def _child(args: argparse.Namespace) -> None:
    """One run; prints what it took as a line of JSON."""
    began = time.perf_counter()
    from quantkit.core import profile
    from quantkit.workflows.awq import quantize_awq
    from quantkit.workflows.quantize import quantize

    torch.zeros(1, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    started = time.perf_counter()
    run = args.child
    options: dict[str, Any] = {
        "calib": str(args.folder / "rows.jsonl"),
        "calib_rows": args.rows,
        "calib_seqlen": args.tokens,
    }
    if run.startswith("low"):
        options |= {"max_gpu_memory": args.low_memory, "max_memory": args.low_ram}
    if run in ("fast", "low"):
        options["fast"] = True
    measured = profile.start() if args.profile else None
    with _host_memory() as peak:
        carry = quantize_awq if run == "awq" else quantize
        report = carry(str(args.folder / f"source-{args.blocks}"), args.folder / "out", **options)
    blocks = ("solve", "write", "propagate")
    if not report.written:
        return  # the first process speaks for all
    print(
        json.dumps(
            {
                "mode": str(report.plan.way),
                "backoffs": report.backoffs,
                "start_s": round(started - began, 2),
                "run_s": round(time.perf_counter() - started, 2),
                "blocks_s": round(sum(report.seconds.get(name, 0.0) for name in blocks), 2),
                "seconds": {name: round(spent, 2) for name, spent in report.seconds.items()},
                "phases": {n: round(s, 2) for n, s in measured.seconds.items()} if measured else {},
                "gpu_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
                "gpu_allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
                "host_gb": round(peak[0] / 1e9, 2),
            }
        )
    )


class _host_memory:  # noqa: N801  (used like a function)
    """The process's own memory at its largest, in bytes, without mapped files: sampled."""

    def __enter__(self) -> list[float]:
        self._peak, self._ended = [0.0], threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self._peak

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    self._peak[0] = max(self._peak[0], 1024 * float(line.split()[1]))


if __name__ == "__main__":
    main()
