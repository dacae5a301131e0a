"""Tiny random models for the tests: a folder each, as ``save_pretrained`` writes it.

Every parameter is random, biases and norms too, so that a tensor that was not loaded, or loaded
into the wrong place, shows in the numbers.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quantkit import data
from quantkit.core.checkpoint import Checkpoint
from quantkit.core.source import Source
from quantkit.runtime.skeleton import Skeleton

WIDTH, INNER, HEADS, LAYERS, VOCABULARY = 64, 128, 4, 2, 256
DEMO_VOCABULARY = 8192
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Architecture:
    """A model type, its configuration, and what the walk should find out about a block.

    groups   the linears that share an input, in the order of their calls
    writers  those that add to the residual stream
    closes   those whose output comes out of the block as it went in
    tied     the head is the embedding
    stays    writers whose module returns more than what they put out: attention scores, or a sum
    """

    model_type: str
    config: dict[str, Any]
    groups: list[tuple[str, ...]]
    writers: tuple[str, ...]
    closes: tuple[str, ...]
    layers: int = LAYERS
    tied: bool = False
    stays: tuple[str, ...] = ()

    @property
    def leaving(self) -> tuple[str, ...]:
        """Writers whose outputs a module of the block returns as they are, and whose inputs do not
        come from other writers: the first, or all of those that are parallel."""
        first = self.writers if self.closes == self.writers else self.writers[:1]
        return tuple(name for name in first if name not in self.stays)


_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 16}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = [_QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
_GATED_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
_NEOX = [
    ("attention.query_key_value",),
    ("attention.dense",),
    ("mlp.dense_h_to_4h",),
    ("mlp.dense_4h_to_h",),
]
_FUSED = [
    ("self_attention.query_key_value",),
    ("self_attention.dense",),
    ("mlp.dense_h_to_4h",),
    ("mlp.dense_4h_to_h",),
]


def _gated(
    model_type: str, closes: bool = True, stays: tuple[str, ...] = (), **changes: Any
) -> Architecture:
    """An architecture with Llama's linears; ``closes`` unless its residual is more than a sum."""
    layers = changes.pop("layers", LAYERS)
    return Architecture(
        model_type,
        {**_GROUPED, "tie_word_embeddings": False, **changes},
        _GATED,
        _GATED_WRITERS,
        ("mlp.down_proj",) if closes else (),
        layers,
        changes.get("tie_word_embeddings", False),
        stays,
    )


def _experts(model_type: str, names: tuple[str, str, str], **changes: Any) -> Architecture:
    """An architecture with four experts, two for a token; ``names``: gate, up and down."""
    groups = [_QKV, ("self_attn.o_proj",)]
    for number in range(4):
        gate, up, down = (f"mlp.experts.{number}.{name}" for name in names)
        groups += [(gate, up), (down,)]
    sizes = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
    return Architecture(
        model_type, {**_GROUPED, **sizes, **changes}, groups, ("self_attn.o_proj",), ()
    )


