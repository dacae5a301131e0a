"""MLX checkpoints, as mlx-lm writes them: its ``affine`` mode with 2, 3, 4, 5, 6 or 8 bits.

For a linear (or an embedding) ``X`` with K inputs, N outputs, G groups and b bits:

    X.weight   uint32   [N, K * b / 32]    packed along the inputs
    X.scales   float    [N, G]             float16, bfloat16 or float32
    X.biases   float    [N, G]             of the same dtype; X.bias is the linear's own bias

    4 bits, word r     bits  31..28  27..24   ...   7..4   3..0
                      input   8r+7    8r+6          8r+1     8r

    5 bits, bytes 0..4 of every 8 inputs (3 bits: 8 inputs in 3 bytes, 6 bits: 4 inputs in 3 bytes)
        byte   4      3      2      1      0
              77777666 66555554 44443333 32222211 11100000      (the digit: which of the 8 inputs)

    w[n, k] = scales[n, g] * code[n, k] + biases[n, g]          g = k // group size

So a row is one stream of bits, least significant first, whatever b is: in little-endian words it is
the stream of core.packbits. Shapes only show the product of bits and group size; the configuration
says which is which, for all linears or (mlx-lm's mixed recipes) under a linear's own name.
"""

from collections.abc import Mapping
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

SCALES = (torch.float16, torch.bfloat16, torch.float32)
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
FORM = Form(BITS, "minimum", SCALES, GROUP_SIZES)
_SUFFIXES = ("weight", "scales", "biases")


def linears(tensors: Tensors, config: Mapping[str, Any]) -> list[str]:
    """Prefixes of packed weights: a uint32 weight with scales. Embeddings are among them."""
    prefixes = (n.removesuffix(".scales") for n in tensors if n.endswith(".scales"))
    return [
        prefix
        for prefix in prefixes
        if f"{prefix}.weight" in tensors and tensors.spec(f"{prefix}.weight").dtype == torch.uint32
    ]


def names(tensors: Tensors, prefix: str) -> list[str]:
    """The tensors of a packed linear."""
    return [f"{prefix}.{s}" for s in _SUFFIXES if f"{prefix}.{s}" in tensors]


def describe(tensors: Tensors, prefix: str, config: Mapping[str, Any]) -> tuple[int, int, Scheme]:
    """(out, in, scheme); see Format."""
    found = {s: tensors.spec(f"{prefix}.{s}") for s in _SUFFIXES if f"{prefix}.{s}" in tensors}
    said = _settings(config, prefix)
    for suffix in ("weight", "scales"):
        if suffix not in found:
            raise QuantkitError(f"{prefix} has no tensor {suffix}")
    _check_mode(found, prefix, said)
    if "biases" not in found:
        raise QuantkitError(f"{prefix} has no tensor biases")
    _check(found, prefix)
    bits, size = said.get("bits"), said.get("group_size")
    if type(bits) is not int or type(size) is not int:
        raise QuantkitError(
            f"the configuration does not say the bits and the group size of {prefix}",
            'config.json of an MLX model has "quantization": {"group_size": ..., "bits": ...}',
        )
    if bits not in BITS or size not in GROUP_SIZES:
        raise QuantkitError(
            f"{prefix} has {bits} bits in groups of {size}, which quantkit does not read",
            "it reads MLX's 2, 3, 4, 5, 6 and 8 bits in groups of 32, 64 or 128",
        )
    out, groups = found["scales"].shape
    words = found["weight"].shape[1]
    if words * packbits.WORD != groups * size * bits:
        raise QuantkitError(
            f"{prefix} has {words} words and {groups} groups in a row, and {bits} bits in groups "
            f"of {size}, as the configuration says, do not fit them"
        )
    return out, groups * size, Scheme(bits, size, symmetric=False)


