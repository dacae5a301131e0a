"""Our numbers beside those of llama.cpp's own tool, on the same tokens of the same GGUF files.

Skipped without QUANTKIT_LLAMA_PERPLEXITY, the path of ``llama-perplexity``, and llama-cpp-python.
The tool cuts a text into windows and scores the second half of each: predictions at positions
n/2 to n - 2 of a window of n tokens. The same positions are taken here. What it keeps of the first
model's logits are 16-bit numbers, so that its KL is good to about a thousandth.
"""

import os
import re
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit.core.metrics import Comparison
from quantkit.runtime.llamacpp import LlamaCpp, installed
from quantkit.runtime.load import load
from quantkit.workflows.check import held_out
from quantkit.workflows.convert import convert

TOOL = os.environ.get("QUANTKIT_LLAMA_PERPLEXITY", "")
MODEL = os.environ.get("QUANTKIT_LLAMA_PERPLEXITY_MODEL", "demo")
WINDOW, ROWS = 256, 6
pytestmark = [
    pytest.mark.referee,
    pytest.mark.skipif(not TOOL, reason="QUANTKIT_LLAMA_PERPLEXITY names no llama-perplexity"),
    pytest.mark.skipif(not installed(), reason="llama-cpp-python is not installed"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    for kind in ("f16", "q4_0"):
        convert(MODEL, f"gguf:{kind}", folder / kind, lossy=True)
    return [next((folder / kind).glob("*.gguf")) for kind in ("f16", "q4_0")]


@pytest.fixture(scope="module")
def theirs(files, tmp_path_factory):
    """What the tool says, and the windows [count, WINDOW] that it cut."""
    folder = tmp_path_factory.mktemp("tool")
    _, tokenizer = load(str(files[0]), device="cpu")
    rows = held_out(tokenizer, ROWS, WINDOW)
    text = "".join(tokenizer.decode(row) for label in ("en", "ja") for row in rows[label])
    (folder / "text.txt").write_text(text, "utf-8")
    base = folder / "base.kld"
    common = ["-c", WINDOW, "-b", WINDOW, "-t", 1, "--kl-divergence-base", base]
    first = _run("-m", files[0], "-f", folder / "text.txt", *common)
    second = _run("-m", files[1], "--kl-divergence", *common)
    estimate = re.search(r"Final estimate: PPL = ([\d.]+)", first)
    return (
        {
            "f16": float(estimate.group(1)),
            "q4_0": _number(r"Mean PPL\(Q\) +: +([\d.]+)", second),
            "kl": _number(r"Mean +KLD: +([\d.]+)", second),
            "top": _number(r"Same top p: +([\d.]+)", second) / 100,
        },
        _windows(base),
    )


def _run(*arguments: object) -> str:
    result = subprocess.run(
        [TOOL, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=300
    )
    return result.stdout + result.stderr


def _number(pattern: str, text: str) -> float:
    return float(re.search(pattern, text).group(1))


def _windows(base: Path) -> torch.Tensor:
    """Its file begins with "_logits_", the window, the vocabulary, the number of windows, and all
    tokens, 4 bytes each."""
    data = base.read_bytes()
    assert data[:8] == b"_logits_"
    width, _, count = struct.unpack("<3i", data[8:20])
    tokens = np.frombuffer(data, "<i4", width * count, offset=20)
    return torch.from_numpy(tokens.astype(np.int64)).reshape(count, width)


def _compared(windows, reference, other):
    """Each window's second half, as the tool takes it -> the comparison and the KL of a token."""
    comparison, kls = Comparison(), []
    for ids in windows:
        half = slice(WINDOW // 2, None)
        kl = comparison.add("text", ids[half], reference(ids)[half], other(ids)[half])
        kls.append(kl[:-1])  # behind the last token there is nothing to predict
    return comparison.sets()["text"], float(torch.cat(kls).mean())


def test_llama_cpp_as_our_engine_measures_what_its_own_tool_measures(files, theirs):
    said, windows = theirs
    before, after = (LlamaCpp(file, context=WINDOW, threads=1) for file in files)
    found, kl = _compared(
        windows, lambda ids: before.logits(ids.tolist()), lambda ids: after.logits(ids.tolist())
    )
    before_after = found.reference_perplexity, found.perplexity
    print(f"our engine: KL {kl:.6f}, top-1 {found.top1.mean:.4f}, perplexities {before_after}")
    print(f"the tool: {said}")
    assert len(windows) >= ROWS
    assert kl == pytest.approx(said["kl"], rel=5e-3)
    assert found.reference_perplexity == pytest.approx(said["f16"], rel=1e-3)
    # measured: 0.24 % apart for Q4_0, where the KL above is within 0.5 %; why is not known
    assert found.perplexity == pytest.approx(said["q4_0"], rel=5e-3)
    assert found.top1.mean == pytest.approx(said["top"], abs=0.01)


def test_our_loader_is_close_to_it(files, theirs):
    """The weights are the same; llama.cpp's activations of 8 bits are not in it."""
    said, windows = theirs
    before, after = (load(str(file), device="cpu", dtype="float32")[0] for file in files)
    with torch.no_grad():
        found, kl = _compared(
            windows, lambda ids: before(ids[None]).logits[0], lambda ids: after(ids[None]).logits[0]
        )
    print(f"our loader: KL {kl:.6f}, ppl {found.reference_perplexity:.4f} {found.perplexity:.4f}")
    assert kl == pytest.approx(said["kl"], rel=0.03)
    assert kl != pytest.approx(said["kl"], rel=1e-5)
    assert found.reference_perplexity == pytest.approx(said["f16"], rel=2e-3)
