"""Experts are taken apart, quantized one by one, and put to use again."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit import load, quantize, verify
from quantkit.core import durations
from quantkit.core.checkpoint import Checkpoint
from quantkit.core.qweight import Scheme
from quantkit.errors import QuantkitError
from quantkit.runtime.decode import why_not
from quantkit.runtime.engine import open_engine
from quantkit.runtime.experts import Experts, all_reached
from quantkit.runtime.kernels import support
from quantkit.runtime.outline import outlined
from quantkit.workflows import bench
from quantkit.workflows.awq import quantize_awq
from quantkit.workflows.inspect import inspect

SCHEME = Scheme(4, 32, True)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return tiny.build("mixtral", tmp_path_factory.mktemp("moe") / "mixtral", tokenizer=True)


def quantized(source, out, work=quantize, **settings):
    quick = {"group": 32, "align": 0.0, "calib_rows": 2, "calib_seqlen": 32, "check": False}
    return work(str(source), out, **{**quick, **settings})


def test_each_expert_gets_the_tokens_that_are_its_own(mixtral):
    """Against transformers' module, with an expert that is left out and one that nobody wants."""
    with torch.no_grad():
        block = tiny.reference(mixtral).model.layers[0].mlp.experts
        block.config._experts_implementation = "eager"
        block.config._experts_implementation = "eager"
        skeleton = tiny.skeleton(mixtral)
        skeleton.fill(["model.layers.0"])
        ours = skeleton.model.model.layers[0].mlp.experts
        assert isinstance(ours, Experts)
        x = torch.randn(7, tiny.WIDTH, generator=torch.Generator().manual_seed(3))
        # 4 is behind the last expert: none
        index = torch.tensor([[0, 1], [1, 3], [3, 0], [4, 1], [0, 4], [4, 4], [1, 0]])
        weights = torch.rand(7, 2, generator=torch.Generator().manual_seed(4))
        wanted = block(x, index, weights)
        assert wanted[5].abs().max() == 0 < wanted[4].abs().max()
        torch.testing.assert_close(ours(x, index, weights), wanted)
        with all_reached(ours):
            called = []
            ours.get_submodule("2.w2").register_forward_hook(lambda *_: called.append(1))
            torch.testing.assert_close(ours(x, index, weights), wanted)
        assert called == [1]
        torch.testing.assert_close(deepcopy(ours)(x, index, weights), wanted)


