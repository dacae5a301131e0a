"""Tokens a second of a GPTQ folder in GPTQModel, with transformers' generate; run by hand beside
``quantkit bench`` on the same folder and machine, inside GPTQModel's own environment. Prints a line
RESULT with what it measured.

    python gptqmodel_generate.py FOLDER [--backend gptq_marlin] [--prompt 512] [--new 64]
"""

import argparse
import json
import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder")
parser.add_argument("--backend", default="auto")
parser.add_argument("--prompt", type=int, default=512)
parser.add_argument("--new", type=int, default=64)
parser.add_argument("--batch", type=int, action="append", help="1 if not given")
args = parser.parse_args()

import gptqmodel  # noqa: E402  (the environment comes first)
import torch  # noqa: E402
from gptqmodel import BACKEND, GPTQModel  # noqa: E402

started = time.time()
loaded = GPTQModel.load(args.folder, device="cuda:0", backend=BACKEND(args.backend))
torch.cuda.synchronize()
load = time.time() - started
kinds = {type(m).__name__ for m in loaded.model.modules() if type(m).__module__[:9] == "gptqmodel"}


def seconds(texts: int, new: int) -> float:
    """For a prompt and ``new`` tokens of each text."""
    prompt = torch.randint(2, 8000, (texts, args.prompt), device="cuda:0")
    torch.cuda.synchronize()
    began = time.time()
    loaded.model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=new,
        max_new_tokens=new,
        do_sample=False,
    )
    torch.cuda.synchronize()
    return time.time() - began


rates = {}
with torch.inference_mode():
    for batch in args.batch or [1]:
        seconds(batch, 4)
        first = seconds(batch, 1)
        rates[batch] = round(batch * (args.new - 1) / (seconds(batch, args.new) - first), 1)
print(
    "RESULT "
    + json.dumps(
        {
            "tool": f"gptqmodel {gptqmodel.__version__}",
            "kernels": sorted(kinds),
            "load_s": round(load, 1),
            "tokens_per_second": rates,
            "gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        }
    ),
    flush=True,
)
