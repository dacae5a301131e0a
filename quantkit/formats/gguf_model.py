"""Decoder models the way llama.cpp wants them: names of tensors, order of rows, metadata.

A checkpoint of transformers and a GGUF file hold the same numbers under other names, and two kinds
of weights have their outputs in another order. Both ways are only moves of whole rows, so they are
done on codes as well as on floating point:

    q_proj, k_proj of a Llama: the rows of a head that rotate together are a pair
    (one head of 8 outputs)
    transformers   0 1 2 3 4 5 6 7        row i with row i + 4
    GGUF           0 4 1 5 2 6 3 7        row 2i with row 2i + 1

    query_key_value of GPT-NeoX: a part per head (two heads; each letter is a head's rows)
    transformers   q0 k0 v0 q1 k1 v1
    GGUF           q0 q1 k0 k1 v0 v1

Writing:  plan(config, shapes)     {GGUF name: Place in the checkpoint}
          metadata(config, ...)    all keys but those of the tokenizer
Reading:  config_of(metadata, shapes), then inverse(config, shapes): {name: Place in the GGUF file}

What is known of a model type is in gguf_architectures.py, rotary embeddings are in gguf_rotary.py.
Names come from the ``gguf`` package.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from quantkit.core.gguf_values import Value, boolean, f32, string, u32
from quantkit.core.qweight import QWeight
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_architectures import (
    ARCHITECTURES,
    CLASSES,
    MODEL_TYPES,
    Architecture,
    Config,
    Key,
    architecture_of,
    count,
    groups,
    head_size,
    is_real,
    short,
    told,
)
from quantkit.formats.gguf_rotary import ROPE_FACTORS, rope_metadata, rope_of, rotary

Shapes = Mapping[str, tuple[int, ...]]

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
# enum llama_ftype: what most of the weights are
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
# tensors of old checkpoints that are computed and not learned
_BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
_KINDS: dict[str, Callable[[Any], Value]] = {"u32": u32, "f32": f32, "bool": boolean}


@dataclass(frozen=True)
class Place:
    """Where the rows of a tensor come from: row i is the row ``rows[i]`` of the tensor ``source``
    on the other side; None: they are in the same order."""

    source: str
    rows: Tensor | None = None

    def dense(self, tensor: Tensor) -> Tensor:
        """The weight or bias with its rows in order."""
        return tensor if self.rows is None else tensor[self.rows]

    def packed(self, q: QWeight) -> QWeight:
        """The same for codes."""
        return q if self.rows is None else q.reordered(self.rows)


def _names(config: Config, tensors: int) -> dict[str, tuple[str, str]]:
    """Every tensor that a checkpoint of this kind can have: its name -> (GGUF name, the name of the
    module inside a block, "" for those outside). ``tensors``: how many there are."""
    gguf = _package()
    architecture = architecture_of(config)
    blocks = count(config, "num_hidden_layers")
    if blocks > tensors:
        raise QuantkitError(f"the model should have {blocks} blocks, and has {tensors} tensors")
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.gguf)
    known = gguf.get_tensor_name_map(number, blocks)

    def named(module: str) -> str:
        found = known.get_name(module)
        if found is None:
            raise QuantkitError(
                f"this version of the gguf package has no name for {module}", "update it"
            )
        return str(found)

    found = {}
    for module, inside in architecture.modules(blocks):
        found[f"{module}.weight"] = (f"{named(module)}.weight", inside)
        if inside in architecture.biased and module != architecture.embedding:
            found[f"{module}.bias"] = (f"{named(module)}.bias", inside)
    for head in architecture.heads:
        found[f"{head}.weight"] = (f"{named(head)}.weight", "")
    return found


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise QuantkitError(
            "GGUF files need the gguf package, which is not installed",
            "pip install gguf",
        ) from error
    return gguf


def is_linear(config: Config, name: str) -> bool:
    """Whether the tensor ``name`` of a checkpoint is the weight of a linear inside a block."""
    architecture = architecture_of(config)
    start, end = architecture.block.split("{}")
    if not name.startswith(start):
        return False
    number, _, module = name.removeprefix(start).partition(end)
    return number.isdigit() and module.removesuffix(".weight") in architecture.linears


def plan(config: Config, shapes: Shapes) -> dict[str, Place]:
    """{GGUF name: Place} for a checkpoint with this config.json and these tensors; a packed linear
    X counts as a tensor X.weight [out, in]. Raises QuantkitError, naming it, for a tensor that has
    no place or is missing, and for models that llama.cpp would compute otherwise."""
    architecture = _checked(config)
    names = _names(config, len(shapes))
    head = next((f"{h}.weight" for h in architecture.heads if f"{h}.weight" in shapes), None)
    embedding = f"{architecture.embedding}.weight"
    tied = bool(config.get("tie_word_embeddings", head is None))
    places = {}
    for name, shape in shapes.items():
        if name.endswith(_BUFFERS) or (tied and name == head):
            continue
        if not shape:
            raise QuantkitError(f"the tensor {name} is a single number, which no model has there")
        if name not in names:
            raise QuantkitError(
                f"the tensor {name} has no place in a GGUF file of a {config['model_type']} model",
                "remove it, if the model does without it",
            )
        there, module = names[name]
        places[there] = Place(name, _rows(architecture, config, module, name, shape))
    if tied and architecture.own_head:
        places["output.weight"] = Place(embedding)
    elif not tied and head is None:
        raise QuantkitError(f"the model lacks the tensor {architecture.heads[0]}.weight")
    _refuse_missing(architecture, config, {place.source for place in places.values()})
    return places


def _rows(
    architecture: Architecture, config: Config, module: str, name: str, shape: tuple[int, ...]
) -> Tensor | None:
    if module not in architecture.rows:
        return None
    parts, axes = architecture.rows[module](config)
    if shape[:1] != (prod(parts),):
        raise QuantkitError(
            f"tensor {name} has the shape {tuple(shape)}, and the model's description speaks of "
            f"{prod(parts)} rows",
            "the description and the weights do not belong together",
        )
    return torch.arange(prod(parts)).reshape(parts).transpose(*axes).reshape(-1)


def _refuse_missing(architecture: Architecture, config: Config, held: Iterable[str]) -> None:
    missing = {
        f"{module}.weight" for module, _ in architecture.modules(config["num_hidden_layers"])
    } - set(held)
    if missing:
        raise QuantkitError(
            f"the model lacks the tensor {min(missing)}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
            "the file may be incomplete, or its description may belong to another model",
        )


def keeps_float32(shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp wants a dense tensor in F32, whatever the model's dtype: norms, biases."""
    return len(shape) == 1


