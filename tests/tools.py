"""For the tests of whole commands: quantized models that are made once, and the command line. And
a GPU's way of multiplying."""

import json
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from quantkit.cli.main import main
from quantkit.methods import products
from quantkit.workflows.quantize import quantize

transformers_logging.disable_progress_bar()

# few and short rows, one pass, no measuring: about two seconds for the demo
QUICK: dict[str, Any] = {
    "calib": ("bundled:en=2", "bundled:ja=2"),
    "calib_seqlen": 64,
    "fast": True,
    "check": False,
}
QUICK_OPTIONS = ["-c", "bundled:en=2", "-c", "bundled:ja=2", "--calib-seqlen", "64", "--fast"]
QUICK_OPTIONS += ["--no-check"]
_ROOT = tempfile.TemporaryDirectory(prefix="quantkit-tests-")


def _new() -> Path:
    return Path(tempfile.mkdtemp(dir=_ROOT.name))


@cache
def model(name: str, **changes: Any) -> Path:
    """The folder of a tiny random model with the demo's tokenizer; not to be changed."""
    return tiny.build(name, _new() / name, tokenizer=True, **changes)


@cache
def quantized(source: Path | str = "demo", **settings: Any) -> Path:
    """The folder that :func:`quantize` writes with QUICK settings and these; not to be changed."""
    out = _new() / "quantized"
    quantize(str(source), out, **{**QUICK, **settings})
    return out


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def command(*arguments: object) -> int:
    """``quantkit ...`` in this process -> its exit code. What it prints is for capsys."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    sys.stdout.flush()
    return int(caught.value.code or 0)


def sentence(err: str) -> tuple[str, str]:
    """The error and the hint on standard error. There must be one error, told in one line and as
    the last thing, with one hint at most behind it, and no traceback."""
    assert "Traceback" not in err
    lines = err.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1, err
    at = next(i for i, line in enumerate(lines) if line.startswith("error: "))
    behind = lines[at + 1 :]
    assert len(behind) <= 1 and all(line.startswith(" hint: ") for line in behind), err
    return lines[at].removeprefix("error: "), behind[0].removeprefix(" hint: ") if behind else ""


def multiply_in(dtype: torch.dtype, patch: pytest.MonkeyPatch) -> None:
    """Let the CPU do the solvers' products of bfloat16 parts, which are a GPU's, in that dtype."""

    def add(sums: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return sums.copy_(sums.to(dtype) + a.to(dtype) @ b.to(dtype))

    def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        return add(torch.zeros(len(a), b.shape[1]) if out is None else out.zero_(), a, b)

    patch.setattr(products, "_mm", product)
    patch.setattr(products, "_add", add)
