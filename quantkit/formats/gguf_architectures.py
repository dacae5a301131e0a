"""What llama.cpp knows of model types: one entry of ARCHITECTURES for each.

Every entry was compared with llama.cpp (tests/test_gguf_model.py). The facts about rows and keys
are those of llama.cpp's conversion/*.py and src/models/*.cpp.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from quantkit.errors import QuantkitError

Config = Mapping[str, Any]
# A row order is one swap of two axes: the shape that the rows have before it, and the axes.
Order = tuple[tuple[int, int, int], tuple[int, int]]


@dataclass(frozen=True)
class Key:
    """A number that both sides have: ``name`` in config.json, ``key`` in the metadata, there behind
    the architecture's name. ``default`` is what a config.json without it means; None: it must be
    there."""

    name: str
    key: str
    kind: str = "u32"
    default: Any = None


@dataclass(frozen=True)
class Architecture:
    """What has to be known of a model type.

    gguf         its name in GGUF files
    keys         numbers of config.json that llama.cpp asks for
    linears      modules of a decoder block with 2-D weights, norms those with 1-D ones
    biased       modules that may have a bias
    rows         how the outputs of a module are reordered
    activation   values of ``hidden_act`` for which llama.cpp computes the same
    rotary       part of a head that rotates when config.json does not say
    partial      another part can rotate
    own_head     llama.cpp wants a head of its own, even where it is the embedding
    fixed        keys of config.json that must have these values if they are there at all, since
                 llama.cpp computes nothing else
    """

    gguf: str
    keys: tuple[Key, ...]
    linears: tuple[str, ...]
    norms: tuple[str, ...]
    activation: tuple[str, ...]
    biased: tuple[str, ...] = ()
    rows: Mapping[str, Callable[[Config], Order]] = field(default_factory=dict)
    block: str = "model.layers.{}."
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    heads: tuple[str, ...] = ("lm_head",)
    rotary: float = 1.0
    partial: bool = False
    own_head: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def modules(self, blocks: int) -> Iterator[tuple[str, str]]:
        """(full name, name inside a block or "") of every module with weights but the head."""
        yield self.embedding, ""
        yield self.norm, ""
        for block in range(blocks):
            for module in (*self.norms, *self.linears):
                yield self.block.format(block) + module, module


def heads(config: Config) -> int:
    """Attention heads of a block."""
    return count(config, "num_attention_heads")


def groups(config: Config) -> int:
    """Heads of keys and values."""
    return count(config, "num_key_value_heads", heads(config))


def head_size(config: Config) -> int:
    """Outputs of one attention head."""
    return count(config, "head_dim", count(config, "hidden_size") // heads(config))


def count(config: Config, name: str, default: int | None = None) -> int:
    """A size out of config.json. Raises QuantkitError for what is none."""
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 1 << 31:
        raise QuantkitError(f"config.json has {name} = {value!r:.40}, which is no size")
    return value


def _query(config: Config) -> Order:
    return (heads(config), 2, head_size(config) // 2), (1, 2)


def _key(config: Config) -> Order:
    return (groups(config), 2, head_size(config) // 2), (1, 2)


def _fused(config: Config) -> Order:
    return (heads(config), 3, head_size(config)), (0, 1)


_SIZES = (
    Key("max_position_embeddings", "context_length"),
    Key("hidden_size", "embedding_length"),
    Key("num_hidden_layers", "block_count"),
    Key("intermediate_size", "feed_forward_length"),
    Key("num_attention_heads", "attention.head_count"),
    Key("vocab_size", "vocab_size"),
)
_GROUPED = (*_SIZES, Key("num_key_value_heads", "attention.head_count_kv"))
_RMS = Key("rms_norm_eps", "attention.layer_norm_rms_epsilon", "f32")
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = (*_QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_PAIRED = {"self_attn.q_proj": _query, "self_attn.k_proj": _key}
_LLAMA = Architecture(
    "llama", (*_GROUPED, _RMS), _GATED, _TWO_NORMS, ("silu",), biased=_GATED, rows=_PAIRED
)
_NEOX_LINEARS = (
    "attention.query_key_value",
    "attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "gpt_neox": Architecture(
        "gptneox",
        (
            *_SIZES,
            Key("layer_norm_eps", "attention.layer_norm_epsilon", "f32", 1e-5),
            Key("use_parallel_residual", "use_parallel_residual", "bool", True),
        ),
        _NEOX_LINEARS,
        _TWO_NORMS,
        ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
        biased=(*_NEOX_LINEARS, *_TWO_NORMS, ""),
        rows={"attention.query_key_value": _fused},
        block="gpt_neox.layers.{}.",
        embedding="gpt_neox.embed_in",
        norm="gpt_neox.final_layer_norm",
        heads=("embed_out", "lm_head"),  # the second: what transformers 5 calls it in memory
        rotary=0.25,
        partial=True,
        own_head=True,
        fixed={"attention_bias": True},
    ),
    "qwen2": Architecture("qwen2", (*_GROUPED, _RMS), _GATED, _TWO_NORMS, ("silu",), biased=_QKV),
    "qwen3": Architecture(
        "qwen3",
        (*_GROUPED, _RMS),
        _GATED,
        (*_TWO_NORMS, "self_attn.q_norm", "self_attn.k_norm"),
        ("silu",),
        fixed={"attention_bias": False},
    ),
    "granite": Architecture(
        "granite",
        (
            *_GROUPED,
            _RMS,
            Key("attention_multiplier", "attention.scale", "f32", 1.0),
            Key("embedding_multiplier", "embedding_scale", "f32", 1.0),
            Key("residual_multiplier", "residual_scale", "f32", 1.0),
            Key("logits_scaling", "logit_scale", "f32", 1.0),
        ),
        _GATED,
        _TWO_NORMS,
        ("silu",),
        biased=_GATED,
        rows=_PAIRED,
    ),
    "olmo2": Architecture(
        "olmo2",
        (*_GROUPED, _RMS),
        _GATED,
        (
            "self_attn.q_norm",
            "self_attn.k_norm",
            "post_attention_layernorm",
            "post_feedforward_layernorm",
        ),
        ("silu",),
        own_head=True,
        fixed={"attention_bias": False},
    ),
    "phi3": Architecture(
        "phi3",
        (*_GROUPED, _RMS),
        ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
        _TWO_NORMS,
        ("silu",),
        partial=True,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        (*_GROUPED, Key("norm_epsilon", "attention.layer_norm_epsilon", "f32", 1e-5)),
        (*_QKV, "self_attn.o_proj", "mlp.c_fc", "mlp.c_proj"),
        _TWO_NORMS,
        ("gelu_pytorch_tanh", "gelu", "gelu_new", "gelu_fast"),
        biased=(*_QKV, "self_attn.o_proj", "mlp.c_fc", "mlp.c_proj", *_TWO_NORMS, ""),
        fixed={"use_bias": True},
    ),
}
# of several model types with one name in GGUF files the first is read
MODEL_TYPES = {architecture.gguf: kind for kind, architecture in reversed(ARCHITECTURES.items())}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}


def architecture_of(config: Config) -> Architecture:
    """The entry of a model. Raises QuantkitError when there is none."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise QuantkitError(
            f"models of the type '{kind!s:.60}' cannot be converted to or from GGUF",
            f"these can: {', '.join(ARCHITECTURES)}",
        )
    return ARCHITECTURES[kind]


def is_real(value: Any) -> bool:
    """Whether it is a number that float32 holds."""
    return isinstance(value, int | float) and abs(value) < 3e38  # false for nan


def told(metadata: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """What a GGUF file says. Raises QuantkitError when it does not, or not in this type."""
    value = metadata.get(key, default)
    if value is None:
        raise QuantkitError(f"the GGUF file has no {key}", "it may be incomplete or very old")
    if type(value) is not kind:
        raise QuantkitError(f"the GGUF file has a {key} that is no {kind.__name__}")
    return value


def short(value: float) -> float:
    """The shortest number that is ``value`` in float32: 1e-05 and not 9.999999747378752e-06."""
    wanted = torch.tensor(value)
    for digits in range(1, 18):
        found = float(f"{value:.{digits}g}")
        if torch.tensor(found) == wanted:
            return found
    return value
