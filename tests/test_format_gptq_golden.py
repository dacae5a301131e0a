"""Tensors that GPTQModel packed: read to its own weights, written back byte for byte."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantkit.core.checkpoint import TensorSpec
from quantkit.formats import gptq

FILE = Path(__file__).parent / "golden" / "gptq" / "gptq.safetensors"
GOLDEN = load_file(FILE)
CASES = sorted({name.partition(".")[0] for name in GOLDEN})
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


class Held(dict):
    """Tensors in memory, as a checkpoint has them."""

    get = dict.__getitem__

    def spec(self, name):
        return TensorSpec.of(self[name])


def packed(case, convention):
    found = {suffix: GOLDEN[f"{case}.{suffix}"] for suffix in SUFFIXES}
    if convention == "v1":
        found["qzeros"] = GOLDEN[f"{case}.v1_qzeros"]
    return found


def config(case, convention):
    return {"sym": "_sym" in case, "checkpoint_format": {"v1": "gptq", "v2": "gptq_v2"}[convention]}


def test_all_bits_are_there():
    assert {case[:2] for case in CASES} == {"b2", "b3", "b4", "b8"}


@pytest.mark.parametrize("convention", ["v1", "v2"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_read_to_the_weights_that_gptqmodel_computes_with(case, convention):
    held = Held({f"x.{suffix}": t for suffix, t in packed(case, convention).items()})
    assert gptq.linears(held, {}) == ["x"]
    q = gptq.read(held, "x", config(case, convention))
    assert q.scheme.bits == int(case[1])
    assert q.scheme.symmetric == ("_sym" in case)
    assert (q.group_of is not None) == ("_shuffled" in case)
    # GPTQModel multiplies in float16: one rounding of the product, which is exact in float32
    assert torch.equal(q.dequantize().half(), GOLDEN[f"{case}.weight"])


@pytest.mark.parametrize("convention", ["v1", "v2"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_written_back_byte_for_byte(case, convention):
    wanted = packed(case, convention)
    held = Held({f"x.{suffix}": t for suffix, t in wanted.items()})
    again = gptq.pack(gptq.read(held, "x", config(case, convention)), convention)
    assert again.keys() == wanted.keys()
    for suffix, tensor in wanted.items():
        assert again[suffix].dtype == tensor.dtype, suffix
        assert torch.equal(again[suffix], tensor), suffix
