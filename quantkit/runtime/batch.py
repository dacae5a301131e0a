"""Several texts that grow together, one token each per step; texts join and leave between steps.

    batch = Batch(model)
    batch.begin([[5, 7, 9], [4]])         prompts of any lengths
    while (logits := batch.read(512)) is None: ...     in pieces: others need not wait for all
    logits = batch.step([12, 31])         float [rows, vocab]: what follows these tokens
    batch.join(other)                     the rows of another batch, below its own
    batch.keep([0, 2])                    the other rows are gone, and their memory

All rows end in the same column, and what is left of a shorter one is masked: the layout in which
every transformers model takes a batch to generate from, whether it tells positions by rotation, by
table or by slopes (ALiBi). Where a row starts changes nothing, so moving rows to other columns is
all that joining takes.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from quantkit.errors import QuantkitError

_AHEAD = 128  # columns that are allocated before they are needed


class _Room(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer [rows, heads, columns, width], in tensors with free columns
    behind: a step writes its column and copies no other."""

    is_initialized: bool

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device = keys.dtype, keys.device
            self.keys, self.values = keys[..., :0, :], values[..., :0, :]
            self.held = (self.keys, self.values)
            self.is_initialized = True
        start = self.keys.shape[-2]
        stop = start + keys.shape[-2]
        if stop > self.held[0].shape[-2]:
            self.held = (_wider(self.keys, stop + _AHEAD), _wider(self.values, stop + _AHEAD))
        for held, new in zip(self.held, (keys, values)):
            held[..., start:stop, :] = new
        self._show(stop)
        return self.keys, self.values

    def rearrange(self, rows: Tensor, first: int) -> None:
        """Only these rows, from the column ``first`` on."""
        self._hold([t[rows, :, first:] for t in (self.keys, self.values)])

    def join(self, other: "_Room") -> None:
        """The rows of ``other`` below, all ending in the same column."""
        pairs = ((self.keys, other.keys), (self.values, other.values))
        self._hold([_stacked(*pair) for pair in pairs])

    def _hold(self, tensors: list[Tensor]) -> None:
        columns = tensors[0].shape[-2]
        self.held = (tensors[0], tensors[1])
        self._show(columns)

    def _show(self, columns: int) -> None:
        self.keys, self.values = (t[..., :columns, :] for t in self.held)


class Batch:
    """Rows of ``model`` that run together; see the module. Not for models whose memory is more than
    keys and values (state spaces, linear attention): :func:`refuse_state`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._cache = Cache(layer_class_to_replicate=_Room)
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=model.device)
        self._prompt = self._mask  # left-padded ids that are still to be read
        known = inspect.signature(model.forward).parameters
        self._positions = "position_ids" in known
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    @property
    def rows(self) -> int:
        return self._mask.shape[0]

    @property
    def columns(self) -> int:
        """Tokens of the longest row."""
        return self._mask.shape[1]

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Start with these prompts, none of them empty; nothing is computed yet."""
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(ids)) + list(ids) for ids in prompts]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        device = self.model.device
        self._prompt = torch.tensor(padded, device=device)
        self._mask = torch.tensor(mask, device=device)

    def read(self, tokens: int) -> Tensor | None:
        """Run the next ``tokens`` columns of the prompts: logits [rows, vocab] behind their end, or
        None while there is more to read."""
        part, self._prompt = self._prompt[:, :tokens], self._prompt[:, tokens:]
        logits = self._run(part, self.columns - self._prompt.shape[1])
        return None if self._prompt.shape[1] else logits

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Put one token [rows] behind every row -> logits [rows, vocab]."""
        column = self._mask.new_ones(self.rows, 1)
        self._mask = torch.cat([self._mask, column], 1)
        return self._run(torch.tensor(tokens, device=self._mask.device)[:, None], self.columns)

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows stay, in this order."""
        index = torch.tensor(rows, dtype=torch.long, device=self._mask.device)
        mask = self._mask[index]
        used = mask.any(0).nonzero()
        first = int(used[0]) if len(used) else self.columns
        self._mask = mask[:, first:]
        for layer in self._cache.layers:
            layer.rearrange(index, first)

    def join(self, other: "Batch") -> None:
        """The rows of ``other``, whose prompts were read, come below these."""
        if not self.rows:
            self._cache, self._mask = other._cache, other._mask
            return
        self._mask = _stacked(self._mask[:, None, :, None], other._mask[:, None, :, None])[
            :, 0, :, 0
        ]
        for layer, others in zip(self._cache.layers, other._cache.layers):
            layer.join(others)

    @torch.inference_mode()
    def _run(self, ids: Tensor, columns: int) -> Tensor:
        mask = self._mask[:, :columns]
        settings: dict[str, Any] = dict(self._last_only)
        if self._positions:
            settings["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self.model(
            ids, attention_mask=mask, past_key_values=self._cache, use_cache=True, **settings
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def has_state(model: PreTrainedModel) -> bool:
    """Whether a model remembers in another way than by keys and values that it is given."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return True
    layers = DynamicCache(config=model.config).layers
    return any(type(one) not in (DynamicLayer, DynamicSlidingWindowLayer) for one in layers)


def refuse_state(model: PreTrainedModel) -> None:
    """Raises QuantkitError for a model that has a state."""
    if has_state(model):
        raise QuantkitError(
            f"{model.config.model_type} keeps a state that texts cannot share a batch with",
            "generate takes one text at a time; serve it with --engine vllm",
        )


def bytes_per_token(model: PreTrainedModel) -> int:
    """Memory for the keys and values of one token, in bytes; measured with a token."""
    batch = Batch(model)
    batch.begin([[0]])
    batch.read(1)
    held = [t for layer in batch._cache.layers for t in (layer.keys, layer.values)]
    return sum(t[0, :, :1].numel() * t.element_size() for t in held)


def _wider(tensor: Tensor, columns: int) -> Tensor:
    """A copy with room for ``columns``."""
    rows, heads, used, width = tensor.shape
    wide = tensor.new_empty(rows, heads, columns, width)
    wide[..., :used, :] = tensor
    return wide


def _stacked(one: Tensor, other: Tensor) -> Tensor:
    """Rows of [rows, heads, columns, width] below each other, aligned at the last column; zeros
    where there is nothing (masked, but no NaN may lie there)."""
    columns = max(one.shape[-2], other.shape[-2])
    rows, heads, _, width = one.shape
    whole = one.new_zeros(rows + other.shape[0], heads, columns, width)
    whole[:rows, :, columns - one.shape[-2] :] = one
    whole[rows:, :, columns - other.shape[-2] :] = other
    return whole
