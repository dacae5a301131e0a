"""Quantize with llm-compressor's GPTQ or AWQ as its users would, in a venv of its own.

pip install torch==2.13.0 llmcompressor==0.14.0.1 'transformers<=5.17'
"""

import argparse
import json
import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--rows", required=True, help='a .jsonl file of {"input_ids": [...]}')
parser.add_argument("--out", required=True)
parser.add_argument("--bits", type=int, default=4)
parser.add_argument("--group", type=int, default=128)
parser.add_argument("--act-order", choices=["none", "static"], default="static")
parser.add_argument("--awq", action="store_true", help="AWQ, asymmetric, in the place of GPTQ")
args = parser.parse_args()

import torch  # noqa: E402  (the environment comes first)
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.awq import AWQModifier  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

if not torch.cuda.is_available():  # its AWQ pins memory in any case
    torch.Tensor.pin_memory = lambda self, *_: self

with open(args.rows) as lines:
    rows = [json.loads(line)["input_ids"] for line in lines]
data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(args.model)
order = None if args.act_order == "none" else args.act_order
weights = {
    "num_bits": args.bits,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": args.group,
    "actorder": order,
}
ignore = ["lm_head", "embed_out"]
if args.awq:
    weights |= {"symmetric": False, "actorder": None}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    recipe = AWQModifier(config_groups=groups, ignore=ignore)
else:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    recipe = GPTQModifier(config_groups=groups, ignore=ignore, actorder=order)
oneshot(
    model=model,
    dataset=data,
    recipe=[recipe],
    tokenizer=tokenizer,
    batch_size=1,
    max_seq_length=max(map(len, rows)),
    num_calibration_samples=len(rows),
    shuffle_calibration_samples=False,
)
shutil.rmtree(args.out, ignore_errors=True)
model.save_pretrained(args.out, save_compressed=True)
tokenizer.save_pretrained(args.out)
