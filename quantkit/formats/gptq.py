"""GPTQ checkpoints, in AutoGPTQ's tensors: v1 (``checkpoint_format: gptq``) and v2 (``gptq_v2``).

For a linear ``X`` with K inputs, N outputs, G groups and b bits:

    X.qweight  int32    [K * b / 32, N]    packed along the inputs
    X.qzeros   int32    [G, N * b / 32]    packed along the outputs
    X.scales   float16  [G, N]
    X.g_idx    int32    [K]                group of each input
    X.bias     float16  [N]                if the linear has one

    qweight word (r, n), 4 bits       bits  31..28  27..24   ...   7..4   3..0
                                      input  8r+7    8r+6          8r+1    8r

    w[k, n] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n])

v1 stores ``zero - 1`` (a symmetric 4-bit word of zeros is 0x77777777), v2 stores ``zero``
(0x88888888). A v1 zero point of 0 wraps around, and readers disagree about it: it is never written.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from quantkit.core import packbits
from quantkit.core.checkpoint import Checkpoint, TensorSpec
from quantkit.core.qweight import BITS, QWeight, Scheme
from quantkit.errors import QuantkitError

Convention = Literal["v1", "v2"]
CONFIG_FILE = "quantize_config.json"
_FORMATS: dict[Convention, str] = {"v1": "gptq", "v2": "gptq_v2"}
_REQUIRED = ("qweight", "qzeros", "scales")
_SUFFIXES = (*_REQUIRED, "g_idx")
# what is read; the words of a qweight that is packed into int16 or int64 would mean other codes
_DTYPES = {
    "qweight": (torch.int32,),
    "qzeros": (torch.int32,),
    "scales": (torch.float16, torch.bfloat16, torch.float32),
    "g_idx": (torch.int32, torch.int64),
}


def packable(out: int, width: int, bits: int) -> bool:
    """Whether a weight of this shape fills whole words in both directions."""
    block = packbits.block_codes(bits)
    return out % block == 0 and width % block == 0


def specs(out: int, width: int, scheme: Scheme, bias: bool) -> dict[str, TensorSpec]:
    """What :func:`pack` will return for a weight [out, width], and the bias."""
    groups = scheme.groups(width)
    found = {
        "qweight": TensorSpec(torch.int32, (packbits.words(width, scheme.bits), out)),
        "qzeros": TensorSpec(torch.int32, (groups, packbits.words(out, scheme.bits))),
        "scales": TensorSpec(torch.float16, (groups, out)),
        "g_idx": TensorSpec(torch.int32, (width,)),
    }
    if bias:
        found["bias"] = TensorSpec(torch.float16, (out,))
    return found


def pack(q: QWeight, convention: Convention) -> dict[str, Tensor]:
    """The tensors of a linear, by suffix. Raises ValueError for a zero point that v1 cannot hold
    or scales that are not float16."""
    bits = q.scheme.bits
    if q.scale.dtype != torch.float16:
        raise ValueError(f"GPTQ stores float16 scales, not {q.scale.dtype}")
    zero = q.zero
    if zero is None:
        zero = torch.full_like(q.scale, q.scheme.midpoint, dtype=torch.uint8)
    if convention == "v1":
        if bool((zero == 0).any()):
            raise ValueError("a zero point of 0 cannot be written in the v1 convention")
        zero = zero - 1
    return {
        "qweight": packbits.pack(q.codes.T, bits),
        "qzeros": packbits.pack(zero.contiguous(), bits).T.contiguous(),
        "scales": q.scale.T.contiguous(),
        "g_idx": q.group_index().to(torch.int32),
    }


def unpack(
    tensors: Mapping[str, Tensor], scheme: Scheme, convention: Convention, name: str = "a linear"
) -> QWeight:
    """The QWeight that the tensors (by suffix) hold. ``g_idx`` may be missing in old files.

    Raises QuantkitError, naming ``name``, when shapes, dtypes or group numbers do not fit together.
    """
    bits = scheme.bits
    _check(tensors, scheme, name)
    codes = packbits.unpack(tensors["qweight"], bits).T.contiguous()
    zero = stored_zeros(tensors["qzeros"], bits)
    if convention == "v1":
        zero = (zero + 1) & scheme.max_code
    width = codes.shape[1]
    scale = tensors["scales"].T.contiguous()
    group_of = tensors.get("g_idx")
    if group_of is not None:
        if int(group_of.min()) < 0 or int(group_of.max()) >= scale.shape[1]:
            raise QuantkitError(f"{name}.g_idx names groups that do not exist")
        contiguous = torch.arange(width, dtype=group_of.dtype) // scheme.width(width)
        if torch.equal(group_of.cpu(), contiguous):
            group_of = None
    if scheme.symmetric and bool((zero != scheme.midpoint).any()):
        raise QuantkitError(
            f"{name}.qzeros are not those of a symmetric weight in the {convention} convention",
            "run 'quantkit inspect' on it",
        )
    return QWeight(scheme, codes, scale, None if scheme.symmetric else zero, group_of)


def _check(tensors: Mapping[str, Tensor], scheme: Scheme, name: str) -> None:
    for suffix in _REQUIRED:
        if suffix not in tensors:
            raise QuantkitError(f"{name} has no tensor {suffix}")
    packed = tuple(tensors["qweight"].shape)
    if len(packed) != 2 or 0 in packed:
        raise QuantkitError(f"{name}.qweight has the shape {packed}, which is not a packed weight")
    width = packed[0] * packbits.WORD // scheme.bits
    try:
        expected = specs(packed[1], width, scheme, False)
    except (ValueError, QuantkitError) as error:
        raise QuantkitError(f"{name}.qweight has the shape {packed}: {error}") from error
    for suffix in _SUFFIXES:
        if suffix not in tensors:
            continue
        if tensors[suffix].dtype not in _DTYPES[suffix]:
            raise QuantkitError(
                f"{name}.{suffix} has the dtype {tensors[suffix].dtype}, which is not one of "
                "quantkit's GPTQ formats",
            )
        shape, wanted = tuple(tensors[suffix].shape), expected[suffix].shape
        if shape != wanted:
            raise QuantkitError(
                f"{name}.{suffix} has the shape {shape}, but {scheme.bits} bits in groups of "
                f"{scheme.group_size} need {wanted}"
            )


def stored_zeros(qzeros: Tensor, bits: int) -> Tensor:
    """uint8 [N, G]: the zero points as they are stored, before any convention is applied."""
    return packbits.unpack(qzeros.T.contiguous(), bits)


def convention_of(qzeros: Tensor, bits: int) -> Convention | None:
    """What the data itself says: v1 or v2 for a symmetric weight, None for any other."""
    zero = stored_zeros(qzeros, bits)
    midpoint = 2 ** (bits - 1)
    if bool((zero == midpoint - 1).all()):
        return "v1"
    if bool((zero == midpoint).all()):
        return "v2"
    return None


def scheme_of(tensors: Mapping[str, TensorSpec], symmetric: bool, width: int | None) -> Scheme:
    """Bits and group size from the shapes of a linear's tensors; ``width`` is the number of inputs
    where there is no g_idx to tell it. Raises QuantkitError when they make no sense."""
    rows = tensors["qweight"].shape[0]
    if "g_idx" in tensors:
        width = tensors["g_idx"].shape[0]
    if not width:
        raise QuantkitError("the number of inputs of a linear is not known")
    bits, groups = rows * packbits.WORD // width, tensors["scales"].shape[0]
    if bits not in BITS or rows * packbits.WORD != bits * width or not groups or width % groups:
        raise QuantkitError(
            f"a packed weight with {rows} rows for {width} inputs is not 2, 3, 4 or 8 bits"
        )
    return Scheme(bits, -1 if groups == 1 else width // groups, symmetric)


@dataclass(frozen=True)
class Declared:
    """What the configuration files of a checkpoint say (the tensors may know better)."""

    bits: int
    symmetric: bool
    convention: Convention


def declared(read_json: Callable[[str], dict[str, Any] | None]) -> Declared | None:
    """The declaration of a GPTQ checkpoint, from ``config.json`` or from older files beside it, or
    None when there is none. ``read_json`` gives a file's content. Raises QuantkitError when the
    files speak of another method."""
    config = (read_json("config.json") or {}).get("quantization_config")
    for file in (CONFIG_FILE, "quant_config.json"):
        config = config or read_json(file)
    if not config:
        return None
    method = config.get("quant_method", "gptq")
    if method != "gptq":
        raise QuantkitError(f"checkpoints quantized with '{method}' are not read yet")
    bits = config.get("bits", config.get("w_bit", config.get("wbits")))
    form = config.get("checkpoint_format", config.get("format", "gptq"))
    if bits not in BITS or form not in _FORMATS.values():
        raise QuantkitError(f"GPTQ with {bits} bits in the format '{form}' is not read yet")
    symmetric = config.get("sym", not config.get("zero_point", False))
    return Declared(bits, bool(symmetric), "v2" if form == _FORMATS["v2"] else "v1")


def linears(names: Iterable[str]) -> list[str]:
    """The prefixes of the packed linears among a checkpoint's tensor names."""
    return [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]


