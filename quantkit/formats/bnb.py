"""bitsandbytes checkpoints, as transformers saves them: 4 bits (NF4, FP4) and 8 bits (LLM.int8()).

For a linear ``X`` with K inputs and N outputs, 4 bits in blocks of B neighbouring inputs:

    X.weight                 uint8    [N * K / 2, 1]   two codes a byte, row after row
    X.weight.absmax          float32  [N * K / B]      scale of each block
    X.weight.quant_map       float32  [16]             what the codes mean
    X.weight.quant_state.bitsandbytes__nf4   uint8     JSON: quant_type, blocksize, dtype, shape

    byte                     bits    7..4     3..0     (the first code is the high one)
                             input   2i       2i+1

    w[n, k] = quant_map[code[n, k]] * absmax[(n * K + k) / B]

With double quantization ("nested") the scales are themselves codes of 8 bits, in blocks of 256:

    X.weight.absmax            uint8    [N * K / B]
    X.weight.nested_absmax     float32  [N * K / B / 256]  rounded up
    X.weight.nested_quant_map  float32  [256]
    and in the JSON            nested_blocksize, nested_dtype, nested_offset

    absmax[i] = nested_quant_map[code[i]] * nested_absmax[i / 256] + nested_offset

8 bits:

    X.weight         int8     [N, K]
    X.SCB            float32  [N]      largest magnitude of each row
    X.weight_format  uint8    []       0: rows as they are. Old GPU layouts are not read

    w[n, k] = weight[n, k] * SCB[n] / 127

The JSON is the order and the spacing of ``QuantState.as_dict`` and ``pack_dict_to_tensor``
(bitsandbytes functional.py, utils.py), byte for byte.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.core.checkpoint import TensorSpec
from quantkit.core.form import Form
from quantkit.core.nested import Nested as Nested
from quantkit.core.qweight import LEVELS, Grid, QWeight, Scheme
from quantkit.errors import QuantkitError
from quantkit.formats import Tensors, unread

SCALES = (torch.float32,)
# of its evenly spaced numbers; scales of 16 bits are exact when they are 127 times as large
FORM = Form((8,), "symmetric", (torch.float16, torch.bfloat16), (-1,))
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_INT8_MAX = 127
_NESTED_BLOCK = 256
_STATE = "weight.quant_state.bitsandbytes__"
_STATES: dict[str, Grid] = {f"{_STATE}nf4": "nf4", f"{_STATE}fp4": "fp4"}
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
_FOUR_BITS = ("weight", "weight.absmax", "weight.quant_map", *_NESTED, *_STATES)
_EIGHT_BITS = ("weight", "SCB", "weight_format")
# one of them tells a packed linear
_MARKS = (".weight.absmax", *(f".{state}" for state in _STATES), ".SCB")
_MAX_STATE = 4096  # bytes of JSON; bitsandbytes writes less than 200
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class _State:
    """The JSON of a 4-bit weight, checked. ``nested`` is (blocksize, offset)."""

    grid: Grid
    blocksize: int
    dtype: torch.dtype
    shape: tuple[int, int]
    nested: tuple[int, float] | None

    def to_bytes(self) -> bytes:
        content: dict[str, Any] = {
            "quant_type": self.grid,
            "blocksize": self.blocksize,
            "dtype": _DTYPE_NAMES[self.dtype],
            "shape": list(self.shape),
        }
        if self.nested:
            blocksize, offset = self.nested
            content |= {"nested_blocksize": blocksize, "nested_dtype": "float32"}
            content["nested_offset"] = offset
        return json.dumps(content).encode()


# looking


def linears(tensors: Tensors, config: Mapping[str, Any]) -> list[str]:
    """Prefixes of packed linears, also of those of which a part is missing."""
    found = (name.removesuffix(mark) for name in tensors for mark in _MARKS if name.endswith(mark))
    return list(dict.fromkeys(found))


def names(tensors: Tensors, prefix: str) -> list[str]:
    """The tensors of a packed linear."""
    suffixes = dict.fromkeys((*_FOUR_BITS, *_EIGHT_BITS))
    return [f"{prefix}.{s}" for s in suffixes if f"{prefix}.{s}" in tensors]


def describe(tensors: Tensors, prefix: str, config: Mapping[str, Any]) -> tuple[int, int, Scheme]:
    """(out, in, scheme); see Format. The JSON is the one tensor that is read: the shape and the
    block size are nowhere else."""
    if f"{prefix}.SCB" in tensors:
        return _describe_int8(tensors, prefix)
    state = _state(tensors, prefix)
    out, width = state.shape
    return out, width, _scheme(state, prefix)


def _scheme(state: _State, prefix: str) -> Scheme:
    width, block = state.shape[1], state.blocksize
    if width % block:
        raise QuantkitError(
            f"{prefix} has blocks of {block} weights in rows of {width}, so that blocks reach over "
            "the ends of rows, which quantkit does not read",
            "quantize the original model again, with a block size that divides its rows",
        )
    group = -1 if width == block > 1024 else block
    if group > 1024:
        raise QuantkitError(f"{prefix} has blocks of {block} weights; quantkit reads up to 1024")
    return Scheme(4, group, True, state.grid)


def _state(tensors: Tensors, prefix: str) -> _State:
    """The JSON of a 4-bit linear, after all shapes and dtypes were found to agree with it."""
    found = [suffix for suffix in _STATES if f"{prefix}.{suffix}" in tensors]
    if len(found) != 1:
        raise QuantkitError(
            f"{prefix} has {'two tensors' if found else 'no tensor'} {_STATE}*, and should have one"
        )
    name = f"{prefix}.{found[0]}"
    spec = tensors.spec(name)
    if spec.dtype != torch.uint8 or len(spec.shape) != 1 or spec.nbytes > _MAX_STATE:
        raise QuantkitError(f"{name} is no JSON text: {spec.dtype}, shape {spec.shape}")
    state = _parse(tensors.get(name).numpy().tobytes(), _STATES[found[0]], name)
    _check(tensors, prefix, _planned(state))
    return state


def _parse(text: bytes, grid: Grid, name: str) -> _State:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise QuantkitError(f"{name} is not readable JSON") from error
    if not isinstance(content, dict):
        raise QuantkitError(f"{name} should hold one JSON object")

    def field(key: str, valid: Callable[[Any], bool]) -> Any:
        value = content.get(key)
        if not valid(value):
            raise QuantkitError(f"{name} has the {key} {value!r:.60}, which makes no sense")
        return value

    field("quant_type", lambda kind: kind == grid)
    block = field("blocksize", lambda size: _is_count(size) and size in BLOCKSIZES)
    dtype = field("dtype", lambda dtype: isinstance(dtype, str) and dtype in _DTYPES)
    out, width = field(
        "shape", lambda s: isinstance(s, list) and len(s) == 2 and all(map(_is_count, s))
    )
    nested = None
    if any(key.startswith("nested_") for key in content):
        field("nested_dtype", lambda dtype: dtype == "float32")
        nested = (
            field("nested_blocksize", _is_count),
            field("nested_offset", lambda x: isinstance(x, float) and math.isfinite(x)),
        )
    return _State(grid, block, _DTYPES[dtype], (out, width), nested)


def _is_count(value: object) -> bool:
    """Whether it is a whole number that can be a size."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _planned(state: _State) -> dict[str, TensorSpec]:
    """The tensors that belong to such a JSON text, by suffix."""
    out, width = state.shape
    blocks = -(-out * width // state.blocksize)
    specs = {
        "weight": TensorSpec(torch.uint8, ((out * width + 1) // 2, 1)),
        "weight.absmax": TensorSpec(torch.float32, (blocks,)),
        "weight.quant_map": TensorSpec(torch.float32, (16,)),
    }
    if state.nested:
        specs["weight.absmax"] = TensorSpec(torch.uint8, (blocks,))
        specs["weight.nested_absmax"] = TensorSpec(torch.float32, (-(-blocks // state.nested[0]),))
        specs["weight.nested_quant_map"] = TensorSpec(torch.float32, (256,))
    text = state.to_bytes()
    specs[_STATE + state.grid] = TensorSpec(torch.uint8, (len(text),))
    return specs


def _check(tensors: Tensors, prefix: str, planned: Mapping[str, TensorSpec]) -> None:
    for suffix, wanted in planned.items():
        name = f"{prefix}.{suffix}"
        if name not in tensors:
            raise QuantkitError(f"{prefix} has no tensor {suffix}")
        spec = tensors.spec(name)
        # the JSON has been read already, and others may put their spaces elsewhere
        if spec != wanted and suffix not in _STATES and not _stored_wide(suffix, spec, wanted):
            raise QuantkitError(
                f"{name} is {_words(spec)}, but {_words(wanted)} belongs to its quant_state"
            )
    for suffix in _NESTED:
        if suffix not in planned and f"{prefix}.{suffix}" in tensors:
            raise QuantkitError(
                f"{prefix}.{suffix} is there, and its quant_state says nothing of it"
            )


def _stored_wide(suffix: str, spec: TensorSpec, wanted: TensorSpec) -> bool:
    """Whether these are the same bytes under another dtype (``bnb_4bit_quant_storage``)."""
    return suffix == "weight" and spec.nbytes == wanted.nbytes and spec.shape[1:] == (1,)


def _words(spec: TensorSpec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"


def _describe_int8(tensors: Tensors, prefix: str) -> tuple[int, int, Scheme]:
    if f"{prefix}.weight" not in tensors:
        raise QuantkitError(f"{prefix} has no tensor weight")
    shape = tensors.spec(f"{prefix}.weight").shape
    if len(shape) != 2 or 0 in shape:
        raise QuantkitError(f"{prefix}.weight has the shape {shape}, which is not a weight")
    planned = specs(*shape, Scheme(8, -1))
    if f"{prefix}.weight_format" not in tensors:
        del planned["weight_format"]  # early versions wrote none
    for suffix, wanted in planned.items():
        spec = tensors.spec(f"{prefix}.{suffix}")
        if spec != wanted:
            raise QuantkitError(f"{prefix}.{suffix} is {_words(spec)}, not {_words(wanted)}")
    return *shape, Scheme(8, -1)


# reading


def read(tensors: Tensors, prefix: str, config: Mapping[str, Any], codes: bool = True) -> QWeight:
    """One linear. The scales of an 8-bit one are float64: SCB / 127 has to lead back to SCB."""
    out, width, scheme = describe(tensors, prefix, config)
    if scheme.grid == "int":
        return _read_int8(tensors, prefix, scheme, codes)
    levels = torch.tensor(LEVELS[scheme.grid])
    if not torch.equal(tensors.get(f"{prefix}.weight.quant_map"), levels):
        raise QuantkitError(f"{prefix}.weight.quant_map is not that of {scheme.grid}")
    found = unread(out, width)
    if codes:
        packed = tensors.get(f"{prefix}.weight").reshape(-1).view(torch.uint8)
        found = torch.stack((packed >> 4, packed & 15), dim=1).reshape(out, width)
    nested = read_nested(tensors, prefix)
    scale = nested.dequantize() if nested else tensors.get(f"{prefix}.weight.absmax")
    return QWeight(scheme, found, scale.reshape(out, -1))


def _read_int8(tensors: Tensors, prefix: str, scheme: Scheme, codes: bool) -> QWeight:
    form = f"{prefix}.weight_format"
    if form in tensors and tensors.get(form).item() != 0:
        raise QuantkitError(
            f"{form} is {tensors.get(form).item()}: the weight lies in the order of an old GPU "
            "kernel, which quantkit does not read",
            "save the model again with bitsandbytes 0.45 or newer",
        )
    scale = tensors.get(f"{prefix}.SCB").double()[:, None] / _INT8_MAX
    if not codes:
        return QWeight(scheme, unread(*tensors.spec(f"{prefix}.weight").shape), scale)
    # int8 -128..127 as uint8 0..255: adding 128 is flipping the sign bit
    return QWeight(scheme, tensors.get(f"{prefix}.weight").view(torch.uint8) ^ 128, scale)


def read_nested(tensors: Tensors, prefix: str) -> Nested | None:
    """The scales of a linear as they are stored, None where they are plain numbers."""
    if f"{prefix}.SCB" in tensors:
        return None
    state = _state(tensors, prefix)
    if not state.nested:
        return None
    size, offset = state.nested
    absmax, levels = (tensors.get(f"{prefix}.{suffix}") for suffix in _NESTED)
    return Nested(tensors.get(f"{prefix}.weight.absmax"), absmax, levels, offset, size)


def dtype_of(tensors: Tensors, prefix: str) -> torch.dtype:
    """The dtype of the original weights, in which bitsandbytes will also dequantize them."""
    return torch.float16 if f"{prefix}.SCB" in tensors else _state(tensors, prefix).dtype


# writing


def refusal(out: int, width: int, scheme: Scheme) -> str | None:
    """Why such a weight cannot be stored; see Format."""
    if scheme.grid == "int":
        if scheme.bits == 8 and scheme.symmetric and scheme.width(width) == width:
            return None
        return "bitsandbytes has NF4, FP4, and 8 bits with one scale a row and no zero points"
    block = scheme.width(width)
    if block not in BLOCKSIZES:
        return f"bitsandbytes has blocks of {BLOCKSIZES[0]} to {BLOCKSIZES[-1]}, not {block}"
    return f"blocks of {block} do not divide rows of {width}" if width % block else None


def specs(
    out: int,
    width: int,
    scheme: Scheme,
    scale: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float16,
    offset: float | None = None,
) -> dict[str, TensorSpec]:
    """What :func:`pack` will return for a weight [out, width]. Nested scales, in blocks of 256,
    have an ``offset``, whose digits are in a text and decide its length."""
    if scheme.grid == "int":
        return {
            "weight": TensorSpec(torch.int8, (out, width)),
            "SCB": TensorSpec(torch.float32, (out,)),
            "weight_format": TensorSpec(torch.uint8, ()),
        }
    nested = None if offset is None else (_NESTED_BLOCK, offset)
    return _planned(_State(scheme.grid, scheme.width(width), dtype, (out, width), nested))


def pack(
    q: QWeight, nested: Nested | None = None, dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    """The tensors of a linear, by suffix. ``nested`` holds the same scales as the weight, and is
    stored in their place; ``dtype`` is what the weights were before. Raises ValueError for scales
    that would be rounded."""
    reason = refusal(*q.shape, q.scheme)
    if reason or q.group_of is not None:
        raise ValueError(reason or "bitsandbytes has no groups of inputs that are not neighbours")
    if q.scheme.grid == "int":
        return _pack_int8(q)
    if q.scale.dtype != torch.float32:
        raise ValueError(f"bitsandbytes stores float32 scales, not {q.scale.dtype}")
    pairs = q.codes.reshape(-1, 2)
    tensors = {
        "weight": (pairs[:, :1] << 4) | pairs[:, 1:],
        "weight.absmax": q.scale.reshape(-1),
        "weight.quant_map": torch.tensor(LEVELS[q.scheme.grid]),
    }
    if nested:
        if not torch.equal(nested.dequantize(), q.scale.reshape(-1)):
            raise ValueError("the nested scales are not those of the weight")
        tensors["weight.absmax"] = nested.codes
        tensors["weight.nested_absmax"] = nested.absmax
        tensors["weight.nested_quant_map"] = nested.map
    again = (nested.blocksize, nested.offset) if nested else None
    state = _State(q.scheme.grid, q.scheme.width(q.shape[1]), dtype, q.shape, again)
    text = bytearray(state.to_bytes())
    tensors[_STATE + q.scheme.grid] = torch.frombuffer(text, dtype=torch.uint8)
    return tensors


def _pack_int8(q: QWeight) -> dict[str, Tensor]:
    exact = q.scale.reshape(-1).double()
    largest = (exact * _INT8_MAX).float()
    if not torch.equal((largest.double() / _INT8_MAX).to(q.scale.dtype), q.scale.reshape(-1)):
        raise ValueError("127 times the scale is not a float32 number, as bitsandbytes stores it")
    return {
        "weight": (q.codes ^ 128).view(torch.int8),
        "SCB": largest,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def configuration(
    scheme: Scheme,
    dense: list[str],
    by: str,
    double_quant: bool = False,
    dtype: torch.dtype = torch.float16,
    *,
    lm_head: bool = False,
) -> dict[str, Any]:
    """Keys to set in config.json, as transformers' BitsAndBytesConfig has them; see Format.
    ``double_quant`` says that scales are nested, ``dtype`` is what 4-bit matmuls compute in."""
    four = scheme.grid != "int"
    # A list of its own switches off transformers' search for the head, so the head has to be in it.
    heads = () if lm_head else ("lm_head", "embed_out")
    skipped = [*dense, *(head for head in heads if head not in dense)]
    return {
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": four,
            "_load_in_8bit": not four,
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "bnb_4bit_quant_type": scheme.grid if four else "fp4",
            "bnb_4bit_use_double_quant": double_quant,
            "bnb_4bit_compute_dtype": _DTYPE_NAMES[dtype if four else torch.float32],
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": skipped if dense or lm_head else None,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }
    }


def beside(config: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """Nothing; see Format."""
    return {}
