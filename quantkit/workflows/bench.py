"""``quantkit bench``: how fast a model runs here, and how near that is to what the memory allows.

A token costs one pass over all weights and over the keys and values of the text. So tokens a second
times those bytes, divided by the bandwidth that a plain copy reaches, says how much there is left
to win. Prompts are random tokens, each run has other ones, and nothing ends a text early; there is
one run to warm up, and the median of the others counts.
"""

import re
import resource
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from quantkit.core.gguf_file import GgufFile
from quantkit.core.progress import Progress, Step
from quantkit.core.sampling import Sampling
from quantkit.errors import UsageError
from quantkit.runtime.engine import Engine, open_engine
from quantkit.runtime.linear import QuantLinear
from quantkit.runtime.llamacpp import LlamaCpp
from quantkit.runtime.torch_engine import TorchEngine

_EXPERTS = re.compile(r"\bexperts\b")  # in names of modules; shared ones are none of them
_COPIED = 256 << 20  # bytes, larger than caches
_GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Speed:
    """Of ``batch`` texts after a prompt of ``context`` tokens each.

    prefill, decode  tokens a second, of all texts together; the prompt, and what follows
    step_bytes       weights, keys and values that one step of decoding reads
    bandwidth        bytes a second that these come to
    """

    batch: int
    context: int
    prefill: float
    decode: float
    step_bytes: int
    bandwidth: float


