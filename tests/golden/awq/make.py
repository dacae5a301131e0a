"""Made the files beside it with AutoAWQ 0.2.9's own packers and torch 2.13.0 on a CPU.

    pip install --no-deps --target FOLDER autoawq==0.2.9
    PYTHONPATH=FOLDER python make.py

``awq/__init__.py`` does not import with today's transformers, and is not needed: its two linear
modules are imported without it. A weight is built as (code - zero) * scale, so that AutoAWQ's
rounding finds the codes again. Beside GEMM's tensors lies what AutoAWQ dequantizes them to; it
cannot dequantize GEMV's on a CPU, and the codes lie there instead.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent


def without_init():
    """AutoAWQ's modules without the packages' __init__ files."""
    folder = Path(next(iter(importlib.util.find_spec("awq").submodule_search_locations)))
    for name in ("awq", "awq.modules", "awq.modules.linear"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    gemm = importlib.import_module("awq.modules.linear.gemm").WQLinear_GEMM
    gemv = importlib.import_module("awq.modules.linear.gemv").WQLinear_GEMV
    dequantize = importlib.import_module("awq.utils.packing_utils").dequantize_gemm
    return gemm, gemv, dequantize


def parts(out, width, group, symmetric, seed):
    g = torch.Generator().manual_seed(seed)
    groups = width // (width if group == -1 else group)
    codes = torch.randint(0, 16, (out, width), generator=g)
    zeros = torch.randint(0, 16, (out, groups), generator=g)
    zeros[0], zeros[1], zeros[2] = 0, 8, 15
    if symmetric:
        zeros.fill_(8)
    scales = (torch.rand(out, groups, generator=g) * 0.02 + 0.005).half()
    size = width // groups
    weight = (codes - zeros.repeat_interleave(size, 1)) * scales.float().repeat_interleave(size, 1)
    linear = torch.nn.Linear(width, out, bias=False)
    linear.weight.data = weight
    return linear, codes, zeros, scales


def main():
    gemm, gemv, dequantize = without_init()
    for version, cls in (("gemm", gemm), ("gemv", gemv)):
        tensors = {}
        for seed, (width, group, symmetric) in enumerate(
            [(128, 32, False), (192, 64, False), (256, 128, True), (128, -1, False)]
        ):
            linear, codes, zeros, scales = parts(32, width, group, symmetric, seed)
            size = width if group == -1 else group
            given = (scales.T, zeros.T) if version == "gemm" else (scales, zeros)
            # float32 in, so that its rounding is exact; AutoAWQ stores float16 whatever it is given
            packed = cls.from_linear(
                linear, 4, size, scales=given[0].float().contiguous(), zeros=given[1].contiguous()
            )
            name = f"w{width}.g{group}.{'sym' if symmetric else 'asym'}"
            for suffix in ("qweight", "qzeros", "scales"):
                tensors[f"{name}.{suffix}"] = getattr(packed, suffix).contiguous()
            if version == "gemv":
                tensors[f"{name}.codes"] = codes.to(torch.uint8)
            else:
                weight = dequantize(packed.qweight, packed.qzeros, packed.scales, 4, size)
                tensors[f"{name}.dequantized"] = weight.T.contiguous()
        save_file(tensors, HERE / f"{version}.safetensors")


main()
