"""What verify and compare have in memory is bounded by a block, however many blocks there are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tools import model

from quantkit.workflows.rtn import quantize_rtn

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="Linux tells peak memory there"
)
FEW, MANY = 2, 8
SHAPE = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128}
BLOCK = (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 2048) * 4  # bytes in float32, as it is run
# glibc gives every larger piece of memory back at once: no holes in the heap, whose size is chance
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
EXACT |= {"MALLOC_ARENA_MAX": "1"}
VERIFY = """
import sys
import torch
torch.set_num_threads(1)
from quantkit.workflows.compare import compare
original, rows, *models = sys.argv[1:]
compare(models, against=original, text=[rows], samples=False, device="cpu", dtype="float32")
# not ru_maxrss, which a process inherits from the one that started it
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)
"""


def peak(blocks: int, folder: Path, count: int) -> int:
    """Bytes that a process has at most that measures ``count`` models of so many blocks."""
    original = model("llama", dtype=torch.float16, num_hidden_layers=blocks, **SHAPE)
    quantized = folder / f"quantized-{blocks}"
    if not quantized.exists():
        quantize_rtn(str(original), quantized, bits=8)
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"input_ids": list(range(32))}))
    command = [sys.executable, "-c", VERIFY, original, rows, *[quantized] * count]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, **EXACT}
    )
    assert result.returncode == 0, result.stderr
    print(blocks, count, int(result.stdout) / 1e6, BLOCK / 1e6)
    return int(result.stdout)


def test_neither_more_blocks_nor_more_models_take_more_memory(tmp_path):
    """As a whole, the original would take six blocks more, and a model of 8 bits a quarter of that.
    What does grow are the objects of a model without weights."""
    few, many = peak(FEW, tmp_path, 1), peak(MANY, tmp_path, 1)
    assert many - few < BLOCK / 4
    assert peak(MANY, tmp_path, 4) - many < BLOCK / 2
