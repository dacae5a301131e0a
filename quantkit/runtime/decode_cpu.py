"""One token after another on a CPU, for models built like Llama.

A 4-bit model of 300M parameters reads 190 MB for a token, in 5 ms; transformers' modules and its
growing cache take as long again, and more. Here a single token is one compiled function
(kernels/cpu_token.py) where numba is installed. Prompts, and single tokens without numba, are 17
calls of torch a block instead of about 60: the linears that share an input are one product, keys
and values have their place beforehand, norms are one call in the model's precision.
"""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from quantkit.runtime import token_loop
from quantkit.runtime.joined import Joined
from quantkit.runtime.token_loop import TokenLoop

_MODELS = ("llama", "mistral", "qwen2")
_ROPES = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on the text's length
_STEP = 256  # tokens by which the place for keys and values grows at least


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
        and config.rope_parameters.get("partial_rotary_factor", 1) == 1
        and _theirs(type(model))
        and not any(map(_changed, model.modules()))
    )


def _changed(module: nn.Module) -> bool:
    """Whether somebody hooked in on what it computes. transformers' own hooks only look on."""
    hooks = chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
    return "forward" in vars(module) or not all(map(_theirs, hooks))


def _theirs(code: Any) -> bool:
    """Whether a class or function is transformers' own."""
    return str(code.__module__).startswith("transformers.")


class LlamaState:
    """``model`` with the keys and values of one text (see torch_engine.Decoder)."""

    def __init__(self, model: PreTrainedModel) -> None:
        base: Any = model.model
        config: Any = model.config
        self._embed, self._rotary = base.embed_tokens.weight, base.rotary_emb
        self._head = Joined([model.lm_head])
        self._norm, self._eps = base.norm.weight, config.rms_norm_eps
        self._heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads
        self._width = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._inner = config.intermediate_size
        self._blocks = [_Block(layer) for layer in base.layers]
        self._length = self._room = 0
        shape = (len(self._blocks), self._kv_heads, 0, self._width)
        self._keys = self._values = torch.empty(shape, dtype=self._embed.dtype)
        self._loop = self._compiled()

    def _compiled(self) -> TokenLoop | None:
        """What computes single tokens, where it can."""
        joined = [*(one for block in self._blocks for one in block.linears), self._head]
        linears = [one.one for one in joined if one.one is not None]
        whole = len(linears) == len(joined) and token_loop.fits(linears, self._embed.dtype)
        if token_loop.why_not() or not whole:
            return None
        norms = [norm for block in self._blocks for norm in (block.before, block.between)]
        heads = self._heads, self._kv_heads, self._width
        return TokenLoop(linears, [*norms, self._norm], heads, self._eps)

    def cut(self, keep: int) -> int:
        """Forget all but the first ``keep`` tokens -> how many are kept."""
        self._length = keep
        return keep

    def compute(self, ids: list[int]) -> Tensor:
        """Logits [vocab] behind ``ids`` after what is held."""
        start, stop = self._length, self._length + len(ids)
        if stop > self._room:
            self._grow(stop)
        if self._loop is not None and len(ids) == 1:
            logits = self._loop.compute(self._embed[ids[0]], start)
        else:
            logits = self._calls(ids, start, stop)
        self._length = stop
        return logits

    def _calls(self, ids: list[int], start: int, stop: int) -> Tensor:
        """The same by calls of torch."""
        x = functional.embedding(torch.tensor(ids), self._embed)
        cos, sin = (angles[start:stop, None].to(x.dtype) for angles in (self._cos, self._sin))
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
        last = functional.rms_norm(x[-1:], shape, self._norm, self._eps)
        return self._head(last)[0]

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
            if shared == 1 and rows.dtype == torch.bfloat16:
                # of single rows torch makes a product for each head, which takes four times as long
                rows, k, v = rows.float(), k.float(), v.float()
            found = functional.scaled_dot_product_attention(rows, k, v)
            return found.to(qkv.dtype).view(1, -1)
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        rows = queries.transpose(0, 1)[None]
        found = functional.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
        return found[0].transpose(0, 1).reshape(tokens, -1)

    def _grow(self, tokens: int) -> None:
        """Places for so many tokens, and the angles of their positions; a half more, so that
        growing is rare."""
        room = -(-max(tokens, self._room * 3 // 2) // _STEP) * _STEP
        cos, sin = self._rotary(torch.empty(0), torch.arange(room)[None])
        half = self._width // 2
        # turning is x * cos + (x with its halves exchanged) * sin, the first half of sin negative
        self._cos = cos[0].contiguous()
        self._sin = torch.cat([-sin[0][:, :half], sin[0][:, half:]], 1)
        self._keys, self._values = (self._enlarged(old, room) for old in (self._keys, self._values))
        if self._loop is not None:
            self._loop.hold(self._keys, self._values, self._cos, self._sin)
        self._room = room  # last: what is interrupted is done again

    def _enlarged(self, old: Tensor, room: int) -> Tensor:
        new = old.new_empty(*old.shape[:2], room, self._width)
        new[:, :, : self._length] = old[:, :, : self._length]
        return new


class _Block:
    """The products of a decoder block, and the weights of its norms."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.between = (
            layer.input_layernorm.weight,
            layer.post_attention_layernorm.weight,
        )
        self.qkv = Joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = Joined([attention.o_proj])
        self.gate_up = Joined([mlp.gate_proj, mlp.up_proj])
        self.down = Joined([mlp.down_proj])
        self.linears = (self.qkv, self.out, self.gate_up, self.down)
