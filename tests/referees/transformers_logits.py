"""Logits and greedy tokens of a checkpoint through plain transformers, which hands quantized layers
to the package that its configuration names. Run as a script, so that what such a package changes in
a process stays in that process.

    python transformers_logits.py FOLDER IDS.json OUT.safetensors DTYPE PACKAGE [NEW]

PACKAGE is whose layers there must be: gptqmodel, compressed_tensors, bitsandbytes; or torch, where
all must be torch's own. REFEREE_BACKEND chooses one of GPTQModel's kernels; ``dequantized`` has a
checkpoint of bitsandbytes run as the plain weights that bitsandbytes makes of it. OUT holds
``logits`` [rows, tokens, vocabulary] and ``greedy`` [rows, NEW].
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

DEQUANTIZED = "dequantized"


def configuration(folder: str) -> dict[str, Any]:
    """What to tell from_pretrained about the quantization."""
    backend = os.environ.get("REFEREE_BACKEND")
    if not backend or backend == DEQUANTIZED:
        return {}
    config = json.loads((Path(folder) / "config.json").read_text())
    kind = {"gptq": GPTQConfig, "awq": AwqConfig}[config["quantization_config"]["quant_method"]]
    return {"quantization_config": kind(bits=4, backend=backend)}


def check_layers(model: nn.Module, package: str) -> None:
    """compressed-tensors leaves the layers torch's and hangs a scheme on them."""
    kinds = {type(module).__module__.partition(".")[0] for module in model.modules()}
    if any(hasattr(module, "quantization_scheme") for module in model.modules()):
        kinds.add("compressed_tensors")
    others = kinds - {"transformers", "torch"}
    assert others == ({package} - {"torch"}), f"layers are not {package}'s alone: {kinds}"


@torch.no_grad()
def continued(model: Any, rows: torch.Tensor, new: int) -> torch.Tensor:
    """``new`` tokens after each row, the most probable every time; one row at a time."""
    found = torch.empty(len(rows), new, dtype=torch.long)
    for i, row in enumerate(rows):
        step, past = row[None], None
        for k in range(new):
            out = model(step, past_key_values=past, use_cache=True)
            step, past = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            found[i, k] = step
    return found


def main(folder: str, ids: str, out: str, dtype: str, package: str, new: str = "0") -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", dtype=getattr(torch, dtype), **configuration(folder)
    )
    check_layers(model, package)
    if os.environ.get("REFEREE_BACKEND") == DEQUANTIZED:
        model.dequantize()
    # transformers 5.17 leaves a head that it renamed (GPT-NeoX's embed_out) in the file's dtype
    model.get_output_embeddings().to(getattr(torch, dtype))
    rows = torch.tensor(json.loads(Path(ids).read_text()))
    with torch.no_grad():
        logits = torch.cat([model(row[None]).logits.float() for row in rows])
    greedy = continued(model, rows, int(new))
    save_file({"logits": logits.contiguous(), "greedy": greedy}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