def _settings(config: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    """What the configuration says of one linear."""
    own = config.get(prefix)
    return own if isinstance(own, Mapping) else config


def _check_mode(found: Mapping[str, TensorSpec], name: str, said: Mapping[str, Any]) -> None:
    """Refuse MLX's floating-point modes, whose scales are bytes."""
    mode = said.get("mode", "affine")
    if found["scales"].dtype == torch.uint8 and mode == "affine":
        mode = "one of the fp modes"
    if mode != "affine":
        raise QuantkitError(
            f"{name} is quantized in MLX's mode {mode}, which quantkit does not read",
            "it reads the mode affine",
        )


def _check(found: Mapping[str, TensorSpec], name: str) -> None:
    scales = found["scales"]
    for suffix, spec in found.items():
        if len(spec.shape) != 2 or 0 in spec.shape:
            raise QuantkitError(
                f"{name}.{suffix} has the shape {spec.shape}, which is not a packed weight"
            )
        if spec.dtype not in ((torch.uint32,) if suffix == "weight" else SCALES):
            raise QuantkitError(f"{name}.{suffix} has the dtype {spec.dtype}, which is not MLX's")
    if found["biases"] != scales:
        raise QuantkitError(
            f"{name}.biases is {found['biases'].dtype} {found['biases'].shape}, and its scales are "
            f"{scales.dtype} {scales.shape}"
        )
    if found["weight"].shape[0] != scales.shape[0]:
        raise QuantkitError(
            f"{name}.scales has {scales.shape[0]} rows, and its weight {found['weight'].shape[0]}"
        )


def read(tensors: Tensors, prefix: str, config: Mapping[str, Any], codes: bool = True) -> QWeight:
    """A linear; see Format. It is symmetric when that is what all of its biases say, to the bit."""
    out, width, scheme = describe(tensors, prefix, config)
    weight, scale, minimum = (tensors.get(f"{prefix}.{suffix}") for suffix in _SUFFIXES)
    found = unread(out, width)
    if codes:
        words = weight.view(torch.int32).reshape(-1, 1)
        found = packbits.unpack(words, scheme.bits).reshape(out, width)
    if _same_bits(minimum, scale * -scheme.midpoint):
        return QWeight(replace(scheme, symmetric=True), found, scale)
    return QWeight(scheme, found, scale, minimum=minimum)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells 0 from -0."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def refusal(out: int, width: int, scheme: Scheme) -> str | None:
    """Why such a weight cannot be stored; see Format."""
    if scheme.grid != "int":
        return f"MLX has evenly spaced levels, not those of {scheme.grid}"
    if scheme.group_size not in GROUP_SIZES:
        found = "one scale a row" if scheme.group_size == -1 else f"groups of {scheme.group_size}"
        return f"MLX has groups of 32, 64 or 128, not {found}"
    if width % scheme.group_size:
        return f"groups of {scheme.group_size} do not divide {width} inputs"
    return None


def specs(
    out: int, width: int, scheme: Scheme, scale: torch.dtype = torch.float16
) -> dict[str, TensorSpec]:
    """What :func:`pack` will return; see Format."""
    groups = scheme.groups(width)
    return {
        "weight": TensorSpec(torch.uint32, (out, packbits.words(width, scheme.bits))),
        "scales": TensorSpec(scale, (out, groups)),
        "biases": TensorSpec(scale, (out, groups)),
    }


def pack(q: QWeight) -> dict[str, Tensor]:
    """The tensors of a linear, by suffix; see Format. A zero point becomes the bias
    ``-zero * scale`` where that is a number of the scales' dtype (it always is for a symmetric
    weight, short of overflow)."""
    reason = refusal(*q.shape, q.scheme)
    if reason:
        raise ValueError(reason)
    if q.group_of is not None:
        raise ValueError("MLX has contiguous groups, and this weight has a group for every input")
    if q.scale.dtype not in SCALES:
        raise ValueError(f"MLX stores float16, bfloat16 or float32 scales, not {q.scale.dtype}")
    minimum = q.minimum
    if minimum is None:
        exact = _minimum(q)
        minimum = exact.to(q.scale.dtype)
        if bool((minimum.double() != exact).any()):
            raise ValueError(f"zero points times scales are not numbers of {q.scale.dtype}")
    elif minimum.dtype != q.scale.dtype:
        raise ValueError(f"minimums are {minimum.dtype}, and scales {q.scale.dtype}")
    packed = packbits.pack(q.codes.reshape(-1, 1), q.scheme.bits)
    return {
        "weight": packed.reshape(q.shape[0], -1).view(torch.uint32),
        "scales": q.scale.contiguous(),
        "biases": minimum.contiguous(),
    }


def _minimum(q: QWeight) -> Tensor:
    """float64 [out, groups]: what the code 0 means, without rounding."""
    zero = q.scheme.midpoint if q.zero is None else q.zero.double()
    return -(q.scale.double() * zero)


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
    """Keys to set in config.json; see Format. mlx-lm writes both names, and takes what has no
    scales for dense."""
    said = {"group_size": scheme.group_size, "bits": scheme.bits, "mode": "affine"}
    return {"quantization": said, "quantization_config": dict(said)}


def beside(config: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """Nothing; see Format."""
    return {}
