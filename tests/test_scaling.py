"""Folding scales into stored tensors: exactly, and only where there is a place for them."""

import pytest
import tiny
import torch

from quantkit.core.qweight import Scheme
from quantkit.runtime.folding import Fold
from quantkit.runtime.walk import Walk
from quantkit.workflows import scaling
from quantkit.workflows.method import Originals

WIDTH = tiny.WIDTH
EACH = torch.arange(WIDTH)


def originals(norm, dtype=torch.bfloat16):
    return Originals({}, lambda _: torch.eye(2), lambda _: None, lambda _: (norm, dtype))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_scales_are_those_that_the_stored_norm_has(offset):
    """bfloat16 rounds a norm's weight by 0.2 %; none of it is left when its scales are used."""
    generator = torch.Generator().manual_seed(0)
    norm = torch.randn(WIDTH, generator=generator)
    norm[3] = -offset  # a norm that multiplies by nothing has no scale
    fold = Fold("norm", ("linear",), EACH, offset)
    ideal = torch.rand(WIDTH, generator=generator) + 0.5
    scale = scaling.stored_scale(fold, originals(norm))(ideal)
    stored = scaling._divided(norm, scale, offset, torch.bfloat16)
    assert scale[3] == 1 and stored.dtype == torch.bfloat16
    torch.testing.assert_close((stored.float() + offset) * scale, norm + offset, rtol=1e-6, atol=0)
    assert not torch.equal(scale, ideal) and bool(((scale / ideal)[4:] - 1).abs().max() < 0.05)


def test_rows_of_a_weight_and_its_bias_go_together():
    some = scaling.Scaling(rows={"v": torch.tensor([2.0, 4.0])}, columns={"o": torch.tensor([2.0])})
    assert some.weight("v", torch.ones(2, 3)).tolist() == [[0.5] * 3, [0.25] * 3]
    assert some.bias("v", torch.ones(2)).tolist() == [0.5, 0.25]
    assert some.bias("v", None) is None and some.bias("o", torch.ones(2)).tolist() == [1, 1]
    assert some.weight("o", torch.ones(2, 1)).tolist() == [[2.0], [2.0]]


def test_linears_that_stay_as_they_are_take_no_scales(tmp_path):
    walk = Walk(tiny.skeleton(tiny.build("llama", tmp_path / "model")))
    walk.embed(tiny.batches())
    values = Fold("self_attn.v_proj", ("self_attn.o_proj",), EACH)
    norm = Fold("input_layernorm", ("self_attn.q_proj", "self_attn.v_proj"), EACH, 0.0)
    with walk.block(0) as block:

        def kept(*names):
            schemes = {f"self_attn.{name}": Scheme() for name in names}
            return scaling.usable([values, norm], block, schemes)

        assert kept("q_proj", "v_proj", "o_proj") == [values, norm]
        assert kept("q_proj", "v_proj") == [norm]
        assert kept("o_proj", "q_proj") == []
