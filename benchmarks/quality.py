"""What each step of quantkit's GPTQ and AWQ is worth, and how it compares: mean KL to the original.

    python benchmarks/quality.py --model micro=PATH --model neox=PATH \
        --calib calib_512x128.jsonl --heldout heldout_512.jsonl --out results.json

--calib holds rows of {"input_ids"}, --heldout rows of {"set", "input_ids"}; the first --rows of
each set are used. Every checkpoint is written to disk, loaded again and run in float32.
--also MODEL/LABEL=PATH measures a checkpoint that another tool made of the model called MODEL.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from quantkit.core import provenance
from quantkit.core.metrics import Comparison
from quantkit.core.source import resolve
from quantkit.runtime.load import load_model
from quantkit.workflows.awq import quantize_awq
from quantkit.workflows.quantize import quantize
from quantkit.workflows.rtn import quantize_rtn

PLAIN = {
    "align": 0.0,
    "refine": 0,
    "scale_search": False,
    "act_order": "none",
    "bias_correction": False,
}
# the baseline: no calibration
ROUNDED: dict[str, dict[str, Any]] = {
    "round to nearest": {},
    "round to nearest, asymmetric": {"sym": False},
    "round to nearest, group 32": {"group": 32},
    "round to nearest, 3 bits": {"bits": 3},
}
# each step on top of the one before
STEPS: dict[str, dict[str, Any]] = {
    "plain GPTQ: min-max scales, columns in order": PLAIN,
    "+ signed scale search under the conditional Hessian": {**PLAIN, "scale_search": True},
    "+ act-order static": {**PLAIN, "scale_search": True, "act_order": "static"},
    "+ bias correction": {"align": 0.0, "refine": 0},
    "the same from thinned statistics (this is --fast)": {"fast": True},
    "bias correction + scale refit and code polish, 2 rounds": {"align": 0.0},
    "+ aligned target (this is the default)": {},
}
OTHERS: dict[str, dict[str, Any]] = {
    "default without scale search": {"scale_search": False},
    "default without act-order": {"act_order": "none"},
    "default with act-order group": {"act_order": "group"},
    "default without refinement": {"refine": 0},
    "default without bias correction": {"bias_correction": False},
    "asymmetric": {"sym": False},
    "asymmetric, fast": {"sym": False, "fast": True},
    "group 32": {"group": 32},
    "group 32, fast": {"group": 32, "fast": True},
    "3 bits": {"bits": 3},
    "3 bits, fast": {"bits": 3, "fast": True},
}
AWQ: dict[str, dict[str, Any]] = {
    "awq, refine none": {"refine": "none"},
    "awq, refine none, symmetric": {"refine": "none", "sym": True},
    "awq, refine gptq without alignment": {"align": 0.0},
    "awq, refine gptq": {},
    "awq, refine gptq, symmetric": {"sym": True},
}


def main() -> None:
    args = _arguments()
    held_out = _held_out(args.heldout, args.rows)
    result: dict[str, Any] = {
        "versions": provenance.versions(),
        "machine": provenance.machine(torch.device("cpu")),
        "rows": {label: len(rows) for label, rows in held_out.items()},
        "models": {},
    }
    for named in args.model:
        name, _, path = named.partition("=")
        measured = result["models"][name] = {}
        original = _logits(path, held_out)
        more = {} if args.steps_only else OTHERS | AWQ
        for label, options in (ROUNDED | STEPS | more).items():
            if args.only and not any(part in label for part in args.only):
                continue
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                start = time.perf_counter()
                if label in ROUNDED:
                    quantize_rtn(path, out, **options)
                else:
                    run = quantize_awq if label in AWQ else quantize
                    run(path, out, calib=args.calib, check=False, **options)
                seconds = time.perf_counter() - start
                measured[label] = _measure(out, held_out, original) | {"seconds": seconds}
            _show(name, label, measured[label])
        for also in args.also:
            label, _, folder = also.partition("=")
            if label.startswith(name + "/"):
                measured[label] = _measure(Path(folder), held_out, original)
                _show(name, label, measured[label])
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--also", action="append", default=[], metavar="MODEL/LABEL=PATH")
    parser.add_argument("--steps-only", action="store_true")
    parser.add_argument(
        "--only", action="append", default=[], help="only settings whose names contain one of these"
    )
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _held_out(path: Path, rows: int) -> dict[str, list[list[int]]]:
    sets: dict[str, list[list[int]]] = defaultdict(list)
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        if len(sets[row["set"]]) < rows:
            sets[row["set"]].append(row["input_ids"])
    return sets


@torch.no_grad()
def _logits(model: str | Path, sets: dict[str, list[list[int]]]) -> list[torch.Tensor]:
    loaded = load_model(resolve(str(model)), torch.device("cpu"), torch.float32)
    return [loaded(torch.tensor([row])).logits[0] for _, row in _rows(sets)]


def _rows(sets: dict[str, list[list[int]]]) -> Iterator[tuple[str, list[int]]]:
    for label, rows in sets.items():
        for row in rows:
            yield label, row


@torch.no_grad()
def _measure(
    folder: Path, sets: dict[str, list[list[int]]], original: list[torch.Tensor]
) -> dict[str, Any]:
    loaded = load_model(resolve(str(folder)), torch.device("cpu"), torch.float32)
    comparison = Comparison()
    for (label, row), reference in zip(_rows(sets), original):
        ids = torch.tensor(row)
        comparison.add(label, ids, reference, loaded(ids[None]).logits[0])
    return comparison.described()


def _show(name: str, label: str, measured: dict[str, Any]) -> None:
    increase = " / ".join(
        f"{s['perplexity'] - s['reference_perplexity']:.2f}" for s in measured["sets"].values()
    )
    kl = f"{measured['kl']:.4f} ± {measured['kl_error']:.4f}"
    print(f"| {name} | {label} | {kl} | {increase} |", flush=True)


if __name__ == "__main__":
    main()
