"""Other toolkits load what quantkit writes, and their logits agree.

GPTQModel (through plain transformers) runs where ``pip install 'quantkit[referees]'`` was done, or
where QUANTKIT_GPTQMODEL_PYTHON names the python of a venv that has it. auto-gptq needs transformers
4, so it is always a venv of its own: QUANTKIT_AUTOGPTQ_PYTHON.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.runtime.load import load
from quantkit.workflows.quantize import quantize

SCRIPTS = Path(__file__).parent / "referees"
pytestmark = pytest.mark.referee


def gptqmodel() -> str:
    if named := os.environ.get("QUANTKIT_GPTQMODEL_PYTHON"):
        return named
    if importlib.util.find_spec("gptqmodel") is None:
        pytest.skip("REFEREE NOT RUN: gptqmodel is not installed (pip install '.[referees]')")
    return sys.executable


def autogptq() -> str:
    named = os.environ.get("QUANTKIT_AUTOGPTQ_PYTHON")
    if not named:
        pytest.skip("REFEREE NOT RUN: set QUANTKIT_AUTOGPTQ_PYTHON to the python of its venv")
    return named


@pytest.fixture(scope="module", params=["symmetric", "asymmetric", "g_idx"])
def checkpoint(request, tmp_path_factory):
    """The demo, quantized; with its tied head stored a second time, since auto-gptq leaves both
    copies empty otherwise."""
    folder = tmp_path_factory.mktemp("referee") / request.param
    options = {
        "symmetric": {},
        "asymmetric": {"sym": False, "checkpoint_format": "gptq"},
        "g_idx": {"act_order": "group"},
    }[request.param]
    quantize("demo", folder, fast=True, calib="bundled:ja=2", calib_seqlen=128, **options)
    return folder


def referee_logits(python: str, script: str, folder: Path, tmp_path: Path) -> torch.Tensor:
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([[582, 3948, 304, 270, 3634, 17, 900, 31] * 4] * 2))
    out = tmp_path / "logits.safetensors"
    result = subprocess.run(
        [python, str(SCRIPTS / script), str(folder), str(ids), str(out), "float32"],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,  # GPTQModel leaves a folder of logs
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return load_file(out)["logits"]


def our_logits(folder: Path, tmp_path: Path) -> torch.Tensor:
    model, _ = load(str(folder), device="cpu", dtype="float32")
    rows = torch.tensor(json.loads((tmp_path / "ids.json").read_text()))
    with torch.no_grad():
        return model(rows).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_gptqmodel_through_transformers_agrees(checkpoint, tmp_path):
    theirs = referee_logits(gptqmodel(), "transformers_logits.py", checkpoint, tmp_path)
    # its kernel for CPUs rounds scales and activations to bfloat16
    assert relative(theirs, our_logits(checkpoint, tmp_path)) < 0.02


def test_gptqmodel_reference_kernel_agrees_closely(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("REFEREE_BACKEND", "torch")
    theirs = referee_logits(gptqmodel(), "transformers_logits.py", checkpoint, tmp_path)
    assert relative(theirs, our_logits(checkpoint, tmp_path)) < 1e-3


def test_auto_gptq_agrees(checkpoint, tmp_path):
    python = autogptq()
    folder = tmp_path / "untied"
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    theirs = referee_logits(python, "autogptq_logits.py", folder, tmp_path)
    assert relative(theirs, our_logits(checkpoint, tmp_path)) < 1e-5
