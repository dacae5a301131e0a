"""One token after another on a CPU, for models built like Llama.

A 4-bit model of 300M parameters reads 150 MB for a token, in 8 ms; transformers' modules and its
growing cache take as long again. Here a block is 17 calls of torch instead of about 60: the linears
that share an input are one product, keys and values have their place beforehand, norms are one call
in the model's precision. Prompts go through the same code.

The weights are the model's own: where linears are joined, they become views of the joint one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from quantkit.runtime.kernels import cpu_int4
from quantkit.runtime.linear import CpuInt4Linear

_MODELS = ("llama", "mistral", "qwen2")
_ROPES = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on the text's length
_STEP = 256  # tokens by which the place for keys and values grows at least
_FEW = 16  # rows up to which joined linears are faster than each by itself

Product = Callable[[Tensor], Tensor]


def fits(model: PreTrainedModel) -> bool:
    """Whether this model is computed here."""
    config: Any = model.config
    if config.model_type not in _MODELS or model.device.type != "cpu":
        return False
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    return (
        all(kind == "full_attention" for kind in layers)
        and (window is None or window >= config.max_position_embeddings)
        and config.hidden_act in ("silu", "swish")
        and config.rope_parameters["rope_type"] in _ROPES
    )


class LlamaState:
    """``model`` with the keys and values of one text (see torch_engine.Decoder)."""

    def __init__(self, model: PreTrainedModel) -> None:
        base: Any = model.model
        config: Any = model.config
        self._embed, self._rotary = base.embed_tokens.weight, base.rotary_emb
        self._head: Any = model.lm_head
        self._norm, self._eps = base.norm.weight, config.rms_norm_eps
        self._heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads
        self._width = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._inner = config.intermediate_size
        self._blocks = [_Block(layer) for layer in base.layers]
        self._length = self._room = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def cut(self, keep: int) -> int:
        """Forget all but the first ``keep`` tokens -> how many are kept."""
        self._length = keep
        return keep

    def compute(self, ids: list[int]) -> Tensor:
        """Logits [vocab] behind ``ids`` after what is held."""
        start, stop = self._length, self._length + len(ids)
        if stop > self._room:
            self._grow(stop)
        x = functional.embedding(torch.tensor(ids), self._embed)
        cos, sin = self._cos[start:stop], self._sin[start:stop]
        mask = None
        if len(ids) > 1:
            mask = torch.ones(len(ids), stop, dtype=torch.bool).tril(start)
        shape = (self._norm.shape[0],)
        for block, keys, values in zip(self._blocks, self._keys, self._values):
            found = block.qkv(functional.rms_norm(x, shape, block.before, self._eps))
            attended = self._attend(found, cos, sin, keys, values, mask)
            x = x + block.out(attended)
            found = block.gate_up(functional.rms_norm(x, shape, block.between, self._eps))
            gate, up = found[:, : self._inner], found[:, self._inner :]
            x = x + block.down(functional.silu(gate).mul_(up))
        self._length = stop
        last = functional.rms_norm(x[-1:], shape, self._norm, self._eps)
        logits: Tensor = self._head(last)[0]
        return logits

    def _attend(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """[tokens, heads * width], and the new keys and values in their places."""
        tokens, shared = len(qkv), self._heads // self._kv_heads
        start, stop = self._length, self._length + tokens
        parts = qkv.view(tokens, -1, self._width)
        turned = parts[:, : self._heads + self._kv_heads]
        half = self._width // 2
        other = torch.cat([turned[..., half:], turned[..., :half]], -1)
        turned = (turned * cos).addcmul_(other, sin)
        keys[:, start:stop] = turned[:, self._heads :].transpose(0, 1)
        values[:, start:stop] = parts[:, self._heads + self._kv_heads :].transpose(0, 1)
        queries, k, v = turned[:, : self._heads], keys[None, :, :stop], values[None, :, :stop]
        if tokens == 1:  # the query heads of a key head are rows, and all see all
            rows = queries.view(1, self._kv_heads, shared, self._width)
            return functional.scaled_dot_product_attention(rows, k, v).view(1, -1)
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        rows = queries.transpose(0, 1)[None]
        found = functional.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
        return found[0].transpose(0, 1).reshape(tokens, -1)

    def _grow(self, tokens: int) -> None:
        """Places for so many tokens, and the angles of their positions; a half more, so that
        growing is rare."""
        room = -(-max(tokens, self._room * 3 // 2) // _STEP) * _STEP
        dtype = self._embed.dtype
        places = torch.arange(room)[None]
        cos, sin = self._rotary(torch.empty(0, dtype=dtype), places)
        half = self._width // 2
        # turning is x * cos + (x with its halves exchanged) * sin, the first half of sin negative
        self._cos = cos[0][:, None].contiguous()
        self._sin = torch.cat([-sin[0][:, :half], sin[0][:, half:]], 1)[:, None].contiguous()
        for held in (self._keys, self._values):
            old = list(held) or [torch.empty(self._kv_heads, 0, self._width)] * len(self._blocks)
            held[:] = [self._enlarged(tensor, room, dtype) for tensor in old]
        self._room = room

    def _enlarged(self, old: Tensor, room: int, dtype: torch.dtype) -> Tensor:
        new = torch.empty(self._kv_heads, room, self._width, dtype=dtype)
        new[:, : self._length] = old[:, : self._length]
        return new


class _Block:
    """The products of a decoder block, and the weights of its norms."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.between = (
            layer.input_layernorm.weight,
            layer.post_attention_layernorm.weight,
        )
        self.qkv = joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = joined([attention.o_proj])
        self.gate_up = joined([mlp.gate_proj, mlp.up_proj])
        self.down = joined([mlp.down_proj])


