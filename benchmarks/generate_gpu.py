"""Text from a 10B GPT-NeoX on this GPU, end to end: 512 new tokens after 512, and bfloat16 too.

    python benchmarks/generate_gpu.py [--layers 36] [--batches 1,16,64] [--new 512]

The model has the shape of weblab-10b (hidden 4864, feed-forward 19456, 38 heads, 50277 tokens) and
random weights, which cost as much to compute with as trained ones. Tokens are drawn greedily.
"""

import argparse
import time
from itertools import pairwise
from statistics import median

import torch
from torch import nn
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from quantkit.core.qweight import QWeight, Scheme
from quantkit.core.sampling import Sampling
from quantkit.runtime.decode import Captured, Plain, decode
from quantkit.runtime.linear import quantized_linear

GPU = torch.device("cuda:0")
GREEDY = Sampling(temperature=0)


def model_of(layers: int) -> PreTrainedModel:
    config = GPTNeoXConfig(
        vocab_size=50277,
        hidden_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=38,
        intermediate_size=19456,
        max_position_embeddings=2048,
        rotary_pct=0.25,
        use_parallel_residual=False,
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    with GPU:
        model = GPTNeoXForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


@torch.inference_mode()
def agreement(model: PreTrainedModel) -> str:
    """Relative difference of the logits of a captured step to those of the model as transformers
    runs it, and how far two of its own ways are apart: random weights amplify rounding."""
    prompt = torch.randint(0, 50000, (1, 300), generator=torch.Generator().manual_seed(1)).tolist()
    token = torch.tensor([7], device=GPU)

    def logits(stepper: Plain) -> torch.Tensor:
        stepper.begin(prompt)
        return stepper.step(token)[0].float().clone()

    def apart(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm() / b.norm())

    before = model.config._attn_implementation
    captured = logits(Captured(model, 1, 512))
    found = {}
    for way in ("sdpa", "eager"):
        model.set_attn_implementation(way)
        found[way] = logits(Plain(model, DynamicCache(config=model.config)))
    model.set_attn_implementation(before)
    return (
        f"{apart(captured, found['sdpa']):.4f} from torch's attention, which is "
        f"{apart(found['eager'], found['sdpa']):.4f} from eager attention"
    )


def quantize(model: nn.Module) -> float:
    """Give every linear of a block a random 4-bit weight; seconds for laying them out."""
    took = 0.0
    for name, old in list(model.named_modules()):
        if not isinstance(old, nn.Linear) or "layers" not in name:
            continue
        out, width = old.weight.shape
        codes = torch.randint(0, 16, (out, width), dtype=torch.uint8, device=GPU)
        scale = torch.full((out, width // 128), 0.004, dtype=torch.float16, device=GPU)
        q = QWeight(Scheme(), codes, scale)
        torch.cuda.synchronize()
        started = time.perf_counter()
        new = quantized_linear(q, old.bias is not None, GPU, torch.bfloat16)
        torch.cuda.synchronize()
        took += time.perf_counter() - started
        new.bias = old.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    return took


def measured(model: PreTrainedModel, texts: int, new: int) -> str:
    """Speed of the second run (the first captures): tokens of all texts."""
    prompts = torch.randint(0, 50000, (texts, 512), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        times = [time.perf_counter() for _ in decode(model, prompts.tolist(), GREEDY, new)]
    step = median(b - a for a, b in pairwise(times))
    rate = texts * (new - 1) / (times[-1] - times[0])
    return (
        f"{rate:8.1f} tokens/s, {texts * new / (times[-1] - started):8.1f} with the prompt; "
        f"first after {times[0] - started:.3f} s, then one every {step * 1e3:.2f} ms"
    )


def plainly(model: PreTrainedModel, texts: int, new: int) -> str:
    """transformers' generate as it comes."""
    prompts = torch.randint(0, 50000, (texts, 512), device=GPU)
    mask = torch.ones_like(prompts)

    def run(count: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        model.generate(
            prompts,
            attention_mask=mask,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )
        torch.cuda.synchronize()
        return time.perf_counter() - started

    run(4)
    first = run(1)
    return f"{texts * (new - 1) / (run(new) - first):8.1f} tokens/s"


def kernels_of(model: PreTrainedModel, layers: int) -> None:
    """What a step consists of."""
    from torch.profiler import ProfilerActivity, profile

    steps = decode(model, [list(range(512))], GREEDY, 24)
    for _ in range(4):
        next(steps)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(8):
            next(steps)
        torch.cuda.synchronize()
    steps.close()
    rows = sorted(found.key_averages(), key=lambda row: -row.device_time_total)
    print(f"  kernels of one step of {layers} layers: microseconds, launches, name")
    for row in rows[:24]:
        print(f"    {row.device_time_total / 8:8.1f} {row.count / 8:7.1f}  {row.key[:70]}")
    total = sum(row.device_time_total for row in rows) / 8
    print(f"    {total:8.1f} {sum(row.count for row in rows) / 8:7.1f}  in all", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--new", type=int, default=512)
    arguments = parser.parse_args()
    batches = [int(text) for text in arguments.batches.split(",")]
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    started = time.perf_counter()
    model = model_of(arguments.layers)
    print(f"model made in {time.perf_counter() - started:.1f} s", flush=True)
    with torch.inference_mode():
        print("bfloat16, transformers' generate:", plainly(model, 1, 64), flush=True)
    print("bfloat16, quantkit's decode:     ", measured(model, 1, 128), flush=True)
    took = quantize(model)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    print(f"4 bits: laid out in {took:.1f} s, {torch.cuda.memory_allocated() / 2**30:.2f} GiB")
    with torch.inference_mode():
        print("4 bits, transformers' generate:  ", plainly(model, 1, 64), flush=True)
    for texts in batches:
        print(f"4 bits, batch {texts:3d}:", measured(model, texts, arguments.new), flush=True)
        if texts == 1:
            print("  captured against plain:", agreement(model))
            kernels_of(model, arguments.layers)
    print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
