"""Rotary embeddings in GGUF files: config.json's many spellings, metadata, a tensor of factors."""

from collections.abc import Mapping
from math import pi
from typing import Any

import torch
from torch import Tensor

from quantkit.core.gguf_values import Value, f32, string, u32
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_architectures import (
    ARCHITECTURES,
    Config,
    architecture_of,
    count,
    head_size,
    is_real,
    short,
    told,
)

ROPE_FACTORS = "rope_freqs.weight"


def rotary(config: Config) -> dict[str, Any]:
    """The rotary embedding in the keys of transformers 5, whatever the age of config.json."""
    found: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(name), Mapping):
            found |= config[name]
    found.setdefault("rope_type", found.pop("type", "default"))
    found.setdefault("rope_theta", config.get("rope_theta", config.get("rotary_emb_base", 1e4)))
    part = config.get("partial_rotary_factor", config.get("rotary_pct"))
    found.setdefault(
        "partial_rotary_factor", architecture_of(config).rotary if part is None else part
    )
    return found


def _of_rope(rope: Mapping[str, Any], name: str) -> float:
    if not is_real(rope.get(name)):
        raise QuantkitError(f"the rotary embedding of this model has no {name}")
    return float(rope[name])


def rope_metadata(config: Config) -> dict[str, Value]:
    """The file's keys, without the architecture's name in front. Raises QuantkitError for what
    llama.cpp does not compute."""
    rope = rotary(config)
    found = {
        "rope.dimension_count": u32(
            int(head_size(config) * _of_rope(rope, "partial_rotary_factor"))
        ),
        "rope.freq_base": f32(_of_rope(rope, "rope_theta")),
    }
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        found["rope.scaling.type"] = string(kind)
        found["rope.scaling.factor"] = f32(_of_rope(rope, "factor"))
    if kind == "yarn":
        length = count(config, "max_position_embeddings")
        length = count(rope, "original_max_position_embeddings", length)
        found["rope.scaling.original_context_length"] = u32(length)
        for name, only in _YARN.items():
            if rope.get(name) not in (None, only):
                raise QuantkitError(f"llama.cpp has no yarn with {name} = {rope[name]!r:.40}")
    return found


# parameters of yarn that most of llama.cpp's models do not read from the file, and what they are
_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "truncate": True,
}


def extra_tensors(config: Config) -> dict[str, Tensor]:
    """Tensors of the file that no checkpoint holds: by how much Llama 3.1 slows each frequency."""
    rope = rotary(config)
    if rope["rope_type"] != "llama3":
        return {}
    return {
        ROPE_FACTORS: _slowing(
            head_size(config),
            _of_rope(rope, "rope_theta"),
            _of_rope(rope, "factor"),
            _of_rope(rope, "low_freq_factor"),
            _of_rope(rope, "high_freq_factor"),
            _of_rope(rope, "original_max_position_embeddings"),
        )
    }


def _slowing(
    size: int, theta: float, factor: float, low: float, high: float, length: float
) -> Tensor:
    """Long waves are stretched by ``factor``, short ones not at all, those between smoothly."""
    frequencies = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = length * frequencies / (2 * pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def rope_of(metadata: Mapping[str, Any], name: str, config: Config) -> dict[str, Any]:
    """``rope_parameters`` from a file's metadata and what ``config`` has so far; ``name`` is the
    architecture's. Raises QuantkitError for what transformers does not compute."""
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": short(told(metadata, f"{name}.rope.freq_base", float, 1e4)),
    }
    size = config["head_dim"]
    turning = told(metadata, f"{name}.rope.dimension_count", int, size)
    if ARCHITECTURES[config["model_type"]].partial:
        rope["partial_rotary_factor"] = turning / size
    elif turning != size:
        raise QuantkitError(f"GGUF files of {name} that rotate a part of a head are not read")
    scaling = f"{name}.rope.scaling"
    kind = told(metadata, f"{scaling}.type", str, "none")
    if kind not in ("none", "linear", "yarn"):
        raise QuantkitError(f"rotary embeddings of the type {kind!r:.40} are not read from GGUF")
    if kind != "none":
        rope["rope_type"] = kind
        rope["factor"] = short(told(metadata, f"{scaling}.factor", float))
    if kind == "yarn":
        length = told(metadata, f"{scaling}.original_context_length", int)
        rope["original_max_position_embeddings"] = length
    return rope


def with_factors(config: Config, factors: Tensor) -> dict[str, Any]:
    """``config`` with the parameters of Llama 3.1 that give these values of ROPE_FACTORS. The file
    has the result only, so they are searched among the ones in use. Raises QuantkitError when none
    of them fit."""
    rope = dict(config["rope_parameters"])
    factor = short(float(factors.max()))
    for power in range(10, 21):
        found = {
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1 << power,
        }
        values = _slowing(2 * len(factors), rope["rope_theta"], *found.values())
        if torch.allclose(values, factors, rtol=1e-4):
            return {**config, "rope_parameters": {**rope, **found, "rope_type": "llama3"}}
    raise QuantkitError(
        f"the tensor {ROPE_FACTORS} does not come from parameters that transformers has"
    )
