"""Made the file beside it with compressed-tensors 0.19.0 and torch 2.13.0 on a CPU.

    pip install compressed-tensors==0.19.0
    python make.py

The weights are compressed by its PackedQuantizationCompressor and decompressed by the same.
"""

from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

HERE = Path(__file__).parent
# bits, out, width, group, symmetric, dtype
CASES = [
    (2, 12, 96, 32, True, torch.float16),
    (2, 12, 96, 48, False, torch.bfloat16),
    (3, 12, 96, 32, True, torch.bfloat16),
    (3, 12, 96, 32, False, torch.float16),
    (4, 12, 96, 32, True, torch.float16),
    (4, 12, 96, 32, False, torch.bfloat16),
    (4, 12, 84, -1, True, torch.bfloat16),
    (4, 13, 84, -1, False, torch.float32),
    (5, 12, 96, 32, True, torch.float16),
    (5, 13, 96, 16, False, torch.float16),
    (6, 12, 96, 32, True, torch.bfloat16),
    (6, 13, 96, 32, False, torch.float16),
    (8, 12, 96, 32, True, torch.float16),
    (8, 13, 99, -1, False, torch.float16),
]

tensors = {}
for seed, (bits, out, width, group, symmetric, dtype) in enumerate(CASES):
    g = torch.Generator().manual_seed(seed)
    groups = 1 if group == -1 else width // group
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = (torch.rand(out, groups, generator=g) * 0.02 + 0.005).to(dtype)
    zero = torch.randint(low, high + 1, (out, groups), generator=g).to(torch.int8)
    zero[0], zero[1], zero[2] = low, 0, high
    if symmetric:
        zero.zero_()
    signed = torch.randint(low, high + 1, (out, width), generator=g)
    spread = [t.float().repeat_interleave(width // groups, 1) for t in (zero, scale)]
    state = {
        "weight": ((signed - spread[0]) * spread[1]),
        "weight_scale": scale.float(),
        "weight_zero_point": zero,
    }
    args = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="channel" if group == -1 else "group",
        group_size=None if group == -1 else group,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    packed = PackedQuantizationCompressor.compress(state, scheme)
    packed["weight_scale"] = (
        scale  # the rounding above was done in float32, to find the codes again
    )
    name = f"b{bits}.g{group}.{'sym' if symmetric else 'asym'}"
    again = PackedQuantizationCompressor.decompress(packed, scheme)
    tensors |= {f"{name}.{suffix}": t.contiguous() for suffix, t in packed.items()}
    tensors[f"{name}.dequantized"] = again["weight"].contiguous()
save_file(tensors, HERE / "pack_quantized.safetensors")