@pytest.mark.parametrize("align", [0.0, 0.5])
@pytest.mark.parametrize("work", [quantize, quantize_awq])
def test_the_whole_way(work, align, mixtral, tmp_path, monkeypatch):
    out = tmp_path / "out"
    quantized(mixtral, out, work, align=align)
    found = Checkpoint(out)
    names = [f"model.layers.1.block_sparse_moe.experts.3.{n}" for n in ("w1", "w2", "w3")]
    assert all(f"{name}.qweight" in found for name in names)
    assert "model.layers.0.block_sparse_moe.gate.weight" in found
    # what is measured block by block is what the loaded model computes, and it is near the original
    result = verify(str(out), against=str(mixtral), rows=1, seqlen=32)
    assert result.described()["kl"] < 0.2
    model, tokenizer = load(str(out), dtype="float32")
    assert isinstance(model.model.layers[0].mlp.experts, Experts)
    ids = tokenizer("The city", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
    monkeypatch.setattr(support, "device_why_not", lambda device: None)  # as if on a GPU
    assert "experts are called one by one" in why_not(model)
    readers = {verdict.target: verdict for verdict in inspect(str(out)).targets}
    assert "puts experts together" in readers["transformers"].reasons[0]
    assert load(str(mixtral))[0].model.layers[0].mlp.experts.gate_up_proj.dim() == 3


def test_an_expert_that_no_token_goes_to_is_rounded_and_told_of(tmp_path):
    """Four tokens reach eight of sixteen experts at most."""
    source = tiny.build("mixtral", tmp_path / "many", tokenizer=True, num_local_experts=16)
    few = {"calib_rows": 1, "calib_seqlen": 4}
    for name, align in (("plain", 0.0), ("aligned", 0.5)):
        report = quantized(source, tmp_path / name, align=align, **few)
        told = [text for text in report.fallbacks if "no calibration token reached it" in text]
        assert 2 * 8 * 3 <= len(told) < 2 * 16 * 3 and all(".experts." in text for text in told)
        rounded = [layer for layer in report.layers.values() if layer["method"] == "rtn"]
        assert len(rounded) == len(told)
    result = verify(str(tmp_path / "aligned"), against=str(source), rows=1, seqlen=32)
    assert result.described()["kl"]
    with pytest.raises(QuantkitError, match="no calibration token reached it"):
        quantized(source, tmp_path / "strict", strict=True, **few)


KEYS = {"gptq": "dynamic", "awq": "modules_to_not_convert", "compressed-tensors": "ignore"}


def test_readers_are_told_of_routers(mixtral, tmp_path):
    for format, key in KEYS.items():
        out = tmp_path / format
        quantized(mixtral, out, format=format)
        config = json.loads((out / "config.json").read_text("utf-8"))["quantization_config"]
        assert any("block_sparse_moe" in name and "gate" in name for name in config[key])


def test_a_packed_router_is_refused(mixtral, tmp_path):
    quantized(mixtral, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors, place = load_file(file), "model.layers.0.block_sparse_moe"
    del tensors[f"{place}.gate.weight"]
    expert = {n: t for n, t in tensors.items() if n.startswith(f"{place}.experts.0.w1.")}
    packed = {n.replace("experts.0.w1", "gate"): t.clone() for n, t in expert.items()}
    save_file(tensors | packed, file, {"format": "pt"})
    with pytest.raises(QuantkitError, match=r"gate, and the model has a MixtralTopKRouter there"):
        load(str(tmp_path / "out"))


def test_a_router_that_inherits_from_a_linear_is_none(tmp_path):
    """Phi-MoE's: packed, it would return a product where its block wants scores and choices."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "num_local_experts": 4}
    config = AutoConfig.for_model("phimoe", vocab_size=tiny.DEMO_VOCABULARY, **sizes)
    source = tiny.save(AutoModelForCausalLM.from_config(config), tmp_path / "phi", tokenizer=True)
    report = quantized(source, tmp_path / "out")
    assert not [name for name in report.layers if "router" in name or name.endswith("gate")]
    result = verify(str(tmp_path / "out"), against=str(source), rows=1, seqlen=32)
    assert 0 < result.described()["kl"] < 0.2


def test_what_no_token_goes_to_costs_no_time(mixtral):
    """Two of four experts: half of the weights, of the multiplications and of the bytes."""
    shapes = outlined(tiny.skeleton(mixtral))
    block = shapes.blocks[0]
    shares = {group.names[0].split(".")[1]: group.share for group in block.groups}
    assert shares == {"q_proj": 1.0, "o_proj": 1.0, "experts": 0.5}
    experts = sum(group.numbers for group in block.groups if ".experts." in group.names[0])
    assert block.active == block.linears - experts / 2
    fast = durations.of_gpu(100, 10, 1000, kernels=True)
    assert durations.prompt(shapes, 100, fast) > 100 * 2 * 2 * block.active / fast.half
    whole = replace(shapes, blocks=tuple(_called_by_all(block) for block in shapes.blocks))
    weights = 2 * shapes.numbers
    saved = (durations.token(whole, weights, 0, fast) - 2 * fast.step) - (
        durations.token(shapes, weights, 0, fast) - 2 * 5e-4
    )
    assert saved * fast.memory == pytest.approx(
        2 * experts, rel=0.01
    )  # two bytes, two blocks, half


def _called_by_all(block):
    return replace(block, groups=tuple(replace(group, share=1.0) for group in block.groups))


def test_a_step_reads_the_experts_that_its_texts_go_to(mixtral):
    engine = open_engine(str(mixtral), dtype="float32")
    one, two, many = (bench.step_bytes(engine, batch, 0) for batch in (1, 2, 100))
    experts = sum(p.numel() * 4 for n, p in engine.model.named_parameters() if ".experts" in n)
    assert many - one == pytest.approx(experts / 2, rel=1e-6)
    assert many - two == pytest.approx(experts / 4, rel=1e-6)
