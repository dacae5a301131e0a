"""Where a block lets inputs of linears be scaled: by s at the linears, by 1/s where they come from.

    Fold    the output of ``producer`` is the input of ``consumers``, but for a reordering

Producers are norms, which are discovered (whatever module with a weight per feature has exactly the
tensor that a group of linears reads), and linears, whose pairs are facts about architectures and
stand in PAIRS. Neither is believed: folding random factors must leave the block's output as it was,
in float32 (:func:`holds`). That also tells norms that multiply by 1 + weight from those that
multiply by weight, an activation that is not homogeneous from one that is, and a norm whose
output goes anywhere else.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantkit.runtime.block import Block, InputGroup, features, is_linear

Layout = Literal["heads", "interleaved", "stacked", "second"]
TOLERANCE = 1e-5
_PROBE_TOKENS = 32
# (producer, consumer, where the producer's outputs are that the consumer reads), names inside of
# one module of the block. An architecture is in here when its block has modules of these names.
#
#   heads        all of them; with grouped queries a head may be read several times
#   interleaved  the last head of each group in a fused [groups, queries + key + value]
#   stacked      the last ones of a fused [queries, keys, values]
#   second       the second half of a fused [gate, up]
PAIRS: tuple[tuple[str, str, Layout], ...] = (
    ("v_proj", "o_proj", "heads"),  # Llama, Mistral, Qwen, Gemma, Cohere, StarCoder2
    ("v_proj", "out_proj", "heads"),  # OPT, GPT-J
    ("v_proj", "dense", "heads"),  # Phi
    ("query_key_value", "dense", "interleaved"),  # GPT-NeoX, BLOOM, Falcon
    ("query_key_value", "dense", "stacked"),
    ("qkv_proj", "o_proj", "stacked"),  # Phi-3
    ("c_attn", "c_proj", "stacked"),  # GPT-2
    ("up_proj", "down_proj", "heads"),  # a gate times up: Llama and all like it
    ("gate_up_proj", "down_proj", "second"),  # Phi-3
    ("fc1", "fc2", "heads"),  # through a ReLU (OPT); a GELU (Phi) is found not to hold
)


@dataclass(frozen=True)
class Fold:
    """A pair that can be scaled.

    producer   a norm or a linear inside the block
    consumers  the linears that read its output
    source     int64 [in]: which output of the producer each of their inputs is
    offset     what a norm adds to its weight before it multiplies (Gemma: 1); None for a linear
    """

    producer: str
    consumers: tuple[str, ...]
    source: Tensor
    offset: float | None = None

    @property
    def label(self) -> str:
        """``input_layernorm -> q_proj, k_proj, v_proj``"""
        leaves = [name.rpartition(".")[2] for name in self.consumers]
        return f"{self.producer.rpartition('.')[2]} -> {', '.join(leaves)}"

    def per_output(self, scale: Tensor, count: int) -> Tensor:
        """``scale`` [in] of the consumers' inputs as one of the producer's outputs [count]: 1 where
        nobody reads."""
        return torch.ones(count).to(scale).index_copy(0, self.source, scale)


def find(block: Block, groups: list[InputGroup], sample: Tensor) -> list[Fold]:
    """Every pair of the block that holds. ``sample`` is any hidden state."""
    piece = sample[:1, :_PROBE_TOKENS]
    exact = block.exact()
    wanted = exact.forward(piece.float())
    found = []
    for group in groups:
        if group.routed:  # another router's choice must not be among what is tried
            continue
        candidates = [*_norms(block, group, piece), *_linears(block, group)]
        fold = next((f for f in candidates if holds(exact, f, piece, wanted)), None)
        if fold is not None:
            found.append(fold)
    return found


def holds(exact: Block, fold: Fold, piece: Tensor, wanted: Tensor) -> bool:
    """Whether folding random factors leaves the output of the float32 block as it was."""
    count = _outputs(exact.linear(fold.producer))
    generator = torch.Generator().manual_seed(0)
    factors = torch.rand(count, generator=generator).add_(0.5).to(wanted.device)
    scale = factors[fold.source]
    shared = fold.per_output(scale, count)
    with exact.restoring():
        producer = exact.linear(fold.producer)
        for name, value in producer.named_parameters(recurse=False):
            offset = (fold.offset or 0.0) if name == "weight" else 0.0
            _set(producer, name, _along_outputs(producer, value + offset, 1 / shared) - offset)
        for name in fold.consumers:
            consumer = exact.linear(name)
            weight: Any = consumer.weight
            columns = scale[:, None] if isinstance(consumer, Conv1D) else scale
            _set(consumer, "weight", weight * columns)
        output = exact.forward(piece.float())
    return bool((output - wanted).norm() <= TOLERANCE * wanted.norm())


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    setattr(module, name, nn.Parameter(value, requires_grad=False))


def _along_outputs(module: nn.Module, value: Tensor, factors: Tensor) -> Tensor:
    """A parameter of a module times factors of its outputs."""
    return value * (
        factors[:, None] if isinstance(module, nn.Linear) and value.dim() == 2 else factors
    )


def _outputs(module: nn.Module) -> int:
    if is_linear(module):
        return features(module)[0]
    weight: Any = module.weight
    return int(weight.numel())


def _norms(block: Block, group: InputGroup, piece: Tensor) -> Iterator[Fold]:
    """The module, with one weight a feature, whose output is what the group reads."""
    norms = {
        name: module
        for name, module in block.module.named_modules()
        if not is_linear(module)
        and isinstance(getattr(module, "weight", None), nn.Parameter)
        and module.weight.shape == (group.width,)
    }
    outputs: dict[str, Tensor] = {}
    inputs: list[Tensor] = []
    with (
        block.watching({n: lambda x, y, n=n: outputs.update({n: y}) for n in norms}, outputs=True),
        block.watching({group.names[0]: inputs.append}),
    ):
        block.forward(piece)
    source = torch.arange(group.width, device=piece.device)
    for name, y in outputs.items():
        if isinstance(y, Tensor) and y.data_ptr() == inputs[0].data_ptr():
            fold = Fold(name, group.names, source, 0.0)
            yield fold
            yield replace(fold, offset=1.0)


def _linears(block: Block, group: InputGroup) -> Iterator[Fold]:
    """What PAIRS says of the group."""
    if len(group.names) != 1:
        return
    parent, _, leaf = group.names[0].rpartition(".")
    for before, after, layout in PAIRS:
        producer = f"{parent}.{before}" if parent else before
        if leaf != after or producer not in dict(block.module.named_modules()):
            continue
        out = features(block.linear(producer))[0]
        source = _source(layout, out, group.width, _head(block))
        if source is not None:
            device = next(block.module.parameters()).device
            yield Fold(producer, group.names, source.to(device))


def _head(block: Block) -> int | None:
    """Features of an attention head, by the names that transformers' modules have for it."""
    for module in block.module.modules():
        for name in ("head_dim", "head_size"):
            if isinstance(size := getattr(module, name, None), int):
                return size
    return None


def _source(layout: Layout, out: int, width: int, head: int | None) -> Tensor | None:
    """Which of ``out`` outputs each of ``width`` inputs is; None when shapes do not allow it."""
    if layout == "second":
        return torch.arange(width) + width if out == 2 * width else None
    if layout == "heads" and out == width:
        return torch.arange(width)
    if head is None or width % head or out % head:
        return None
    queries = width // head
    values = out // head if layout == "heads" else (out // head - queries) // 2
    if values < 1 or queries % values:
        return None
    each = queries // values
    value = torch.arange(queries) // each
    if layout == "heads":
        first = value
    elif layout == "stacked":
        first = queries + values + value
    else:
        first = value * (each + 2) + each + 1
    return (first[:, None] * head + torch.arange(head)).reshape(-1)
