"""Where inputs can be scaled: seen in the block and proven by its numbers, not by its name."""

import pytest
import tiny
import torch

from quantkit.runtime import folding
from quantkit.runtime.walk import Walk

LLAMA = [
    ("input_layernorm -> q_proj, k_proj, v_proj", 0.0),
    ("v_proj -> o_proj", None),
    ("post_attention_layernorm -> gate_proj, up_proj", 0.0),
    ("up_proj -> down_proj", None),
]
NEOX = [
    ("input_layernorm -> query_key_value", 0.0),
    ("query_key_value -> dense", None),
    ("post_attention_layernorm -> dense_h_to_4h", 0.0),
]
EXPECTED = {
    "gpt_neox": NEOX,  # no pair through the GELU
    "gpt_neox_sequential": NEOX,
    "bloom": NEOX,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "granite": LLAMA,
    "gemma": [(label, None if offset is None else 1.0) for label, offset in LLAMA],
    "gemma3_text": [
        ("input_layernorm -> q_proj, k_proj, v_proj", 1.0),
        ("v_proj -> o_proj", None),
        ("pre_feedforward_layernorm -> gate_proj, up_proj", 1.0),
        ("up_proj -> down_proj", None),
    ],
    "olmo2": [("v_proj -> o_proj", None), ("up_proj -> down_proj", None)],  # norms come behind
    "cohere": [
        ("input_layernorm -> q_proj, k_proj, v_proj, gate_proj, up_proj", 0.0),
        ("v_proj -> o_proj", None),
        ("up_proj -> down_proj", None),
    ],
    "phi": [
        ("input_layernorm -> q_proj, k_proj, v_proj, fc1", 0.0),
        ("v_proj -> dense", None),
    ],  # fc1 and fc2 have a GELU between them
    "phi3": [
        ("input_layernorm -> qkv_proj", 0.0),
        ("qkv_proj -> o_proj", None),
        ("post_attention_layernorm -> gate_up_proj", 0.0),
        ("gate_up_proj -> down_proj", None),
    ],
    "gpt2": [("ln_1 -> c_attn", 0.0), ("c_attn -> c_proj", None), ("ln_2 -> c_fc", 0.0)],
    "opt": [
        ("self_attn_layer_norm -> q_proj, k_proj, v_proj", 0.0),
        ("v_proj -> out_proj", None),
        ("final_layer_norm -> fc1", 0.0),
        ("fc1 -> fc2", None),  # a ReLU
    ],
    "falcon": [
        ("input_layernorm -> query_key_value, dense_h_to_4h", 0.0),
        ("query_key_value -> dense", None),
    ],
    "falcon_new": [
        ("ln_attn -> query_key_value", 0.0),
        ("query_key_value -> dense", None),
        ("ln_mlp -> dense_h_to_4h", 0.0),
    ],
}


def found(path, dtype=torch.float32):
    walk = Walk(tiny.skeleton(path, dtype))
    hidden = walk.embed(tiny.batches())
    with walk.block(0) as block:
        return folding.find(block, block.trace(hidden[0]), hidden[0])


@pytest.mark.parametrize("name", EXPECTED)
def test_pairs_of_architectures(name, tmp_path):
    """In bfloat16 too: the proof is in float32."""
    folds = found(tiny.build(name, tmp_path / name), torch.bfloat16)
    assert [(fold.label, fold.offset) for fold in folds] == EXPECTED[name]


def test_pairs_that_do_not_hold_are_none(tmp_path, monkeypatch):
    """A wrong place in the fused rows (keys for values) shows in the block's output."""
    path = tiny.build("gpt_neox", tmp_path / "model")
    rows = folding._source
    monkeypatch.setattr(folding, "_source", lambda *a: None if (s := rows(*a)) is None else s - 16)
    labels = [fold.label for fold in found(path)]
    assert labels == [label for label, offset in NEOX if offset is not None]


def test_a_norm_that_is_read_elsewhere_too_is_none(tmp_path):
    """BLOOM may take its residual behind the norm: what is divided there is not made up for."""
    path = tiny.build("bloom", tmp_path / "model", apply_residual_connection_post_layernorm=True)
    assert [fold.label for fold in found(path)] == ["query_key_value -> dense"]


def test_values_of_grouped_queries_are_shared(tmp_path):
    fold = found(tiny.build("llama", tmp_path / "model"))[1]
    heads = fold.source.reshape(tiny.HEADS, 16)
    assert heads[:, 0].tolist() == [0, 0, 16, 16]
    shared = fold.per_output(fold.source.float() + 2, 40)
    assert shared.tolist() == [*range(2, 34), *[1] * 8]  # nobody reads the last ones


def test_the_block_is_left_as_it_was(tmp_path):
    walk = Walk(tiny.skeleton(tiny.build("gemma", tmp_path / "model")))
    hidden = walk.embed(tiny.batches())
    with walk.block(0) as block:
        before = {n: (p, p.clone()) for n, p in block.module.named_parameters()}
        folding.find(block, block.trace(hidden[0]), hidden[0])
        for name, parameter in block.module.named_parameters():
            assert parameter is before[name][0]
            assert torch.equal(parameter, before[name][1])
