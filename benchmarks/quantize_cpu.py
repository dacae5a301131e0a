"""Whole-process seconds and peak memory of quantizing one model on a CPU: quantkit and its peers.

    python benchmarks/quantize_cpu.py --model PATH --rows calib_512x128.jsonl --rounds 3 \
        --gptqmodel VENV/bin/python --llmcompressor VENV/bin/python --out results.json

Every tool runs in a process of its own, from start to exit, in turn, round after round. Peak memory
is the process's largest resident set (children included).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_CLI = "from quantkit.cli.main import run; run()"


def main() -> None:
    args = _arguments()
    args.model = args.model if args.model == "demo" else str(Path(args.model).resolve())
    args.rows = str(Path(args.rows).resolve())
    tools = _commands(args)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in tools}
    for number in range(args.rounds):
        for name, command in tools.items():
            with tempfile.TemporaryDirectory() as folder:
                measured = _run([*command, "--out", f"{folder}/out"], folder)
            runs[name].append(measured)
            print(
                f"round {number + 1}  {name:26} {measured['seconds']:7.1f} s  "
                f"{measured['peak_mb']:6.0f} MB",
                flush=True,
            )
    result = {
        "command": " ".join(Path(a).name if "/" in a else a for a in sys.argv),
        "machine": _machine(),
        "versions": _versions(args),
        "runs": runs,
        "median": {name: _median(some) for name, some in runs.items()},
    }
    _summarize(result["median"])
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, help="calibration rows of {input_ids}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gptqmodel", help="python of a venv with gptqmodel")
    parser.add_argument("--llmcompressor", help="python of a venv with llmcompressor")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _commands(args: argparse.Namespace) -> dict[str, list[str]]:
    ours = [
        sys.executable,
        "-c",
        _CLI,
        "gptq",
        args.model,
        "--calib",
        args.rows,
        "--no-check",
        "-q",
    ]
    tools = {"quantkit --fast": [*ours, "--fast"], "quantkit": ours}
    peers = ["--model", args.model, "--rows", args.rows]
    if args.gptqmodel:
        script = str(HERE / "peers" / "gptqmodel_run.py")
        tools["GPTQModel"] = [args.gptqmodel, script, *peers]
    if args.llmcompressor:
        script = str(HERE / "peers" / "llmcompressor_run.py")
        tools["llm-compressor"] = [args.llmcompressor, script, *peers]
    return tools


def _run(command: list[str], folder: str) -> dict[str, float]:
    """Run to the end, inside ``folder``, where a tool may leave what it likes."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{command} failed:\n{errors.decode(errors='replace')[-2000:]}")
    return {"seconds": round(seconds, 2), "peak_mb": round(usage.ru_maxrss / 1024, 1)}


def _median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in ("seconds", "peak_mb")}


def _versions(args: argparse.Namespace) -> dict[str, str]:
    """Of every tool and of the torch that it runs on."""
    pythons = {
        "quantkit": sys.executable,
        "gptqmodel": args.gptqmodel,
        "llmcompressor": args.llmcompressor,
    }
    code = (
        "import sys, importlib, importlib.metadata as m; name = sys.argv[1]; "
        "own = importlib.import_module(name).__version__ if name == 'quantkit' else m.version(name)"
        "; print(own, m.version('torch'))"
    )
    found = {}
    for name, python in pythons.items():
        if python:
            output = subprocess.check_output([python, "-c", code, name], text=True)
            found[name] = "{}, torch {}".format(*output.split())
    return found


def _machine() -> dict[str, Any]:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version()}


def _summarize(median: dict[str, dict[str, float]]) -> None:
    peers = [m for name, m in median.items() if not name.startswith("quantkit")]
    print()
    for name, one in median.items():
        line = f"{name:26} {one['seconds']:7.1f} s  {one['peak_mb']:6.0f} MB"
        if peers and name.startswith("quantkit"):
            ratio = min(peer["seconds"] for peer in peers) / one["seconds"]
            line += f"   {ratio:.2f}x the speed of the fastest peer"
        print(line)


if __name__ == "__main__":
    main()
