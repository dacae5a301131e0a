"""AWQ checkpoints in AutoAWQ's tensors: GEMM is read and written, GEMV is read. Always 4 bits.

For a linear ``X`` with K inputs, N outputs and G groups:

    GEMM    X.qweight  int32    [K, N / 8]    packed along the outputs
            X.qzeros   int32    [G, N / 8]    packed along the outputs
            X.scales   float16  [G, N]

    GEMV    X.qweight  int32    [N, K / 8]    packed along the inputs
            X.qzeros   int32    [N, P]        P words hold G zero points, and padding
            X.scales   float16  [N, 8 P]      G scales, and padding

    GEMM word (k, c)     bits  31..28  27..24  23..20  19..16  15..12  11..8   7..4   3..0
                       output   8c+7    8c+5    8c+3    8c+1    8c+6   8c+4   8c+2     8c

    GEMV word (n, r)     bits  31..28  27..24        ...                      7..4   3..0
                        input   8r+7    8r+6                                  8r+1     8r

    w[k, n] = scales[g, n] * (code[k, n] - zero[g, n])        g = k // group size

Zero points are stored as they are, without GPTQ's minus one: a symmetric weight has words of
0x88888888. There is no ``g_idx``: groups are contiguous.

AutoAWQ may also scale what goes *into* a linear, and folds the inverse into the module before it.
Where that module is an activation function, the checkpoint has a tensor ``X.act.scales``, see
:func:`activation_scales`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantkit.core import packbits
from quantkit.core.checkpoint import TensorSpec
from quantkit.core.form import Form
from quantkit.core.qweight import QWeight, Scheme
from quantkit.errors import QuantkitError
from quantkit.formats import Tensors, unread

SCALES = (torch.float16,)
BITS = 4
FORM = Form((BITS,), "zero", SCALES)
CODES = packbits.WORD // BITS
MIDPOINT = 1 << (BITS - 1)
# AutoAWQ's awq/modules/linear/gemv.py: zero points fill a multiple of so many words
_GEMV_WORDS = {32: 4, 64: 2}
_PIECE = 1 << 18  # words at a time, so that everything stays in the caches
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a GEMM word the code of each of 8 outputs is
_REQUIRED = ("qweight", "qzeros", "scales")
# scaled_zeros are llm-awq's, and only looked for to say so
_SUFFIXES = (*_REQUIRED, "scaled_zeros")
_DTYPES = {
    "qweight": (torch.int32,),
    "qzeros": (torch.int32,),
    "scales": (torch.float16, torch.bfloat16, torch.float32),
}
# The activation modules that readers wrap as act(x) / scales, and the linear beside each of them
# whose outputs it takes: transformers' integrations/awq.py, AWQ_SCALES_MAPPINGS.
SCALED_ACTIVATIONS = {
    "starcoder2": ("act", "c_fc"),
    "RefinedWebModel": ("act", "dense_h_to_4h"),
    "falcon": ("act", "dense_h_to_4h"),
    "mpt": ("act", "up_proj"),
    "gptj": ("act", "fc_in"),
    "gpt_neox": ("act", "dense_h_to_4h"),
    "gpt_bigcode": ("act", "c_fc"),
    "bloom": ("gelu_impl", "dense_h_to_4h"),
}


def linears(tensors: Tensors, config: Mapping[str, Any]) -> list[str]:
    """Prefixes of packed linears: all with a qweight that GPTQ could not have written. Also those
    of AWQ's variants that :func:`describe` refuses."""
    prefixes = (n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight"))
    return [prefix for prefix in prefixes if _ours(_found(tensors, prefix), config)]


def _ours(found: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> bool:
    if "scales" not in found:
        return config.get("quant_method") == "awq"
    # GPTQ's scales are exactly as wide as its qweight
    return (
        _relative(found) is not None
        or found["scales"].shape[-1:] != found["qweight"].shape[-1:]
        or _is_gemv(found)
    )


def _found(tensors: Tensors, prefix: str) -> dict[str, TensorSpec]:
    return {s: tensors.spec(f"{prefix}.{s}") for s in _SUFFIXES if f"{prefix}.{s}" in tensors}


def _relative(found: Mapping[str, TensorSpec]) -> str | None:
    """The variant of AWQ, of those that are not read, that has such tensors."""
    zeros = found.get("qzeros")
    if "scaled_zeros" in found:
        return "llm-awq"
    if found["qweight"].dtype == torch.int16 and zeros and zeros.dtype.is_floating_point:
        return "AutoAWQ's GEMV_fast"
    weight, scales = found["qweight"].shape, found["scales"].shape
    if zeros is None and len(weight) == len(scales) == 2 and weight[1] == 2 * scales[1]:
        return "AutoAWQ's Marlin"
    return None


def _is_gemv(found: Mapping[str, TensorSpec]) -> bool:
    """Whether every tensor has one row an output. A GEMM so shaped would have groups of one."""
    shapes = [found[suffix].shape for suffix in _REQUIRED if suffix in found]
    if len(shapes) < len(_REQUIRED) or any(len(shape) != 2 for shape in shapes):
        return False
    weight, zeros, scales = shapes
    return weight[0] == zeros[0] == scales[0] and scales[1] == zeros[1] * CODES


def names(tensors: Tensors, prefix: str) -> list[str]:
    """The tensors of a packed linear."""
    return [f"{prefix}.{s}" for s in _SUFFIXES if f"{prefix}.{s}" in tensors]


def describe(tensors: Tensors, prefix: str, config: Mapping[str, Any]) -> tuple[int, int, Scheme]:
    """(out, in, scheme) from shapes alone; see Format. Only GEMV's group size is the
    configuration's, because its padding hides the number of groups."""
    found = _found(tensors, prefix)
    for suffix in ("qweight", "scales"):
        if suffix not in found:
            raise QuantkitError(f"{prefix} has no tensor {suffix}")
    if relative := _relative(found):
        raise QuantkitError(
            f"{prefix} is packed in the way of {relative}, which quantkit does not read",
            "it reads AutoAWQ's GEMM and GEMV (version 'gemm' and 'gemv')",
        )
    if "qzeros" not in found:
        raise QuantkitError(f"{prefix} has no tensor qzeros")
    for suffix in _REQUIRED:
        spec = found[suffix]
        if spec.dtype not in _DTYPES[suffix]:
            raise QuantkitError(
                f"{prefix}.{suffix} has the dtype {spec.dtype}, which is not AutoAWQ's"
            )
        if len(spec.shape) != 2 or 0 in spec.shape:
            raise QuantkitError(
                f"{prefix}.{suffix} has the shape {spec.shape}, which is not a packed weight"
            )
    shape = _gemv_shape(found, prefix, config) if _is_gemv(found) else _gemm_shape(found, prefix)
    out, width, size = shape
    groups = width // size
    if width % size or (groups > 1 and not 16 <= size <= 1024):
        raise QuantkitError(f"{prefix} has {groups} groups for {width} inputs")
    symmetric = not config.get("zero_point", True)
    return out, width, Scheme(BITS, -1 if groups == 1 else size, symmetric)


def _gemm_shape(found: Mapping[str, TensorSpec], name: str) -> tuple[int, int, int]:
    """(out, in, group size) of a linear in GEMM's layout."""
    width, words = found["qweight"].shape
    groups = found["scales"].shape[0]
    expected = {"qzeros": (groups, words), "scales": (groups, words * CODES)}
    for suffix, shape in expected.items():
        if found[suffix].shape != shape:
            raise QuantkitError(
                f"{name}.{suffix} has the shape {found[suffix].shape}, and AWQ of "
                f"{words * CODES} outputs in {groups} groups needs {shape}"
            )
    if width % groups:
        raise QuantkitError(f"{name} has {groups} groups for {width} inputs")
    return words * CODES, width, width // groups


def _gemv_shape(
    found: Mapping[str, TensorSpec], name: str, config: Mapping[str, Any]
) -> tuple[int, int, int]:
    """(out, in, group size) of a linear in GEMV's layout."""
    out, words = found["qweight"].shape
    width = words * CODES
    size = config.get("group_size", config.get("q_group_size"))
    if type(size) is not int or (size != -1 and size < 1):
        raise QuantkitError(
            f"{name} is packed for AWQ GEMV, and its configuration does not say the group size",
            "put the right group_size into the quantization_config of config.json",
        )
    size = width if size == -1 else size
    columns = found["qzeros"].shape[1]
    if width % size or columns != _gemv_words(width // size, size):
        raise QuantkitError(
            f"{name}.qzeros has the shape {found['qzeros'].shape}, which is not that of AWQ GEMV "
            f"with {width} inputs in groups of {size}"
        )
    return out, width, size


def _gemv_words(groups: int, size: int) -> int | None:
    """Words of zero points that AutoAWQ's GEMV has for a row; None for groups it does not have."""
    multiple = _GEMV_WORDS.get(size, 1 if size >= 128 else None)
    if multiple is None:
        return None
    return -(-groups // (CODES * multiple)) * multiple


def read(tensors: Tensors, prefix: str, config: Mapping[str, Any], codes: bool = True) -> QWeight:
    """A linear; see Format."""
    out, width, scheme = describe(tensors, prefix, config)
    qzeros, scale = tensors.get(f"{prefix}.qzeros"), tensors.get(f"{prefix}.scales")
    if _is_gemv(_found(tensors, prefix)):
        along, groups = _along_rows, scheme.groups(width)
        if bool((scale[:, groups:] != 0).any()):
            raise QuantkitError(
                f"{prefix} has more than the {groups} groups of {scheme.width(width)} that its "
                "configuration says"
            )
        zero, scale = along(qzeros)[:, :groups].contiguous(), scale[:, :groups].contiguous()
    else:
        along = _along_outputs
        zero, scale = along(qzeros), scale.T.contiguous()
    symmetric = bool((zero == MIDPOINT).all())
    found = along(tensors.get(f"{prefix}.qweight")) if codes else unread(out, width)
    return QWeight(replace(scheme, symmetric=symmetric), found, scale, None if symmetric else zero)


def _along_rows(packed: Tensor) -> Tensor:
    """int32 [N, w] -> uint8 [N, 8 w]"""
    return packbits.unpack(packed.reshape(-1, 1), BITS).reshape(packed.shape[0], -1)


def _along_outputs(packed: Tensor) -> Tensor:
    """int32 [m, N / 8] in GEMM's order -> uint8 [N, m]"""
    m, words = packed.shape
    codes = torch.empty(words, CODES, m, dtype=torch.uint8, device=packed.device)
    for at in _pieces(words, m):
        word = packed[:, at].T.contiguous()
        for output, place in enumerate(_PLACES):
            codes[at, output] = (word >> (BITS * place)).bitwise_and_(15)
    return codes.reshape(-1, m)


def _packed_outputs(codes: Tensor) -> Tensor:
    """uint8 [N, m] -> int32 [m, N / 8] in GEMM's order"""
    m = codes.shape[1]
    source = codes.reshape(-1, CODES, m)
    packed = torch.empty(m, len(source), dtype=torch.int32, device=codes.device)
    for at in _pieces(len(source), m):
        word = torch.zeros(len(source[at]), m, dtype=torch.int32, device=codes.device)
        for output, place in enumerate(_PLACES):
            word |= source[at, output].to(torch.int32) << (BITS * place)
        packed[:, at] = word.T
    return packed


def _pieces(words: int, m: int) -> Iterator[slice]:
    """Words of so many outputs at a time that they stay in the caches."""
    step = max(1, _PIECE // m)
    for start in range(0, words, step):
        yield slice(start, start + step)


def refusal(out: int, width: int, scheme: Scheme) -> str | None:
    """Why such a weight cannot be stored; see Format."""
    if scheme.grid != "int":
        return f"AWQ has evenly spaced levels, not those of {scheme.grid}"
    if scheme.bits != BITS:
        return f"AWQ has 4 bits, not {scheme.bits}"
    if out % CODES:
        return f"{out} outputs do not fill AWQ's 32-bit words of {CODES}"
    return None


def specs(
    out: int, width: int, scheme: Scheme, scale: torch.dtype = torch.float16
) -> dict[str, TensorSpec]:
    """What :func:`pack` will return; see Format."""
    groups, words = scheme.groups(width), packbits.words(out, BITS)
    return {
        "qweight": TensorSpec(torch.int32, (width, words)),
        "qzeros": TensorSpec(torch.int32, (groups, words)),
        "scales": TensorSpec(scale, (groups, out)),
    }


def pack(q: QWeight) -> dict[str, Tensor]:
    """The tensors of a linear for GEMM, by suffix; see Format."""
    reason = refusal(*q.shape, q.scheme)
    if reason:
        raise ValueError(reason)
    if q.minimum is not None:
        raise ValueError("AWQ has zero points, and this weight has minimums")
    if q.group_of is not None:
        raise ValueError("AWQ has contiguous groups, and this weight has a group for every input")
    if q.scale.dtype not in SCALES:
        raise ValueError(f"AWQ stores float16 scales, not {q.scale.dtype}")
    zero = q.zero
    if zero is None:
        zero = torch.full_like(q.scale, MIDPOINT, dtype=torch.uint8)
    return {
        "qweight": _packed_outputs(q.codes),
        "qzeros": _packed_outputs(zero),
        "scales": q.scale.T.contiguous(),
    }


def configuration(
    scheme: Scheme,
    dense: list[str],
    by: str,
    *,
    own: Mapping[str, Scheme] | None = None,
    act_order: str | None = None,
    damp: float | None = None,
    lm_head: bool = False,
) -> dict[str, Any]:
    """Keys to set in config.json; see Format. ``zero_point`` says that there are qzeros, which
    there always are. There is no key for anything but the layout; ``lm_head`` is one that vLLM
    reads (auto_awq.py)."""
    return {
        "quantization_config": {
            "quant_method": "awq",
            "version": "gemm",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "zero_point": True,
            "modules_to_not_convert": dense or None,
            **({"lm_head": True} if lm_head else {}),
        }
    }


def beside(config: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """Nothing: see Format."""
    return {}


def activation_scales(model_type: str, outputs: Mapping[str, int]) -> dict[str, TensorSpec]:
    """Tensors of ones that an AWQ checkpoint of this architecture must have beside its linears.

    transformers wraps the activation functions of some architectures whether or not they were
    scaled, and leaves the scales uninitialised where the checkpoint has none: the model then
    computes NaN. ``outputs`` has the number of outputs of every linear, quantized or not.
    """
    activation, before = SCALED_ACTIVATIONS.get(model_type, ("", ""))
    return {
        f"{parent}.{activation}.scales": TensorSpec(torch.float16, (outputs[prefix],))
        for prefix in outputs
        for parent, _, last in [prefix.rpartition(".")]
        if before and last == before
    }


def activation_scale_names(tensors: Iterable[str]) -> list[str]:
    """The scales of activation functions in a checkpoint. Whoever runs the model has to divide by
    them; ones say that nothing was scaled."""
    endings = {f".{activation}.scales" for activation, _ in SCALED_ACTIVATIONS.values()}
    return [name for name in tensors if name.endswith(tuple(sorted(endings)))]