# what llama.cpp computes


def _checked(config: Config) -> Architecture:
    """The architecture of ``config``. Raises QuantkitError where llama.cpp would compute something
    else without a word."""
    architecture = architecture_of(config)
    kind = config["model_type"]
    for key in architecture.keys:
        _value(config, key)
    activation = config.get("hidden_act", architecture.activation[0])
    if activation not in architecture.activation:
        raise QuantkitError(
            f"llama.cpp computes {architecture.activation[0]} in {kind} models, and this one has "
            f"{activation}"
        )
    for name, value in architecture.fixed.items():
        if config.get(name, value) != value:
            raise QuantkitError(f"llama.cpp has no {kind} models with {name} = {config[name]}")
    rope = rotary(config)
    if rope["rope_type"] not in ("default", "linear", "llama3", "yarn"):
        raise QuantkitError(
            f"rotary embeddings of the type '{rope['rope_type']}' are not converted to GGUF"
        )
    if rope["partial_rotary_factor"] != 1 and not architecture.partial:
        raise QuantkitError(f"llama.cpp has no {kind} models that rotate a part of a head only")
    return architecture


def _value(config: Config, key: Key) -> Any:
    """What config.json says for ``key``."""
    if key.name == "num_key_value_heads":
        return groups(config)
    if key.kind == "u32":
        return count(config, key.name, key.default)
    value = config.get(key.name, key.default)
    if not (isinstance(value, bool) if key.kind == "bool" else is_real(value)):
        raise QuantkitError(f"config.json has {key.name} = {value!r:.40}")
    return value


# model types that look back as far as sliding_window says, without another switch
_WINDOWED = ("mistral", "phi3", "starcoder2")


