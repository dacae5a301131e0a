"""Quantize a model on the CPU with transformers and bitsandbytes and save it, the way their users
do. Run with a python that has bitsandbytes:

    python bitsandbytes_save.py MODEL KIND OUT [DTYPE]

KIND is nf4 (double quantization) or int8, DTYPE what the model is loaded in (float32).
What transformers_logits.py says of OUT afterwards is what bitsandbytes makes of its own checkpoint.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

CONFIGS = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "int8": {"load_in_8bit": True},
}
model, kind, out, dtype = [*sys.argv[1:], "float32"][:4]
quantized = AutoModelForCausalLM.from_pretrained(
    model,
    device_map="cpu",
    dtype=dtype,
    quantization_config=BitsAndBytesConfig(**CONFIGS[kind]),
)
quantized.save_pretrained(out)
AutoTokenizer.from_pretrained(model).save_pretrained(out)
