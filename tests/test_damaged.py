"""Originals that are damaged, or something else than they seem: told before the work is done."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tools import QUICK, model, read_json

from quantkit.errors import QuantkitError
from quantkit.workflows.convert import convert
from quantkit.workflows.quantize import quantize
from quantkit.workflows.rtn import quantize_rtn


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("generation_config.json", "{", "generation_config.json is not readable JSON"),
        ("LICENSE.txt", None, "leads nowhere"),
    ],
)
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_what_lies_beside_the_weights_is_looked_at_first(tmp_path, method, name, content, says):
    source = tmp_path / "model"
    shutil.copytree(model("llama"), source)
    (source / name).unlink(missing_ok=True)
    if content is None:
        (source / name).symlink_to(tmp_path / "nowhere")
    else:
        (source / name).write_text(content)
    how = {**QUICK, "group": 32} if method == "gptq" else {"group": 32}
    with pytest.raises(QuantkitError, match=says) as caught:
        (quantize if method == "gptq" else quantize_rtn)(str(source), tmp_path / "out", **how)
    assert str(source) in caught.value.message
    assert not list(tmp_path.glob("out*"))


def test_folders_beside_the_weights_are_left_out(tmp_path):
    source = tmp_path / "model"
    shutil.copytree(model("llama"), source)
    (source / "LICENSES").mkdir()
    quantize_rtn(str(source), tmp_path / "out", group=32)
    assert not (tmp_path / "out" / "LICENSES").exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_that_are_codes_are_refused(tmp_path, dtype):
    source = tmp_path / "model"
    shutil.copytree(model("llama"), source)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for function, how in ((quantize, QUICK), (quantize_rtn, {})):
        with pytest.raises(QuantkitError, match=r"up_proj.weight is .*: it is already quantized"):
            function(str(source), tmp_path / function.__name__, **{**how, "group": 32})


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_numbers_that_are_none_outside_of_linears_are_refused(tmp_path, name):
    source = tmp_path / "model"
    shutil.copytree(model("llama"), source)
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[1] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for function, how in ((quantize, QUICK), (quantize_rtn, {})):
        with pytest.raises(QuantkitError, match=f"{name} holds infinities or NaN"):
            function(str(source), tmp_path / function.__name__, **{**how, "group": 32})


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_act": "zzz"},
        {"num_attention_heads": 0},
        {"model_type": ["llama"]},
        {"dtype": "zzz"},
    ],
    ids=str,
)
def test_configurations_of_no_model_are_refused(tmp_path, wrong):
    source = tmp_path / "model"
    shutil.copytree(model("llama"), source)
    config = read_json(source / "config.json")
    (source / "config.json").write_text(json.dumps({**config, **wrong}))
    with pytest.raises(QuantkitError, match=r"is not usable|is not a causal"):
        quantize_rtn(str(source), tmp_path / "out", group=32)


def test_what_lies_beside_a_gguf_file_is_not_its_own(tmp_path):
    """A folder of downloads holds what it may."""
    quantize_rtn(str(model("llama")), tmp_path / "made", format="gguf:q8_0")
    (tmp_path / "made" / "LICENSE").symlink_to(tmp_path / "nowhere")
    (tmp_path / "made" / "generation_config.json").write_text("{")
    (file,) = (tmp_path / "made").glob("*.gguf")
    assert convert(str(file), "gptq", tmp_path / "out").written


def test_float8_outside_of_linears_is_refused(tmp_path):
    source = tmp_path / "model"
    shutil.copytree(model("llama"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(QuantkitError, match=r"lm_head.weight is float8_e4m3fn: it is already"):
        quantize_rtn(str(source), tmp_path / "out", group=32)


def test_a_disk_that_is_full_is_not_an_original_that_cannot_be_read(tmp_path, monkeypatch):
    def full(source, target):  # the system names the source
        raise OSError(errno.ENOSPC, "No space left on device", str(source))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(QuantkitError, match="the disk is full while writing"):
        quantize_rtn(str(model("llama")), tmp_path / "out", group=32)
