"""Time and memory of quantizing a model of weblab-10b's shape on a GPU, disk to sealed folder.

    python benchmarks/quantize_gpu.py --blocks 36 --run fast --run default --folder SCRATCH \\
        --ranks 1 --ranks 2 --out results.json

Makes a model with random weights (float16; --shape: neox-10b, that of weblab-10b, or llama-67b,
that of deepseek-llm-67b) and random calibration rows, then quantizes it once for every --run, each
in a process of its own:

    fast, default        quantkit gptq --fast, quantkit gptq
    low, low-default     the same within --low-memory of GPU memory and --low-ram of RAM
    awq                  quantkit awq

With --ranks N (repeatable) every run is started by torchrun as N processes, each on a GPU of its
own; speed-ups are over the first N, whole and per block.

Peers run in the same call, each as the command that its --peer gives, and are set against every
run:

    --peer 'llm-compressor=env PYTHONPATH=WHEELS python bench_llmcompressor.py --layers 2'

A peer ends with a line ``RESULT {...}`` that has its seconds a block (quant_s_per_layer).

The first block of a process carries what is made once (kernels, libraries' handles): it is told
apart, and ``s_per_block`` is the mean of all others, with everything that a block takes (reading,
solving, writing, the check that rides along). A block ends when the next one has been looked at,
some 20 ms that the last one does not have. A model may have fewer blocks than its shape has: what
the whole one would take is then extrapolated, and said to be. Memory is that of any number.

Seconds by phase come from --profile, which waits for the GPU at every phase's ends and so takes a
little longer. The floor is the arithmetic that cannot be avoided (a forward pass, the Hessians'
upper halves, Cholesky, one pass of rounding) at --tflops.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quantkit import data
from quantkit.core.checkpoint import ShardWriter, TensorSpec
from quantkit.core.profile import Profile
from quantkit.core.progress import Progress, Step

IDS = 8192  # what the tokenizer that is lent to the model knows
COMMON = {"max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 0, "dtype": "float16"}
# weblab-10b and deepseek-llm-67b: their configurations, the widths of the inputs in a block that
# linears have in common, and their blocks
SHAPES: dict[str, tuple[dict[str, Any], tuple[int, ...], int]] = {
    "neox-10b": (
        {
            "model_type": "gpt_neox",
            "hidden_size": 4864,
            "intermediate_size": 19456,
            "num_attention_heads": 38,
            "vocab_size": 50277,
            "use_parallel_residual": True,
            "tie_word_embeddings": False,
        },
        (4864, 4864, 4864, 19456),
        36,
    ),
    "llama-67b": (
        {
            "model_type": "llama",
            "hidden_size": 8192,
            "intermediate_size": 22016,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 102400,
            "tie_word_embeddings": False,
        },
        (8192, 8192, 8192, 22016),
        95,
    ),
}


def main() -> None:
    args = _arguments()
    if args.child:
        _child(args)
        return
    source, rows = _source(args), args.folder / "rows.jsonl"
    made = time.perf_counter()
    if not source.exists():
        make(source, args.shape, args.blocks)
    _make_rows(rows, args.rows, args.tokens)
    print(f"model of {args.blocks} blocks made in {time.perf_counter() - made:.0f} s", flush=True)
    seconds = floor(args.shape, args.rows * args.tokens) / args.tflops / 1e12
    result: dict[str, Any] = {
        "command": _public(["quantize_gpu.py", *sys.argv[1:]]),
        "machine": {
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "floor_s_per_block": round(seconds, 3),
        "runs": {},
        "peers": {},
    }
    for run in args.run:
        first = None
        for ranks in args.ranks or [1]:
            found = _measured(args, run, ranks)
            if found is None:
                continue
            first = first or found
            found["floor_share"] = round(seconds / ranks / found["s_per_block"], 3)
            if ranks > 1:
                found["speed_up"] = {
                    key: round(first[key] / found[key], 2) for key in ("s_per_block", "wall_s")
                }
            name = run if ranks == 1 else f"{run}, {ranks} GPUs"
            result["runs"][name] = found
            print(name, json.dumps(found), flush=True)
    for peer in args.peer or []:
        name, _, command = peer.partition("=")
        told = _peer(shlex.split(command))
        if told is None:
            continue
        result["peers"][name] = told
        print(name, json.dumps(told), flush=True)
        for name_of_run, found in result["runs"].items():
            times = round(told["s_per_block"] / found["s_per_block"], 2)
            found.setdefault("times_as_fast_as", {})[name] = times
            print(f"{name_of_run}: {times} times as fast as {name}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def _measured(args: argparse.Namespace, run: str, ranks: int) -> dict[str, Any] | None:
    """What a run by so many processes took, or None when it failed."""
    shutil.rmtree(args.folder / "out", ignore_errors=True)
    shutil.rmtree(args.folder / "out.partial", ignore_errors=True)
    # -- : torchrun takes what it can for its own
    several = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--"]
    several = several if ranks > 1 else []
    command = [sys.executable, *several, __file__, *sys.argv[1:], "--child", run]
    os.sync()  # the model, or what the run before wrote, is not what this one waits for
    start = time.perf_counter()
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    wall = time.perf_counter() - start
    if process.returncode:
        print(f"{run} on {ranks} failed with exit code {process.returncode}")
        return None
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    first, *others = found.pop("each_block_s")
    mean = sum(others) / len(others) if others else first
    found |= {
        "wall_s": round(wall, 2),
        "first_block_s": round(first, 3),
        "s_per_block": round(mean, 3),
    }
    blocks = SHAPES[args.shape][2]
    if blocks > args.blocks:
        found["extrapolated"] = {
            "blocks": blocks,
            "from": args.blocks,
            "wall_s": round(wall + (blocks - args.blocks) * mean, 1),
        }
    return found


def _peer(command: list[str]) -> dict[str, Any] | None:
    """What a peer tells of itself, or None when it failed."""
    start = time.perf_counter()
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    wall = time.perf_counter() - start
    lines = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    if process.returncode or not lines:
        print(f"{shlex.join(command)} failed with exit code {process.returncode}")
        return None
    told: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return {
        "s_per_block": told["quant_s_per_layer"],
        "wall_s": round(wall, 2),
        "command": _public(command),
        "told": told,
    }


def _public(words: list[str]) -> str:
    """A command without the folders of this machine; peers are told by their names."""
    return shlex.join(Path(word.partition("=")[0]).name for word in words)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, default="neox-10b")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--run", action="append", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--ranks", action="append", type=int, help="GPUs, 1 if not given")
    parser.add_argument("--peer", action="append", metavar="NAME=COMMAND")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--low-memory", default="6GB")
    parser.add_argument("--low-ram", default="4GB")
    parser.add_argument("--tflops", type=float, default=750.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def _source(args: argparse.Namespace) -> Path:
    folder: Path = args.folder
    return folder / f"{args.shape}-{args.blocks}"


def floor(shape: str, tokens: int) -> float:
    """FLOP of a block."""
    model, widths = _model(shape, 1), SHAPES[shape][1]
    linears = [
        module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    ]
    forward = 2 * tokens * sum(out * width for out, width in linears)
    hessians = sum(tokens * width * (width + 1) for width in widths)
    factors = sum(width**3 / 3 for width in widths)
    rounding = sum(out * width * width for out, width in linears)
    return forward + hessians + factors + rounding


def _model(shape: str, blocks: int) -> PreTrainedModel:
    """Without weights."""
    settings = dict(SHAPES[shape][0])
    kind = settings.pop("model_type")
    config = AutoConfig.for_model(kind, **settings, **COMMON, num_hidden_layers=blocks)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float16)


def make(folder: Path, shape: str, blocks: int) -> None:
    """A checkpoint of random weights, made on the GPU."""
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True)
    model = _model(shape, blocks)
    specs = {
        name: TensorSpec(torch.float16, tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }
    writer = ShardWriter(partial, specs, 4_000_000_000)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    for name, spec in specs.items():
        if len(spec.shape) == 2:
            weight = torch.randn(spec.shape, generator=generator, device=device)
            writer.write(name, (weight * 0.02).half())
        else:
            is_scale = name.endswith("norm.weight")
            writer.write(name, (torch.ones if is_scale else torch.zeros)(spec.shape).half())
    writer.close()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(partial)
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
    from quantkit.cli import process
    from quantkit.core import profile
    from quantkit.workflows.awq import quantize_awq
    from quantkit.workflows.quantize import quantize

    process.prepare()  # as the command does
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
    steps = _Steps(measured)
    with _host_memory() as peak:
        carry = quantize_awq if run == "awq" else quantize
        report = carry(str(_source(args)), args.folder / "out", progress=steps, **options)
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
                "each_block_s": steps.seconds,
                "seconds": {name: round(spent, 2) for name, spent in report.seconds.items()},
                "phases_per_block": steps.phases(),
                "gpu_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
                "gpu_allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
                "host_gb": round(peak[0] / 1e9, 2),
            }
        )
    )


class _Steps(Progress):
    """The seconds of each block, of the last walk if there were several; by phase, those of all but
    the first."""

    def __init__(self, measured: Profile | None) -> None:
        self.seconds: list[float] = []
        self._since = 0.0
        self._measured = measured
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def begin(self, title: str, total: int) -> None:
        self.seconds, self._since = [], time.perf_counter()

    def step(self, step: Step) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self._since = now
        if self._measured:
            self._last = dict(self._measured.seconds)
            if len(self.seconds) == 1:
                self._first = self._last

    def phases(self) -> dict[str, float]:
        """Seconds a block."""
        count = len(self.seconds) - 1
        return {
            name: round((spent - self._first.get(name, 0.0)) / count, 4)
            for name, spent in self._last.items()
            if count
        }


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