def joined(linears: list[Any]) -> Product:
    """The outputs of ``linears`` beside each other, for inputs [tokens, in]; as one product for few
    tokens, where they are of one kind."""

    def each(x: Tensor) -> Tensor:
        found = [linear(x) for linear in linears]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    few = _joined_int4(linears) or _joined_dense(linears)
    if few is None:
        return each
    return lambda x: few(x) if len(x) <= _FEW else each(x)


def _joined_int4(linears: list[Any]) -> Product | None:
    if not all(type(one) is CpuInt4Linear and one.order is None for one in linears):
        return None
    group = linears[0].group
    dtype = linears[0].kernel_scales.dtype
    alike = all(one.group == group and one.kernel_scales.dtype == dtype for one in linears)
    if not alike or dtype != torch.bfloat16:  # the kernel is slow in others
        return None
    packed = torch.cat([one.packed for one in linears])
    scales = torch.cat([one.kernel_scales for one in linears], 1)
    at = 0
    for one in linears:
        rows = len(one.packed)
        one.packed = packed[at : at + rows]
        at += rows
    bias = _joined_bias(linears)
    if bias is None:
        return lambda x: cpu_int4.matmul(x, packed, group, scales)
    return lambda x: cpu_int4.matmul(x, packed, group, scales).add_(bias)


def _joined_dense(linears: list[Any]) -> Product | None:
    if not all(type(one) is nn.Linear for one in linears):
        return None
    weight = torch.cat([one.weight for one in linears])
    at = 0
    for one in linears:
        rows = len(one.weight)
        one.weight = nn.Parameter(weight[at : at + rows], requires_grad=False)
        at += rows
    bias = _joined_bias(linears)
    return lambda x: functional.linear(x, weight, bias)


def _joined_bias(linears: list[Any]) -> Tensor | None:
    if all(one.bias is None for one in linears):
        return None
    dtype = next(one.bias.dtype for one in linears if one.bias is not None)
    none = [torch.zeros(one.out_features, dtype=dtype) for one in linears]
    return torch.cat([empty if one.bias is None else one.bias for one, empty in zip(linears, none)])
