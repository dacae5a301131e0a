"""kill -9 a quantization at random moments, repeat the command, compare every byte.

    python benchmarks/kill_resume.py --model PATH --calib rows.jsonl=16 --kills 10

The result of every killed and repeated run must be the uninterrupted one's, file by file; in
quantkit.json the seconds that phases took are left out of the comparison.
"""

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_CLI = "from quantkit.cli.main import run; run()"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("rest", nargs="*", help="further options of quantkit gptq, after --")
    args = parser.parse_args()
    command = [sys.executable, "-c", _CLI, "gptq", args.model, "--calib", args.calib, "-q"]
    command += args.rest
    dice = random.Random(args.seed)
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        start = time.perf_counter()
        subprocess.run([*command, "--out", str(whole)], check=True)
        length = time.perf_counter() - start
        expected = _hashes(whole)
        print(f"uninterrupted: {length:.1f} s, {len(expected)} files", flush=True)
        for number in range(args.kills):
            out = Path(folder) / "killed"
            moment = dice.uniform(0, length)
            state = _kill(command, out, moment)
            if not out.exists():
                subprocess.run([*command, "--out", str(out)], check=True)
            same = _hashes(out) == expected
            different += not same
            verdict = "identical" if same else "DIFFERENT"
            print(f"kill {number + 1:2} at {moment:5.1f} s ({state}): {verdict}", flush=True)
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
    sys.exit(1 if different else 0)


def _kill(command: list[str], out: Path, moment: float) -> str:
    """Start, wait, kill; what the run had finished by then."""
    process = subprocess.Popen([*command, "--out", str(out)])
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.wait()
    ledger = out.with_name(out.name + ".partial") / "ledger.json"
    if out.exists():
        return "complete"
    if not ledger.exists():
        return "nothing written yet"
    return f"{len(json.loads(ledger.read_text())['done'])} parts finished"


def _hashes(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        if path.name == "quantkit.json":
            fields = json.loads(content)
            del fields["seconds"]
            content = json.dumps(fields, sort_keys=True).encode()
        found[path.name] = hashlib.sha256(content).hexdigest()
    return found


if __name__ == "__main__":
    main()