ARCHITECTURES = {
    "gpt_neox": Architecture(
        "gpt_neox",
        {**_SIZES, "use_parallel_residual": True, "tie_word_embeddings": False},
        _NEOX,
        ("attention.dense", "mlp.dense_4h_to_h"),
        ("attention.dense", "mlp.dense_4h_to_h"),
    ),
    "gpt_neox_sequential": Architecture(
        "gpt_neox",
        {**_SIZES, "use_parallel_residual": False, "tie_word_embeddings": False},
        _NEOX,
        ("attention.dense", "mlp.dense_4h_to_h"),
        ("mlp.dense_4h_to_h",),
    ),
    "starcoder2": Architecture(
        "starcoder2",
        {**_GROUPED, "sliding_window": None, "tie_word_embeddings": True},
        [_QKV, ("self_attn.o_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
        ("self_attn.o_proj", "mlp.c_proj"),
        ("mlp.c_proj",),
        tied=True,
    ),
    "llama": _gated("llama", layers=3),
    "llama_tied": _gated("llama", tie_word_embeddings=True),
    "mistral": _gated("mistral", sliding_window=8),
    "qwen2": _gated("qwen2"),
    "qwen3": _gated("qwen3"),
    "gemma": _gated("gemma", tie_word_embeddings=True),
    "gemma2": _gated(
        "gemma2",
        closes=False,
        stays=("self_attn.o_proj",),
        sliding_window=8,
        tie_word_embeddings=True,
    ),
    "gemma3_text": _gated(
        "gemma3_text",
        closes=False,
        layers=3,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        tie_word_embeddings=True,
    ),
    "olmo2": _gated("olmo2", closes=False),
    "granite": _gated("granite", closes=False, residual_multiplier=0.5, logits_scaling=2.0),
    "cohere": Architecture(
        "cohere",
        {**_GROUPED, "tie_word_embeddings": True},
        [(*_QKV, "mlp.gate_proj", "mlp.up_proj"), ("self_attn.o_proj",), ("mlp.down_proj",)],
        _GATED_WRITERS,
        _GATED_WRITERS,
        tied=True,
    ),
    "phi": Architecture(
        "phi",
        {**_SIZES, "tie_word_embeddings": False},
        [(*_QKV, "mlp.fc1"), ("self_attn.dense",), ("mlp.fc2",)],
        ("self_attn.dense", "mlp.fc2"),
        ("self_attn.dense", "mlp.fc2"),
    ),
    "phi3": Architecture(
        "phi3",
        {**_SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False, "pad_token_id": 0},
        [
            ("self_attn.qkv_proj",),
            ("self_attn.o_proj",),
            ("mlp.gate_up_proj",),
            ("mlp.down_proj",),
        ],
        _GATED_WRITERS,
        ("mlp.down_proj",),
    ),
    "mixtral": _experts("mixtral", ("w1", "w3", "w2"), num_local_experts=4),
    "qwen3_moe": _experts(
        "qwen3_moe",
        ("gate_proj", "up_proj", "down_proj"),
        num_experts=4,
        moe_intermediate_size=INNER,
    ),
    "gpt2": Architecture(
        "gpt2",
        {"n_embd": WIDTH, "n_head": HEADS, "n_positions": 64},
        [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
        ("attn.c_proj", "mlp.c_proj"),
        ("mlp.c_proj",),
        tied=True,
    ),
    "gptj": Architecture(
        "gptj",
        {"n_embd": WIDTH, "n_head": HEADS, "n_positions": 64, "rotary_dim": 8},
        [
            ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"),
            ("attn.out_proj",),
            ("mlp.fc_out",),
        ],
        ("attn.out_proj", "mlp.fc_out"),
        ("attn.out_proj", "mlp.fc_out"),
        stays=("attn.out_proj",),
    ),
    "opt": Architecture(
        "opt",
        {
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "ffn_dim": INNER,
            "num_attention_heads": HEADS,
            "max_position_embeddings": 64,
        },
        [_QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)],
        ("self_attn.out_proj", "fc2"),
        ("fc2",),
        tied=True,
    ),
    "falcon": Architecture(
        "falcon",
        {"hidden_size": WIDTH, "num_attention_heads": HEADS, "tie_word_embeddings": True},
        [
            ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
            ("self_attention.dense",),
            ("mlp.dense_4h_to_h",),
        ],
        ("self_attention.dense", "mlp.dense_4h_to_h"),
        ("self_attention.dense", "mlp.dense_4h_to_h"),
        tied=True,
    ),
    "falcon_new": Architecture(
        "falcon",
        {
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "tie_word_embeddings": True,
        },
        _FUSED,
        ("self_attention.dense", "mlp.dense_4h_to_h"),
        ("self_attention.dense", "mlp.dense_4h_to_h"),
        tied=True,
    ),
    "bloom": Architecture(
        "bloom",
        {"hidden_size": WIDTH, "n_head": HEADS},
        _FUSED,
        ("self_attention.dense", "mlp.dense_4h_to_h"),
        ("mlp.dense_4h_to_h",),
        tied=True,
        stays=("self_attention.dense",),
    ),
}


def build(
    name: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = False,
    shard: str = "1GB",
    **changes: Any,
) -> Path:
    """Write the architecture's model to ``folder``; ``changes`` go into its configuration. With
    ``tokenizer`` it takes the demo's tokens and has the demo's tokenizer beside it."""
    architecture = ARCHITECTURES[name]
    config = AutoConfig.for_model(
        architecture.model_type,
        **{
            "num_hidden_layers": architecture.layers,
            "vocab_size": DEMO_VOCABULARY if tokenizer else VOCABULARY,
            **architecture.config,
            **changes,
        },
    )
    return save(AutoModelForCausalLM.from_config(config), folder, dtype, tokenizer, shard)


def save(
    model: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = False,
    shard: str = "1GB",
) -> Path:
    """Give the model random weights and write it."""
    randomize(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    if tokenizer:
        for file in _TOKENIZER:
            shutil.copy(data.demo() / file, folder)
    return folder


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights that keep activations near one, biases and norms that are neither zero nor one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            parameter.add_(noise, alpha=0.1)
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def skeleton(folder: Path, dtype: torch.dtype = torch.float32) -> Skeleton:
    return Skeleton(Source(folder.name, folder), Checkpoint(folder), torch.device("cpu"), dtype)


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as transformers itself loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def batches(vocabulary: int = VOCABULARY, seed: int = 1) -> list[torch.Tensor]:
    """Token ids of several shapes, one of them twice with other tokens."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 9), (1, 40), (3, 17), (2, 9)]
    return [torch.randint(0, vocabulary, shape, generator=generator) for shape in shapes]