def warnings(config: Config) -> list[str]:
    """What a GGUF file does not keep of this model, in sentences."""
    window = config.get("sliding_window")
    windowed = config.get("use_sliding_window", config.get("model_type") in _WINDOWED)
    length = count(config, "max_position_embeddings")
    if windowed and window is not None and count(config, "sliding_window") < length:
        return [
            f"the model looks {window} tokens back at most; llama.cpp looks at the whole text, "
            "which is something else for longer ones"
        ]
    return []


def metadata(config: Config, name: str, file_type: str) -> dict[str, Value]:
    """All keys of the file but those of the tokenizer. ``name`` is the model's, ``file_type`` the
    type of most weights. (llama.cpp has a rule for models whose name says "phi3" or "phi-3": it
    does not load them without Llama's special tokens.)"""
    architecture = _checked(config)
    found = {
        "general.architecture": string(architecture.gguf),
        "general.type": string("model"),
        "general.name": string(name),
        "general.file_type": u32(FILE_TYPES[file_type]),
        "general.quantization_version": u32(QUANTIZATION_VERSION),
    }
    own: dict[str, Value] = {}
    for key in architecture.keys:
        own[key.key] = _KINDS[key.kind](_value(config, key))
    own["attention.key_length"] = own["attention.value_length"] = u32(head_size(config))
    own |= rope_metadata(config)
    return found | {f"{architecture.gguf}.{key}": value for key, value in own.items()}


def config_of(metadata: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """What config.json would be, from a file's plain metadata and the shapes of its tensors. Raises
    QuantkitError for architectures that are not known and keys that are missing."""
    name = told(metadata, "general.architecture", str)
    if name not in MODEL_TYPES:
        raise QuantkitError(
            f"GGUF files of the architecture {name!r:.60} are not read",
            f"these are: {', '.join(MODEL_TYPES)}",
        )
    kind = MODEL_TYPES[name]
    architecture = ARCHITECTURES[kind]
    if metadata.get(f"{name}.expert_count"):
        raise QuantkitError("GGUF files of models with experts are not read")
    config: dict[str, Any] = {"model_type": kind, "architectures": [CLASSES[kind]]}
    for key in architecture.keys:
        config[key.name] = _number(metadata, architecture, key, config, shapes)
    config["head_dim"] = told(
        metadata,
        f"{name}.attention.key_length",
        int,
        config["hidden_size"] // config["num_attention_heads"],
    )
    config["hidden_act"] = architecture.activation[0]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    if kind == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
        config["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    config["rope_parameters"] = rope_of(metadata, name, config)
    if kind == "gpt_neox":
        config["tie_word_embeddings"] = False  # the file always has a head
        del config["head_dim"]
    ids = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    for theirs, ours in ids.items():
        config[ours] = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
    return config


def _number(
    metadata: Mapping[str, Any],
    architecture: Architecture,
    key: Key,
    config: Config,
    shapes: Shapes,
) -> Any:
    default = key.default
    if key.name == "vocab_size" and "token_embd.weight" in shapes:  # not all writers have the key
        return shapes["token_embd.weight"][0]
    if key.name == "num_key_value_heads":
        default = config["num_attention_heads"]
    wanted = {"u32": int, "f32": float, "bool": bool}[key.kind]
    value = told(metadata, f"{architecture.gguf}.{key.key}", wanted, default)
    if key.kind == "u32" and not 0 < value < 1 << 31:
        raise QuantkitError(f"the GGUF file says {architecture.gguf}.{key.key} = {value}")
    return short(value) if key.kind == "f32" else value


def inverse(config: Config, shapes: Shapes) -> dict[str, Place]:
    """{name in a checkpoint: Place} for all tensors of a GGUF file. Raises QuantkitError, naming
    it, for a tensor that is missing or has no place in such a model."""
    architecture = _checked(config)
    found: dict[str, Place] = {}
    known = {ROPE_FACTORS}
    for name, (there, module) in _names(config, len(shapes)).items():
        if there in known or there not in shapes:
            continue
        known.add(there)
        rows = _rows(architecture, config, module, there, shapes[there])
        found[name] = Place(there, None if rows is None else rows.argsort())
    for there in shapes:
        if there not in known:
            raise QuantkitError(
                f"the GGUF file has a tensor {there!r:.80}, which {config['model_type']} models "
                "do not have"
            )
    _refuse_missing(architecture, config, found)
    return found
