"""Text from a 10B GPT-NeoX on this GPU, as quantkit generates it: 512 new tokens after 512.

    python benchmarks/generate_gpu.py [--layers 36] [--batches 1,16,64] [--new 512]
    python benchmarks/generate_gpu.py --llama [--layers 20]

The model has the shape of weblab-10b (hidden 4864, feed-forward 19456, 38 heads, 50277 tokens), or
with --llama that of deepseek-llm-67b (hidden 8192, feed-forward 22016, 64 heads and 8 of keys,
102400 tokens) and zero points in its groups, as AWQ has. Weights are random, which cost as much to
compute with as trained ones. Tokens are drawn greedily. Where a model has fewer layers than the one
whose shape it has, half of them are taken out and the rest measured too, for what all would take.
"""

import argparse
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from quantkit.core.qweight import QWeight, Scheme
from quantkit.core.sampling import Sampling
from quantkit.runtime import decode
from quantkit.runtime.linear import quantized_linear
from quantkit.runtime.torch_engine import CacheState, TorchEngine

GPU = torch.device("cuda:0")
GREEDY = Sampling(temperature=0)
PROMPT = 512


def neox_of(layers: int) -> PreTrainedModel:
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
    return made(GPTNeoXForCausalLM, config)


def llama_of(layers: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=102400,
        hidden_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=22016,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    return made(LlamaForCausalLM, config)


def made(kind: type[PreTrainedModel], config: object) -> PreTrainedModel:
    torch.set_default_dtype(torch.bfloat16)
    with GPU:
        model = kind(config)
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


class NoText:
    """In place of a tokenizer, where tokens are all there is."""

    eos_token_id = None


def engine_of(model: PreTrainedModel) -> TorchEngine:
    """As generate has it, but nothing ends a text early."""
    engine = TorchEngine(model, NoText())
    vars(engine)["end_ids"] = frozenset()
    return engine


@torch.inference_mode()
def agreement(model: PreTrainedModel) -> str:
    """Relative difference of the logits of a captured step to those of the model as transformers
    runs it, and how far two of its own ways are apart: random weights amplify rounding."""
    prompt = torch.randint(0, 50000, (300,), generator=torch.Generator().manual_seed(1)).tolist()

    def apart(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm() / b.norm())

    step = decode.captured(model, [prompt])
    if step is None:
        return "nothing was captured"
    step.begin([prompt], 1)
    captured = step.step(torch.tensor([7], device=GPU))[0].float().clone()
    before, found = model.config._attn_implementation, {}
    for way in ("sdpa", "eager"):
        model.set_attn_implementation(way)
        state = CacheState(model)
        state.compute(prompt)
        found[way] = state.compute([7]).float()
    model.set_attn_implementation(before)
    return (
        f"{apart(captured, found['sdpa']):.4f} from torch's attention, which is "
        f"{apart(found['eager'], found['sdpa']):.4f} from eager attention"
    )


def quantize(model: nn.Module, symmetric: bool) -> float:
    """Give every linear of a block a random 4-bit weight; seconds for laying them out."""
    took, scheme = 0.0, Scheme(symmetric=symmetric)
    for name, old in list(model.named_modules()):
        if not isinstance(old, nn.Linear) or "layers" not in name:
            continue
        out, width = old.weight.shape
        codes = torch.randint(0, 16, (out, width), dtype=torch.uint8, device=GPU)
        scale = torch.full((out, width // 128), 0.004, dtype=torch.float16, device=GPU)
        zero = None if symmetric else torch.randint(6, 10, scale.shape, device=GPU).byte()
        q = QWeight(scheme, codes, scale, zero)
        torch.cuda.synchronize()
        started = time.perf_counter()
        new = quantized_linear(q, old.bias is not None, GPU, torch.bfloat16)
        torch.cuda.synchronize()
        took += time.perf_counter() - started
        new.bias = old.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    return took


@dataclass(frozen=True)
class Speed:
    """first: seconds to the first tokens, prompt included; step: the median from there on; rate and
    whole: tokens a second of all texts, without and with the prompt."""

    first: float
    step: float
    rate: float
    whole: float

    def __str__(self) -> str:
        return (
            f"{self.rate:8.1f} tokens/s, {self.whole:8.1f} with the prompt; "
            f"prefill {self.first:.3f} s, then a step every {self.step * 1e3:.2f} ms"
        )


def measured(model: PreTrainedModel, texts: int, new: int, prompt: int = PROMPT) -> Speed:
    """Speed of the third run (the first captures, the second may have more room), each with other
    prompts."""
    engine = engine_of(model)
    size = min(50000, model.config.vocab_size)
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        prompts = torch.randint(0, size, (texts, prompt), generator=random).tolist()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        steps: Iterator[object] = (
            engine.stream(prompts[0], GREEDY, new)
            if texts == 1
            else engine.batch(prompts, [GREEDY] * texts, new)
        )
        times = [time.perf_counter() for _ in steps]
    rate = texts * (new - 1) / (times[-1] - times[0])
    step = median(b - a for a, b in pairwise(times))
    return Speed(times[0] - started, step, rate, texts * new / (times[-1] - started))


def of_all(model: PreTrainedModel, whole: Speed, layers: int, new: int) -> str:
    """What ``layers`` would take: what the half of them does not take less, is not of layers."""
    here = model.config.num_hidden_layers
    half = here // 2
    decode.release(model)
    model.base_model.layers = model.base_model.layers[:half]
    model.config.num_hidden_layers = half
    less = measured(model, 1, new)

    def longer(many: float, few: float) -> float:
        return many + (many - few) / (here - half) * (layers - here)

    first, step = longer(whole.first, less.first), longer(whole.step, less.step)
    return (
        f"extrapolated from {half} and {here} to {layers} layers, not measured: "
        f"{1 / step:.1f} tokens/s, prefill {first:.3f} s"
    )


def plainly(model: PreTrainedModel, texts: int, new: int) -> str:
    """transformers' generate as it comes."""
    model.set_attn_implementation("sdpa")
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

    steps = engine_of(model).stream(list(range(PROMPT)), GREEDY, 24)
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
    parser.add_argument("--llama", action="store_true")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--new", type=int, default=512)
    arguments = parser.parse_args()
    batches = [int(text) for text in arguments.batches.split(",")]
    make, full = (llama_of, 95) if arguments.llama else (neox_of, 36)
    layers = arguments.layers or (20 if arguments.llama else full)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    started = time.perf_counter()
    model = make(layers)
    print(f"{layers} layers made in {time.perf_counter() - started:.1f} s", flush=True)
    with torch.inference_mode():
        print("bfloat16, transformers' generate:", plainly(model, 1, 64), flush=True)
    print("bfloat16, quantkit's engine:     ", measured(model, 1, 128), flush=True)
    decode.release(model)  # it would keep the memory of the weights that go now
    took = quantize(model, symmetric=not arguments.llama)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    print(f"4 bits: laid out in {took:.1f} s, {torch.cuda.memory_allocated() / 2**30:.2f} GiB")
    with torch.inference_mode():
        print("4 bits, transformers' generate:  ", plainly(model, 1, 64), flush=True)
    for texts in batches:
        found = measured(model, texts, arguments.new)
        print(f"4 bits, quantkit's engine, batch {texts:3d}:", found, flush=True)
        if texts == 1:
            one = found
            print("  captured against plain:", agreement(model))
            kernels_of(model, layers)
    print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    if layers < full and 1 in batches:
        print("4 bits, batch 1:", of_all(model, one, full, arguments.new))


if __name__ == "__main__":
    main()
