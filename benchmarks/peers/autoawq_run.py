"""Quantize with AutoAWQ (archived) as its users did; the benchmarks run it in its own venv.

pip install torch==2.13.0 autoawq==0.2.9 transformers==4.51.3 --no-deps
"""

import argparse
import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--rows", required=True, help='a .jsonl file of {"input_ids": [...]}')
parser.add_argument("--out", required=True)
parser.add_argument("--group", type=int, default=128)
args = parser.parse_args()

import torch  # noqa: E402  (the environment comes first)
import transformers  # noqa: E402
from awq import AutoAWQForCausalLM  # noqa: E402
from awq.quantize import quantizer  # noqa: E402

# AutoAWQ tries a scale on the live weights and then restores them from copies that it takes with
# Tensor.cpu(), which copies nothing on a CPU: there, every trial would stay in the weights
_to_cpu = torch.Tensor.cpu
torch.Tensor.cpu = lambda t, *rest: t.clone() if t.device.type == "cpu" else _to_cpu(t, *rest)

with open(args.rows) as lines:
    rows = [json.loads(line)["input_ids"] for line in lines]
# every tool gets the same rows, not texts that each of them cuts in its own way
quantizer.get_calib_dataset = lambda **_: [torch.tensor([row]) for row in rows]
model = AutoAWQForCausalLM.from_pretrained(
    args.model, torch_dtype=torch.float32, device_map="cpu", low_cpu_mem_usage=False
)
tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
model.quantize(
    tokenizer,
    quant_config={"zero_point": True, "q_group_size": args.group, "w_bit": 4, "version": "GEMM"},
    max_calib_samples=len(rows),
    max_calib_seq_len=max(map(len, rows)),
)
model.save_quantized(args.out)
tokenizer.save_pretrained(args.out)
