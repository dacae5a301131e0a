"""A mixture of experts from a trained Llama: what quantizing experts loses can be measured on it.

    python benchmarks/upcycle.py demo OUT [--experts 4]
    quantkit gptq OUT --out Q; quantkit verify Q --against OUT

Every expert is a copy of the block's feed-forward part and the router is random, so that the
mixture computes what the Llama does, while each expert is calibrated on its own share of the
tokens: half of them, with 4 experts and 2 for a token.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantkit.core.source import resolve

NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # Llama's, Mixtral's


def upcycled(
    tensors: dict[str, torch.Tensor], experts: int, blocks: int, width: int
) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in tensors.items():
        place, dot, leaf = name.partition(".mlp.")
        if not dot:
            found[name] = tensor
            continue
        old = leaf.removesuffix(".weight")
        for number in range(experts):
            own = f"{place}.block_sparse_moe.experts.{number}.{NAMES[old]}.weight"
            found[own] = tensor.clone()
    generator, dtype = torch.Generator().manual_seed(0), next(iter(tensors.values())).dtype
    for block in range(blocks):
        router = torch.randn(experts, width, generator=generator) / 2
        found[f"model.layers.{block}.block_sparse_moe.gate.weight"] = router.to(dtype)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", type=int, default=4)
    args = parser.parse_args()
    source = resolve(args.model).folder
    config = json.loads((source / "config.json").read_text("utf-8"))
    if config["model_type"] != "llama":
        parser.error(f"{args.model} is no Llama")
    args.out.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and "index" not in file.name:
            shutil.copy(file, args.out / file.name)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= load_file(file)
    sizes = config["num_hidden_layers"], config["hidden_size"]
    config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    config |= {"num_local_experts": args.experts, "num_experts_per_tok": 2, "sliding_window": None}
    (args.out / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    save_file(
        upcycled(tensors, args.experts, *sizes), args.out / "model.safetensors", {"format": "pt"}
    )


if __name__ == "__main__":
    main()
