"""Quantize with GPTQModel as its users would; run by the benchmarks inside GPTQModel's own venv.

pip install torch==2.13.0 gptqmodel==7.6.0
"""

import argparse
import json
import os
import shutil

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--rows", required=True, help='a .jsonl file of {"input_ids": [...]}')
parser.add_argument("--out", required=True)
parser.add_argument("--bits", type=int, default=4)
parser.add_argument("--group", type=int, default=128)
parser.add_argument("--act-order", choices=["none", "group"], default="none")
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

from gptqmodel import GPTQModel, QuantizeConfig  # noqa: E402  (the environment comes first)

with open(args.rows) as lines:
    rows = [json.loads(line)["input_ids"] for line in lines]
data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
config = QuantizeConfig(
    bits=args.bits,
    group_size=args.group,
    sym=True,
    desc_act=args.act_order == "group",
    device=args.device,
    offload_to_disk=False,  # with it, saving a GPT-NeoX fails in 7.6.0
)
model = GPTQModel.load(args.model, config)
model.quantize(data, batch_size=1)
shutil.rmtree(args.out, ignore_errors=True)
model.save(args.out)
