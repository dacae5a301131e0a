"""Logits of a GPTQ checkpoint through auto-gptq (archived in 2025; needs transformers 4). Run with
the python of a venv that has it:

    python autogptq_logits.py FOLDER IDS.json OUT.safetensors DTYPE
"""

import json
import sys
from pathlib import Path

import torch
from auto_gptq import AutoGPTQForCausalLM
from safetensors.torch import save_file

folder, ids, out, dtype = sys.argv[1:]
model = AutoGPTQForCausalLM.from_quantized(
    folder, device="cpu", torch_dtype=getattr(torch, dtype), use_safetensors=True
)
rows = torch.tensor(json.loads(Path(ids).read_text()))
with torch.no_grad():
    logits = model(input_ids=rows).logits
save_file({"logits": logits.float().contiguous()}, out)
