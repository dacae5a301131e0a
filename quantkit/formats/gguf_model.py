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
          extra_tensors(config)    what llama.cpp wants and no checkpoint holds
Reading:  config_of(metadata, shapes), then inverse(config, shapes): {name: Place in the GGUF file}

What is known of an architecture is one entry of ARCHITECTURES, and every entry was compared with
llama.cpp (tests/test_gguf_model.py). Names come from the ``gguf`` package. The facts about rows and
keys are those of llama.cpp's conversion/*.py and src/models/*.cpp.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import pi, prod
from typing import Any

import torch
from torch import Tensor

from quantkit.core.gguf_file import Value, boolean, f32, string, u32
from quantkit.core.qweight import QWeight
from quantkit.errors import QuantkitError

Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
# A row order is one swap of two axes: the shape that the rows have before it, and the axes.
Order = tuple[tuple[int, int, int], tuple[int, int]]

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
# enum llama_ftype: what most of the weights are
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
ROPE_FACTORS = "rope_freqs.weight"
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


def _heads(config: Config) -> int:
    return _count(config, "num_attention_heads")


def _groups(config: Config) -> int:
    return _count(config, "num_key_value_heads", _heads(config))


def head_size(config: Config) -> int:
    """Outputs of one attention head."""
    return _count(config, "head_dim", _count(config, "hidden_size") // _heads(config))


def _count(config: Config, name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 1 << 31:
        raise QuantkitError(f"config.json has {name} = {value!r:.40}, which is no size")
    return value


def _query(config: Config) -> Order:
    return (_heads(config), 2, head_size(config) // 2), (1, 2)


def _key(config: Config) -> Order:
    return (_groups(config), 2, head_size(config) // 2), (1, 2)


def _fused(config: Config) -> Order:
    return (_heads(config), 3, head_size(config)), (0, 1)


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
_MODEL_TYPES = {architecture.gguf: kind for kind, architecture in reversed(ARCHITECTURES.items())}
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}


def _architecture(config: Config) -> Architecture:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise QuantkitError(
            f"models of the type '{kind!s:.60}' cannot be converted to or from GGUF",
            f"these can: {', '.join(ARCHITECTURES)}",
        )
    return ARCHITECTURES[kind]


# names


def _names(config: Config, tensors: int) -> dict[str, tuple[str, str]]:
    """Every tensor that a checkpoint of this kind can have: its name -> (GGUF name, the name of the
    module inside a block, "" for those outside). ``tensors``: how many there are."""
    gguf = _package()
    architecture = _architecture(config)
    blocks = _count(config, "num_hidden_layers")
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
    architecture = _architecture(config)
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
    architecture = _architecture(config)
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
        return _groups(config)
    if key.kind == "u32":
        return _count(config, key.name, key.default)
    value = config.get(key.name, key.default)
    if not (isinstance(value, bool) if key.kind == "bool" else _is_real(value)):
        raise QuantkitError(f"config.json has {key.name} = {value!r:.40}")
    return value


def _is_real(value: Any) -> bool:
    """Whether it is a number that float32 holds."""
    return isinstance(value, int | float) and abs(value) < 3e38  # false for nan


# model types that look back as far as sliding_window says, without another switch
_WINDOWED = ("mistral", "phi3", "starcoder2")


def warnings(config: Config) -> list[str]:
    """What a GGUF file does not keep of this model, in sentences."""
    window = config.get("sliding_window")
    windowed = config.get("use_sliding_window", config.get("model_type") in _WINDOWED)
    length = _count(config, "max_position_embeddings")
    if windowed and window is not None and _count(config, "sliding_window") < length:
        return [
            f"the model looks {window} tokens back at most; llama.cpp looks at the whole text, "
            "which is something else for longer ones"
        ]
    return []


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
        "partial_rotary_factor", _architecture(config).rotary if part is None else part
    )
    return found


def _of_rope(rope: Mapping[str, Any], name: str) -> float:
    if not _is_real(rope.get(name)):
        raise QuantkitError(f"the rotary embedding of this model has no {name}")
    return float(rope[name])


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
    own |= _rope_metadata(config)
    return found | {f"{architecture.gguf}.{key}": value for key, value in own.items()}


def _rope_metadata(config: Config) -> dict[str, Value]:
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
        length = _count(config, "max_position_embeddings")
        length = _count(rope, "original_max_position_embeddings", length)
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


# reading


def config_of(metadata: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """What config.json would be, from a file's plain metadata and the shapes of its tensors. Raises
    QuantkitError for architectures that are not known and keys that are missing."""
    name = _of(metadata, "general.architecture", str)
    if name not in _MODEL_TYPES:
        raise QuantkitError(
            f"GGUF files of the architecture {name!r:.60} are not read",
            f"these are: {', '.join(_MODEL_TYPES)}",
        )
    kind = _MODEL_TYPES[name]
    architecture = ARCHITECTURES[kind]
    if metadata.get(f"{name}.expert_count"):
        raise QuantkitError("GGUF files of models with experts are not read")
    config: dict[str, Any] = {"model_type": kind, "architectures": [_CLASSES[kind]]}
    for key in architecture.keys:
        config[key.name] = _number(metadata, architecture, key, config, shapes)
    config["head_dim"] = _of(
        metadata,
        f"{name}.attention.key_length",
        int,
        config["hidden_size"] // config["num_attention_heads"],
    )
    config["hidden_act"] = architecture.activation[0]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    if _LLAMA.gguf == name:
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
        config["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    config["rope_parameters"] = _rope_of(metadata, name, config)
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
    value = _of(metadata, f"{architecture.gguf}.{key.key}", wanted, default)
    if key.kind == "u32" and not 0 < value < 1 << 31:
        raise QuantkitError(f"the GGUF file says {architecture.gguf}.{key.key} = {value}")
    return _short(value) if key.kind == "f32" else value


def _of(metadata: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = metadata.get(key, default)
    if value is None:
        raise QuantkitError(f"the GGUF file has no {key}", "it may be incomplete or very old")
    if type(value) is not kind:
        raise QuantkitError(f"the GGUF file has a {key} that is no {kind.__name__}")
    return value


def _short(value: float) -> float:
    """The shortest number that is ``value`` in float32: 1e-05 and not 9.999999747378752e-06."""
    wanted = torch.tensor(value)
    for digits in range(1, 18):
        short = float(f"{value:.{digits}g}")
        if torch.tensor(short) == wanted:
            return short
    return value


def _rope_of(metadata: Mapping[str, Any], name: str, config: Config) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": _short(_of(metadata, f"{name}.rope.freq_base", float, 1e4)),
    }
    size = config["head_dim"]
    turning = _of(metadata, f"{name}.rope.dimension_count", int, size)
    if ARCHITECTURES[config["model_type"]].partial:
        rope["partial_rotary_factor"] = turning / size
    elif turning != size:
        raise QuantkitError(f"GGUF files of {name} that rotate a part of a head are not read")
    scaling = f"{name}.rope.scaling"
    kind = _of(metadata, f"{scaling}.type", str, "none")
    if kind not in ("none", "linear", "yarn"):
        raise QuantkitError(f"rotary embeddings of the type {kind!r:.40} are not read from GGUF")
    if kind != "none":
        rope["rope_type"] = kind
        rope["factor"] = _short(_of(metadata, f"{scaling}.factor", float))
    if kind == "yarn":
        length = _of(metadata, f"{scaling}.original_context_length", int)
        rope["original_max_position_embeddings"] = length
    return rope


def with_factors(config: Config, factors: Tensor) -> dict[str, Any]:
    """``config`` with the parameters of Llama 3.1 that give these values of ROPE_FACTORS. The file
    has the result only, so they are searched among the ones in use. Raises QuantkitError when none
    of them fit."""
    rope = dict(config["rope_parameters"])
    factor = _short(float(factors.max()))
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
