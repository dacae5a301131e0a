"""Models with short convolutions, linear attention or state spaces beside attention: their linears
are quantized, all else stays, and they run with a state instead of keys and values."""

import pytest
import tiny
import torch
from tools import command, sentence
from transformers import AutoConfig, AutoModelForCausalLM

import quantkit

SIZES = {
    "vocab_size": tiny.DEMO_VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "num_hidden_layers": 2,
}
LINEAR = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
STATE = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_expand": 2}
# a model type, its configuration, a linear that is not of attention, and what stays dense there
HYBRIDS = {
    "lfm2": (
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        "layers.0.conv.in_proj",
        "layers.0.conv.conv.weight",
    ),
    "qwen3_5_text": (
        LINEAR,
        "layers.0.linear_attn.in_proj_qkv",
        "layers.0.linear_attn.conv1d.weight",
    ),
    "qwen3_next": (
        {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 64},
        "layers.0.linear_attn.in_proj_qkvz",
        "layers.0.linear_attn.conv1d.weight",
    ),
    "granitemoehybrid": (
        {
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 64,
            "num_local_experts": 0,
            **STATE,
        },
        "layers.0.mamba.in_proj",
        "layers.0.mamba.conv1d.weight",
    ),
}


@pytest.mark.parametrize("kind", HYBRIDS)
def test_the_whole_way(kind, tmp_path):
    changes, linear, dense = HYBRIDS[kind]
    config = AutoConfig.for_model(kind, **SIZES, **changes)
    model = AutoModelForCausalLM.from_config(config)
    source = tiny.save(model, tmp_path / "source", tokenizer=True)
    out = tmp_path / "out"
    report = quantkit.quantize(
        str(source), out, group=16, calib_rows=2, calib_seqlen=32, check=False
    )
    assert f"model.{linear}" in report.layers
    assert not [name for name, layer in report.layers.items() if layer["method"] == "rtn"]
    measured = quantkit.verify(str(out), against=str(source), rows=1, seqlen=32)
    assert 0 < measured.described()["kl"] < 0.5
    ours, tokenizer = quantkit.load(str(out), dtype="float32")
    original = tiny.reference(source)
    stored = original.get_parameter(f"model.{dense}")
    torch.testing.assert_close(ours.get_parameter(f"model.{dense}"), stored, rtol=1e-3, atol=1e-4)
    ids = tokenizer("The history of the city", return_tensors="pt").input_ids
    text = ours.generate(ids, max_new_tokens=6, do_sample=False)
    with torch.no_grad():  # token by token, with a state, is what one pass gives
        whole = ours(text).logits[0, ids.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(whole, text[0, ids.shape[1] :])
    found = quantkit.generate(str(out), "The history", max_new_tokens=4, temperature=0)
    assert found.tokens == 4


def test_state_spaces_of_the_first_kind_are_refused(tmp_path, capsys):
    config = AutoConfig.for_model(
        "mamba", vocab_size=256, hidden_size=64, num_hidden_layers=2, time_step_rank=16
    )
    source = tiny.save(AutoModelForCausalLM.from_config(config), tmp_path / "mamba")
    assert command("rtn", source, "--group", 16, "--out", tmp_path / "out") == 1
    message, hint = sentence(capsys.readouterr().err)
    assert "dt_proj.weight is used by itself" in message and "Mamba" in hint
    assert not (tmp_path / "out").exists()