@dataclass(frozen=True)
class Bench:
    """engine, device, dtype: what ran; load_seconds; peak_bytes: memory of the process, and on the
    GPU if there is one; copy_bandwidth: bytes a second, read and written; rows: the speeds."""

    model: str
    engine: str
    device: str
    dtype: str
    threads: int
    load_seconds: float
    peak_bytes: int
    copy_bandwidth: float
    rows: list[Speed]

    def described(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def bench(
    model: str,
    *,
    batch: Sequence[int] = (1,),
    context: Sequence[int] = (128, 512),
    new: int = 64,
    repeats: int = 3,
    engine: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    model_basename: str | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Measure every batch size with every length of the prompt, making ``new`` tokens each time.
    Raises UsageError for sizes that cannot be, or do not fit into the model's context."""
    progress = progress or Progress()
    if min([*batch, *context, repeats], default=0) < 1 or not batch or not context:
        raise UsageError("--batch, --context and --repeats are 1 or more")
    if new < 2:
        raise UsageError("--new must be at least 2", "the first token belongs to the prompt")
    started = perf_counter()
    loaded = open_engine(
        model,
        engine=engine,
        device=device,
        dtype=dtype,
        revision=revision,
        model_basename=model_basename,
        note=progress.note,
    )
    load_seconds = perf_counter() - started
    _check(loaded, batch, max(context) + new)
    vars(loaded)["end_ids"] = frozenset()  # random text may end anywhere
    where = loaded.model.device if isinstance(loaded, TorchEngine) else torch.device("cpu")
    rows = []
    sizes = [(texts, tokens) for texts in batch for tokens in context]
    progress.begin("speeds", len(sizes))
    try:
        for index, (texts, tokens) in enumerate(sizes, 1):
            started = perf_counter()
            row = _speed(loaded, texts, tokens, new, repeats)
            rows.append(row)
            name = f"batch {texts}, context {tokens}: {row.decode:.1f} tokens/s"
            progress.step(Step(index, len(sizes), name, None, perf_counter() - started))
    finally:
        progress.end()
    ours = isinstance(loaded, TorchEngine)
    return Bench(
        model,
        "torch" if ours else "llama.cpp",
        str(where),
        str(loaded.model.dtype).removeprefix("torch.") if isinstance(loaded, TorchEngine) else "",
        torch.get_num_threads(),
        load_seconds,
        _peak(where),  # before more is copied
        copy_bandwidth(where),
        rows,
    )


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes: the best of five."""
    source = torch.ones(_COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        _wait(device)
        started = perf_counter()
        target.copy_(source)
        _wait(device)
        best = min(best, perf_counter() - started)
    return 2 * _COPIED / best


def step_bytes(engine: Engine, batch: int, tokens: int) -> int:
    """What a step of decoding reads: every weight once, and keys and values of ``tokens`` tokens of
    every text. The embedding counts where it is the head too; else a row of it is nothing. Of
    experts count as many as ``batch`` texts go to, if all are as likely."""
    if isinstance(engine, LlamaCpp):
        return _file_bytes(engine.path) + batch * tokens * engine.token_bytes
    assert isinstance(engine, TorchEngine)
    model = engine.model
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    seen: dict[int, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and (head is None or head.weight is not module.weight):
            continue
        share = _reached(config, batch) if _EXPERTS.search(name) else 1.0
        for tensor in _read(module):
            seen[tensor.data_ptr()] = share * tensor.numel() * tensor.element_size()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    held = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    return int(sum(seen.values())) + batch * tokens * int(held)


def _reached(config: Any, texts: int) -> float:
    """The share of the experts that so many tokens go to."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next((n for name in names if (n := getattr(config, name, None))), 1)
    return float(1 - (1 - getattr(config, "num_experts_per_tok", count) / count) ** texts)


def _read(module: nn.Module) -> Iterator[torch.Tensor]:
    """The tensors that a module's product reads."""
    buffers = dict(module.named_buffers(recurse=False))
    if not isinstance(module, QuantLinear):
        yield from module.parameters(recurse=False)
        return
    names = ("packed", "kernel_scales") if "kernel_scales" in buffers else tuple(buffers)
    yield from (buffers[name] for name in names if buffers.get(name) is not None)


def _file_bytes(path: Path) -> int:
    tensors = GgufFile(path).tensors
    skipped = "token_embd.weight" if "output.weight" in tensors else ""
    return sum(t.rows * t.row_bytes for name, t in tensors.items() if name != skipped)


def _check(engine: Engine, batch: Sequence[int], tokens: int) -> None:
    if tokens > engine.context:
        raise UsageError(
            f"{tokens} tokens do not fit into the context of {engine.context}",
            "choose a smaller --context or --new",
        )
    if max(batch) > 1 and not isinstance(engine, TorchEngine):
        raise UsageError(
            "quantkit runs llama.cpp with one text at a time", "use --batch 1, or --engine torch"
        )


def _speed(engine: Engine, batch: int, context: int, new: int, repeats: int) -> Speed:
    runs = [_run(engine, batch, context, new, seed) for seed in range(repeats + 1)][1:]
    prefill = batch * context / statistics.median(first for first, _ in runs)
    step = statistics.median(rest for _, rest in runs) / (new - 1)
    read = step_bytes(engine, batch, context + new // 2)
    return Speed(batch, context, prefill, batch / step, read, read / step)


def _run(engine: Engine, batch: int, context: int, new: int, seed: int) -> tuple[float, float]:
    """Seconds to the first tokens, and from there to the last ones."""
    random = torch.Generator().manual_seed(1000 * context + seed)
    most = len(engine.tokenizer) if isinstance(engine, TorchEngine) else _vocabulary(engine)
    prompts = torch.randint(most, (batch, context), generator=random).tolist()
    steps: Iterator[object]
    started = perf_counter()
    if batch == 1:
        steps = engine.stream(prompts[0], _GREEDY, new)
    else:
        assert isinstance(engine, TorchEngine)
        steps = engine.batch(prompts, [_GREEDY] * batch, new)
    next(steps)
    first = perf_counter()
    for _ in steps:
        pass
    return first - started, perf_counter() - first


def _vocabulary(engine: Engine) -> int:
    assert isinstance(engine, LlamaCpp)
    return engine.vocabulary


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> int:
    """Most bytes that this process had in memory, and on the GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return host + (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)
