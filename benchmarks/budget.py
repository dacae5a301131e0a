"""Bits chosen under a budget against the same bits for all: mean KL to the original.

    python benchmarks/budget.py --model micro=PATH --calib calib_512x128.jsonl \
        --heldout heldout_512.jsonl --out results.json

--target is repeatable (bits a weight); --uniform too (BITS:GROUP). Rows and measuring are those of
quality.py. Sizes count codes, scales and zero points, as GPTQ stores them.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import quality
import torch

from quantkit.core import provenance
from quantkit.runtime.device import pick_device
from quantkit.workflows.quantize import quantize

TARGETS = [3.5, 4.0, 4.5]
UNIFORM = ["3:128", "3:64", "3:32", "4:128", "4:64", "4:32"]


def main() -> None:
    args = _arguments()
    held_out = quality._held_out(args.heldout, args.rows)
    settings: dict[str, dict[str, Any]] = {
        f"{bits:g} bits chosen": {"target_bits": bits} for bits in args.target or TARGETS
    }
    for text in args.uniform or UNIFORM:
        bits, _, group = text.partition(":")
        settings[f"uniform, {bits} bits, group {group}"] = {"bits": int(bits), "group": int(group)}
    result: dict[str, Any] = {
        "versions": provenance.versions(),
        "machine": provenance.machine(pick_device("auto")),
        "rows": {label: len(rows) for label, rows in held_out.items()},
        "fast": args.fast,
        "models": {},
    }
    for named in args.model:
        name, _, path = named.partition("=")
        measured = result["models"][name] = {}
        original = quality._logits(path, held_out)
        for label, options in settings.items():
            measured[label] = _one(path, options | {"fast": args.fast}, args, held_out, original)
            quality._show(
                name, f"{label} | {measured[label]['bits_per_weight']:.3f}", measured[label]
            )
            if args.out:
                args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def _one(
    path: str,
    options: dict[str, Any],
    args: argparse.Namespace,
    held_out: dict[str, list[list[int]]],
    original: list[torch.Tensor],
) -> dict[str, Any]:
    """Quantize, write, load and measure."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        start = time.perf_counter()
        report = quantize(path, out, calib=args.calib, check=False, **options)
        seconds = time.perf_counter() - start
        found = quality._measure(out, held_out, original)
    more = {"bits_per_weight": report.plan.bits_per_weight, "seconds": seconds}
    return found | more | ({"budget": report.budget} if report.budget else {})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--target", type=float, action="append")
    parser.add_argument("--uniform", action="append", metavar="BITS:GROUP")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
