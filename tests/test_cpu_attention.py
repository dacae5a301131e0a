"""Tiled causal attention equals plain attention in float64, and is used where it is faster."""

import pytest
import tiny
import torch
from transformers.integrations import sdpa_attention

from quantkit.runtime.kernels import cpu_attention
from quantkit.runtime.walk import Walk


def plain(query, key, value, scaling):
    """[rows, tokens, heads, width], one product for everything."""
    shared = query.shape[1] // key.shape[1]
    q, k, v = (x.double() for x in (query, key, value))
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = q @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(ahead, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def as_eager(query, key, value, scaling):
    """In bfloat16 as transformers does it without a fused kernel: scores are rounded."""
    shared = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = query @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(ahead, -torch.inf).float().softmax(-1).to(query.dtype)
    return (weights @ v).transpose(1, 2)


def inputs(rows=2, heads=4, key_heads=2, tokens=300, width=32, value_width=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(heads, width), (key_heads, width), (key_heads, value_width)]
    return [torch.randn(rows, h, tokens, w, generator=g).bfloat16() for h, w in shapes]


@pytest.mark.parametrize("scaling", [None, 0.5])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"key_heads": 4},
        {"key_heads": 1},
        {"tokens": 257},  # a last tile of one token
        {"tokens": 384},
        {"value_width": 48},
        {"heads": 24, "key_heads": 12, "tokens": 640},  # several times as many as fit at once
    ],
)
def test_it_is_causal_attention(shape, scaling, monkeypatch):
    monkeypatch.setattr(cpu_attention, "_SCORES", 1 << 18)
    query, key, value = inputs(**shape)
    found = cpu_attention.causal_attention(query, key, value, scaling)
    wanted = plain(query, key, value, scaling)
    assert found.shape == wanted.shape
    assert found.dtype == torch.bfloat16
    error = (found.double() - wanted).norm() / wanted.norm()
    eager = (as_eager(query, key, value, scaling).double() - wanted).norm() / wanted.norm()
    assert error < 1.5 * eager
    assert error < 0.01


def test_no_token_sees_what_lies_ahead():
    query, key, value = inputs()
    found = cpu_attention.causal_attention(query, key, value, None)
    key[:, :, 200:], value[:, :, 200:] = 7, 7
    again = cpu_attention.causal_attention(query, key, value, None)
    assert torch.equal(found[:, :200], again[:, :200])
    assert not torch.equal(found[:, 200:], again[:, 200:])


class Module(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 2


@pytest.mark.parametrize(
    ("change", "tiled"),
    [
        ({}, True),
        ({"attention_mask": torch.zeros(1, 1, 300, 300).bfloat16()}, False),
        ({"is_causal": False}, False),
        ({"dropout": 0.1}, False),
        ({"dtype": torch.float32}, False),
        ({"tokens": 128}, False),
        ({"query_tokens": 1}, False),
        ({"position_bias": torch.zeros(1, 4, 300, 300).bfloat16()}, False),
    ],
)
def test_it_is_used_where_it_is_right(change, tiled, monkeypatch):
    used = []
    real = cpu_attention.causal_attention
    monkeypatch.setattr(
        cpu_attention, "causal_attention", lambda *args: used.append(1) or real(*args)
    )
    change = dict(change)
    dtype = change.pop("dtype", torch.bfloat16)
    states = [x.to(dtype) for x in inputs(tokens=change.pop("tokens", 300))]
    states[0] = states[0][:, :, -change.pop("query_tokens", 300) :]
    arguments = {"attention_mask": None, "scaling": 0.3, **change}
    torch.manual_seed(0)
    found, _ = cpu_attention.attention(Module(), *states, **arguments)
    assert bool(used) == tiled
    torch.manual_seed(0)
    wanted, _ = sdpa_attention.sdpa_attention_forward(Module(), *states, **arguments)
    torch.testing.assert_close(found, wanted, atol=0.03, rtol=0.02)


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "mistral", "gemma2"])
def test_the_walk_with_it_is_the_walk_without(name, tmp_path):
    """Also with sliding windows and capped scores, which stay with transformers' own kernels."""
    rows = [torch.arange(2 * 300).reshape(2, 300) % 97]
    outputs = []
    for use in (False, True):
        path = tmp_path / "model"
        if not path.exists():
            tiny.build(name, path)
        skeleton = tiny.skeleton(path, dtype=torch.bfloat16)
        if use:
            cpu_attention.use(skeleton.model)
        walk = Walk(skeleton)
        (hidden,) = walk.embed(rows)
        with walk.block(0) as block:
            outputs.append(block.forward(hidden).float())
    error = float((outputs[0] - outputs[1]).norm() / outputs[0].norm())
    assert error < 0.01
    assert (error > 0) == (name in ("gpt_neox", "llama"))  # it was used there
