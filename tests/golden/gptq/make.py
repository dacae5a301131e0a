"""Made gptq.safetensors with GPTQModel 7.6.0's own packer and torch 2.13.0 on a CPU.

    pip install torch==2.13.0 gptqmodel==7.6.0
    python make.py

A weight is built as (code - zero) * scale, so that GPTQModel's rounding finds the codes again. Its
packer writes zero points as they are (v2); ``v1_qzeros`` are what its conversion to v1 makes of
them. Beside the tensors lies what its torch kernel dequantizes them to: float16 [out, in].
"""

from pathlib import Path

import torch
from gptqmodel import QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import FORMAT
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file

HERE = Path(__file__).parent
OUT, WIDTH = 32, 96
CASES = [
    (bits, group, symmetric, shuffled)
    for bits in (2, 3, 4, 8)
    for group in (32, -1)
    for symmetric in (True, False)
    for shuffled in (False, True)
    if not (shuffled and (group == -1 or bits != 4)) and not (group == -1 and bits in (2, 8))
]


def packed(bits, group, symmetric, shuffled, seed):
    """GPTQModel's layer for random codes, in its v2 form, and what it dequantizes to."""
    g = torch.Generator().manual_seed(seed)
    width = WIDTH if group == -1 else group
    groups = WIDTH // width
    top = 2**bits - 1
    codes = torch.randint(0, top + 1, (OUT, WIDTH), generator=g)
    # no zero point of 0, so that v1 can hold all of them
    zeros = torch.randint(1, top + 1, (OUT, groups), generator=g)
    if symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    scales = ((torch.rand(OUT, groups, generator=g) + 0.5) / 64).half().float()
    index = torch.arange(WIDTH) // width
    if shuffled:
        index = index[torch.randperm(WIDTH, generator=g)]
    linear = torch.nn.Linear(WIDTH, OUT, bias=False)
    linear.weight.data = (codes - zeros[:, index]) * scales[:, index]
    layer = TorchLinear(
        bits=bits,
        group_size=group,
        sym=symmetric,
        desc_act=shuffled,
        in_features=WIDTH,
        out_features=OUT,
        format=FORMAT.GPTQ_V2,
    )
    layer.pack(linear, scales, zeros.float(), index.to(torch.int32))
    layer.post_init()
    return layer, layer.dequantize_weight().T.half().contiguous()


def main():
    tensors = {}
    for number, (bits, group, symmetric, shuffled) in enumerate(CASES):
        layer, weight = packed(bits, group, symmetric, shuffled, number)
        name = f"b{bits}_g{group}_{'sym' if symmetric else 'asym'}{'_shuffled' if shuffled else ''}"
        for suffix in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"{name}.{suffix}"] = getattr(layer, suffix).detach().clone().contiguous()
        tensors[f"{name}.weight"] = weight
        convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=group))
        tensors[f"{name}.v1_qzeros"] = layer.qzeros.detach().clone().contiguous()
    save_file(tensors, HERE / "gptq.safetensors")


if __name__ == "__main__":
    main()