def packed_names(names: Iterable[str]) -> set[str]:
    """The tensors among ``names`` that belong to packed linears (biases do not)."""
    known = set(names)
    return {f"{p}.{s}" for p in linears(known) for s in _SUFFIXES if f"{p}.{s}" in known}


def read(checkpoint: Checkpoint, prefix: str, said: Declared) -> tuple[QWeight, Convention]:
    """One linear, and the zero-point convention that it was found to use.

    A symmetric weight shows its convention in the data; then the data is believed.
    """
    tensors = {
        suffix: checkpoint.get(f"{prefix}.{suffix}")
        for suffix in _SUFFIXES
        if f"{prefix}.{suffix}" in checkpoint
    }
    for suffix in _REQUIRED:
        if suffix not in tensors:
            raise QuantkitError(f"{prefix} has no tensor {suffix}")
    width = tensors["qweight"].shape[0] * packbits.WORD // said.bits
    shapes = {suffix: TensorSpec.of(tensor) for suffix, tensor in tensors.items()}
    scheme = scheme_of(shapes, said.symmetric, width)  # some linears may have other bits than most
    _check(tensors, scheme, prefix)
    found = convention_of(tensors["qzeros"], scheme.bits) if said.symmetric else None
    convention = found or said.convention
    return unpack(
        tensors, replace(scheme, symmetric=found is not None), convention, prefix
    ), convention


def quantization_config(
    scheme: Scheme,
    convention: Convention,
    *,
    act_order: str,
    damp: float,
    dense: list[str],
    quantizer: str,
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json, in the keys that GPTQModel, transformers, vLLM
    and AutoGPTQ read. ``dense`` names linears inside the blocks that were left as they were."""
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": act_order == "group",
        "static_groups": act_order == "static",
        "true_sequential": False,
        "damp_percent": damp,
        "lm_head": False,
        "checkpoint_format": _FORMATS[convention],
        "pack_dtype": "int32",
        "meta": {"quantizer": [quantizer]},
    }
    if dense:
        # GPTQModel's way to say that a module is not quantized
        config["dynamic"] = {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in dense}
    return config


def legacy_config(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """``quantize_config.json``, which AutoGPTQ and many loaders after it read."""
    return {**config, "model_name_or_path": name, "model_file_base_name": "model"}
