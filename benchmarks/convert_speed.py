"""Throughput and memory of ``quantkit convert``, beside a plain copy of the same files.

    python benchmarks/convert_speed.py --blocks 20 --to awq --to compressed-tensors --to gguf:q4_0 \
        --folder SCRATCH --out results.json

Makes a GPTQ checkpoint with the shapes of weblab-10b's blocks (hidden 4864, MLP 19456; random
codes; 148 MB a block), copies it with cp and syncs the copy, then converts it to each target in a
process of its own, round after round. MB/s count the bytes of the source.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from quantkit import data
from quantkit.core.checkpoint import ShardWriter, TensorSpec, write_json
from quantkit.core.qweight import QWeight, Scheme
from quantkit.formats import gptq

_CLI = "from quantkit.cli.main import run; run()"
HIDDEN, MLP, HEADS, VOCABULARY = 4864, 19456, 38, 50304
LINEARS = {
    "attention.query_key_value": (3 * HIDDEN, HIDDEN),
    "attention.dense": (HIDDEN, HIDDEN),
    "mlp.dense_h_to_4h": (MLP, HIDDEN),
    "mlp.dense_4h_to_h": (HIDDEN, MLP),
}


def main() -> None:
    args = _arguments()
    source = args.folder / "source"
    if not source.exists():
        # in a process of its own: a child's peak memory counts from its parent's
        maker = multiprocessing.get_context("spawn").Process(
            target=make, args=(source, args.blocks)
        )
        maker.start()
        maker.join()
    size = sum(f.stat().st_size for f in source.glob("*.safetensors")) / 1e6
    runs: dict[str, list[dict[str, float]]] = {}
    for number in range(args.rounds):
        for name in ["cp", *args.to]:
            out = args.folder / "out"
            measured = _copy(source, out) if name == "cp" else _convert(source, out, name)
            measured["mb_per_s"] = round(size / measured["seconds"], 1)
            runs.setdefault(name, []).append(measured)
            print(f"round {number + 1}  {name:20} {measured}", flush=True)
            shutil.rmtree(out)
    copy = statistics.median(run["mb_per_s"] for run in runs["cp"])
    result = {
        "command": " ".join(["convert_speed.py", *sys.argv[1:]]),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "torch": torch.__version__,
        "source_mb": round(size, 1),
        "runs": runs,
        "of_copy": {
            name: round(statistics.median(run["mb_per_s"] for run in some) / copy, 3)
            for name, some in runs.items()
        },
    }
    print(json.dumps(result["of_copy"]))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--to", action="append", required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def make(folder: Path, blocks: int) -> None:
    """A GPT-NeoX checkpoint of random codes."""
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True)
    scheme = Scheme(4, 128)
    dense = {
        "gpt_neox.embed_in.weight": (VOCABULARY, HIDDEN),
        "embed_out.weight": (VOCABULARY, HIDDEN),
    }
    norms = ["gpt_neox.final_layer_norm"]
    specs: dict[str, TensorSpec] = {}
    for block in range(blocks):
        prefix = f"gpt_neox.layers.{block}"
        norms += [f"{prefix}.input_layernorm", f"{prefix}.post_attention_layernorm"]
        for name, (out, width) in LINEARS.items():
            for suffix, spec in gptq.specs(out, width, scheme).items():
                specs[f"{prefix}.{name}.{suffix}"] = spec
            specs[f"{prefix}.{name}.bias"] = TensorSpec(torch.float16, (out,))
    for name in norms:
        dense |= {f"{name}.weight": (HIDDEN,), f"{name}.bias": (HIDDEN,)}
    specs |= {name: TensorSpec(torch.float16, shape) for name, shape in dense.items()}
    writer = ShardWriter(partial, specs, 2_000_000_000)
    generator = torch.Generator().manual_seed(0)
    for block in range(blocks):
        for name, (out, width) in LINEARS.items():
            prefix = f"gpt_neox.layers.{block}.{name}"
            codes = torch.randint(0, 16, (out, width), generator=generator, dtype=torch.uint8)
            scale = torch.rand(out, width // 128, generator=generator).half() / 100
            for suffix, tensor in gptq.pack(QWeight(scheme, codes, scale)).items():
                writer.write(f"{prefix}.{suffix}", tensor)
            writer.write(f"{prefix}.bias", torch.zeros(out).half())
    for name, shape in dense.items():
        writer.write(name, torch.rand(shape, generator=generator).half())
    writer.close()
    write_json(partial / "config.json", _config(blocks, scheme))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(data.demo() / file, partial / file)
    partial.rename(folder)


def _config(blocks: int, scheme: Scheme) -> dict[str, object]:
    return {
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
        **gptq.configuration(scheme, [], "benchmark"),
    }


def _copy(source: Path, out: Path) -> dict[str, float]:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    subprocess.run(["sync", *(str(f) for f in out.iterdir())], check=True)
    return {"seconds": round(time.perf_counter() - start, 2)}


def _convert(source: Path, out: Path, to: str) -> dict[str, float]:
    command = [
        sys.executable,
        "-c",
        _CLI,
        "convert",
        str(source),
        "--to",
        to,
        "--out",
        str(out),
        "-q",
    ]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"converting to {to} failed")
    seconds = round(time.perf_counter() - start, 2)
    return {"seconds": seconds, "peak_mb": round(usage.ru_maxrss * 1024 / 1e6, 1)}


if __name__ == "__main__":
    main()
