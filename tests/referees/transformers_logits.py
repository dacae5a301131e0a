"""Logits of a GPTQ checkpoint through plain transformers, which hands it to GPTQModel. Run as a
script, so that what GPTQModel changes in a process stays in that process.

    python transformers_logits.py FOLDER IDS.json OUT.safetensors DTYPE

REFEREE_BACKEND chooses one of GPTQModel's kernels.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPTQConfig

folder, ids, out, dtype = sys.argv[1:]
options = {}
if backend := os.environ.get("REFEREE_BACKEND"):
    options["quantization_config"] = GPTQConfig(bits=4, backend=backend)
model = AutoModelForCausalLM.from_pretrained(
    folder, device_map="cpu", dtype=getattr(torch, dtype), **options
)
kinds = {type(module).__module__.partition(".")[0] for module in model.modules()}
assert "gptqmodel" in kinds, f"no layer is GPTQModel's: {kinds}"
rows = torch.tensor(json.loads(Path(ids).read_text()))
with torch.no_grad():
    logits = model(rows).logits
save_file({"logits": logits.float().contiguous()}, out)
