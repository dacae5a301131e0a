"""Makes the files beside it: weights quantized, and dequantized again, by bitsandbytes.

    python -m venv v; v/bin/pip install torch==2.13.0 bitsandbytes==0.50.2 safetensors transformers
    v/bin/python tests/golden/bnb/make.py

Every file holds the state dict of one layer ``x``, as bitsandbytes saves it, and under
``foreign.weight`` what bitsandbytes says it means, in float32 (and under ``foreign.cast`` in the
dtype of the original weight). The files exact-* hold the weight too, under ``original``.
config.json is what transformers writes for such models.
"""

import json
from pathlib import Path

import bitsandbytes
import torch
import transformers
from bitsandbytes import functional, nn
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig

HERE = Path(__file__).parent
VERSIONS = {
    "bitsandbytes": bitsandbytes.__version__,
    "torch": torch.__version__,
    "transformers": transformers.__version__,
}
# file: kind, out, in, block size, dtype, double quantization
FOUR_BITS = {
    "nf4": ("nf4", 12, 192, 64, torch.float32, False),
    "nf4-nested": ("nf4", 33, 256, 32, torch.bfloat16, True),  # 264 blocks: two blocks of scales
    "nf4-half-128": ("nf4", 5, 384, 128, torch.float16, False),
    "nf4-row-2048": ("nf4", 3, 2048, 2048, torch.float32, False),
    "fp4": ("fp4", 7, 320, 64, torch.float16, False),
    "fp4-nested": ("fp4", 11, 192, 64, torch.float32, True),
    "nf4-ragged": ("nf4", 5, 96, 64, torch.float32, False),  # blocks reach over the ends of rows
    "nf4-odd": ("nf4", 3, 35, 64, torch.float32, False),
}


# kind, double quantization, dtype of the weights that are rounded
EXACT = [
    ("nf4", False, torch.float32),
    ("nf4", True, torch.bfloat16),
    ("fp4", True, torch.float32),
    ("int8", False, torch.float32),
]


def four_bits(kind, out, width, block, dtype, nested, storage=torch.uint8):
    weight = torch.randn(out, width) * torch.linspace(0.1, 3, width)
    weight[0, 0] = 0
    packed, state = functional.quantize_4bit(
        weight.to(dtype),
        blocksize=block,
        compress_statistics=nested,
        quant_type=kind,
        quant_storage=storage,
    )
    layer = nn.Linear4bit(width, out, bias=False, quant_type=kind, quant_storage=storage)
    layer.weight = nn.Params4bit(
        packed, requires_grad=False, quant_state=state, bnb_quantized=True, quant_storage=storage
    )
    held = {f"x.{name}": t.contiguous().clone() for name, t in layer.state_dict().items()}
    held["foreign.cast"] = functional.dequantize_4bit(packed, state)
    state.dtype = torch.float32
    held["foreign.weight"] = functional.dequantize_4bit(packed, state)
    return held


def eight_bits(out, width):
    layer = nn.Linear8bitLt(width, out, bias=False, has_fp16_weights=False)
    layer.weight = nn.Int8Params(torch.randn(out, width), requires_grad=False)
    layer = layer.to("cpu")
    held = {f"x.{name}": t.clone() for name, t in layer.state_dict().items()}
    held["foreign.weight"] = torch.ops.bitsandbytes.int8_vectorwise_dequant(
        held["x.weight"], held["x.SCB"]
    )
    return held


def hard_weights(dtype):
    """Weights of every kind that could be rounded another way: random ones, halves of levels and
    their neighbours, ties between codes, a row of zeros, very small ones; 672 blocks of 64."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(84, 512, generator=generator) * torch.rand(84, 1, generator=generator)
    rows[20:30] = (rows[20:30] * 8).round() / 8
    rows[30] = 0
    rows[31:34] *= 1e-6
    for first, kind in ((40, "nf4"), (50, "fp4")):
        levels = functional.get_4bit_type(kind, device="cpu").sort().values
        middle = (levels[:-1] + levels[1:]) / 2
        near = torch.cat([torch.nextafter(middle, middle + step) for step in (-1, 0, 1)] + [middle])
        rows[first : first + 8, :60] = near
        rows[first : first + 8, 60:64] = 1  # the block's largest
        rows[first + 4 : first + 8] *= 0.37
    return rows.to(dtype)


def exactly(kind, nested, dtype):
    """A weight and what bitsandbytes makes of it, bit for bit."""
    weight = hard_weights(dtype)
    if kind == "int8":
        codes, largest, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return {"original": weight, "x.weight": codes, "x.SCB": largest}
    packed, state = functional.quantize_4bit(weight, compress_statistics=nested, quant_type=kind)
    held = {f"x.weight.{name}": t for name, t in state.as_dict(packed=True).items()}
    return {"original": weight, "x.weight": packed, **held}


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name, made in FOUR_BITS.items():
        save_file(four_bits(*made), HERE / f"{name}.safetensors", VERSIONS)
    wide = four_bits("nf4", 6, 128, 64, torch.bfloat16, True, torch.bfloat16)
    save_file(wide, HERE / "nf4-storage.safetensors", VERSIONS)
    save_file(eight_bits(9, 200), HERE / "int8.safetensors", VERSIONS)
    for kind, nested, dtype in EXACT:
        name = f"exact-{kind}{'-nested' if nested else ''}"
        save_file(exactly(kind, nested, dtype), HERE / f"{name}.safetensors", VERSIONS)
    maps = {kind: functional.get_4bit_type(kind, device="cpu") for kind in ("nf4", "fp4")}
    save_file(maps, HERE / "maps.safetensors", VERSIONS)
    configs = {
        "nf4-nested": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["a.b", "lm_head", "embed_out"],
        ),
        "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }
    written = {name: config.to_dict() for name, config in configs.items()}
    (HERE / "config.json").write_text(json.dumps(written, indent=2, default=str) + "\n")


main()
