"""compressed-tensors checkpoints in the format ``pack-quantized``, as llm-compressor writes them.

For a linear ``X`` with K inputs, N outputs, G groups and b bits:

    X.weight_packed      int32  [N, ceil(K * b / 32)]    packed along the inputs
    X.weight_scale       float  [N, G]                   float16, bfloat16 or float32
    X.weight_shape       int64  [2]                      N, K
    X.weight_zero_point  int32  [ceil(N * b / 32), G]    packed along the outputs; asymmetric only
    X.weight_g_idx       int32  [K]                      group of each input; old files only

    weight_packed word (n, r), 4 bits       bits  31..28  27..24   ...   7..4   3..0
                                           input   8r+7    8r+6          8r+1     8r

    w[n, k] = weight_scale[n, g] * (code[n, k] - zero[n, g])    g = k // group size, or g_idx[k]

Its documents speak of signed integers; what is packed are those plus 2**(b-1), so the words hold
codes and zero points as they are. A row is one stream of bits, and its last word is filled up with
zeros. Older writers began every word anew where b does not divide 32; that is refused.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantkit.core import packbits
from quantkit.core.checkpoint import TensorSpec
from quantkit.core.form import Form
from quantkit.core.qweight import BITS, QWeight, Scheme
from quantkit.errors import QuantkitError
from quantkit.formats import Tensors, unread

SCALES = (torch.float16, torch.bfloat16, torch.float32)
PACKED = "pack-quantized"
FORM = Form(BITS, "zero", SCALES, mixed=True)
METHOD = "compressed-tensors"
_REQUIRED = ("weight_packed", "weight_scale", "weight_shape")
_SUFFIXES = (*_REQUIRED, "weight_zero_point", "weight_g_idx")
# only looked for to say by name what is not read
_RELATIVES = ("weight", "meta", "scale_packed", "weight_global_scale")
_DTYPES = {
    "weight_packed": (torch.int32,),
    "weight_scale": SCALES,
    "weight_shape": (torch.int64, torch.int32),
    "weight_zero_point": (torch.int32,),
    "weight_g_idx": (torch.int32, torch.int64),
}


def linears(tensors: Tensors, config: Mapping[str, Any]) -> list[str]:
    """Prefixes of packed linears; where the configuration says that this is compressed-tensors,
    also of those that another of its formats left unpacked, which :func:`describe` refuses."""
    packed = [n.removesuffix(".weight_packed") for n in tensors if n.endswith(".weight_packed")]
    if config.get("quant_method") != METHOD:
        return packed
    scaled = (n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale"))
    known = set(packed)
    return packed + [p for p in scaled if p not in known and f"{p}.weight" in tensors]


def names(tensors: Tensors, prefix: str) -> list[str]:
    """The tensors of a packed linear."""
    return [f"{prefix}.{s}" for s in _SUFFIXES if f"{prefix}.{s}" in tensors]


def describe(tensors: Tensors, prefix: str, config: Mapping[str, Any]) -> tuple[int, int, Scheme]:
    """(out, in, scheme); see Format. The two numbers of weight_shape are read, because shapes do
    not tell how full the last word of a row is."""
    found = {
        suffix: tensors.spec(f"{prefix}.{suffix}")
        for suffix in (*_SUFFIXES, *_RELATIVES)
        if f"{prefix}.{suffix}" in tensors
    }
    _refuse_other_forms(found, prefix, config)
    for suffix in _REQUIRED:
        if suffix not in found:
            raise QuantkitError(f"{prefix} has no tensor {suffix}")
    for suffix in _SUFFIXES:
        if suffix in found and found[suffix].dtype not in _DTYPES[suffix]:
            raise QuantkitError(
                f"{prefix}.{suffix} has the dtype {found[suffix].dtype}, which is not {PACKED}"
            )
    for suffix in ("weight_packed", "weight_scale"):
        shape = found[suffix].shape
        if len(shape) != 2 or 0 in shape:
            raise QuantkitError(
                f"{prefix}.{suffix} has the shape {shape}, which is not a packed weight"
            )
    out, width = _shape(tensors, found, prefix)
    bits = _bits(found["weight_packed"].shape[1], width, config, prefix)
    groups = found["weight_scale"].shape[1]
    _check_shapes(found, out, width, bits, prefix)
    size = width // groups
    if width % groups or (groups > 1 and not 16 <= size <= 1024):
        raise QuantkitError(f"{prefix} has {groups} groups for {width} inputs")
    symmetric = "weight_zero_point" not in found
    if symmetric and _declared_asymmetric(config, bits, size, groups):
        raise QuantkitError(
            f"{prefix} has no tensor weight_zero_point, and its configuration says asymmetric"
        )
    return out, width, Scheme(bits, -1 if groups == 1 else size, symmetric)


def _refuse_other_forms(
    found: Mapping[str, TensorSpec], name: str, config: Mapping[str, Any]
) -> None:
    """Raise QuantkitError for whatever is not pack-quantized, by its name in compressed-tensors."""
    said = config.get("format")
    form = None
    if "weight_packed" not in found:
        form = said if said != PACKED else None
        form = form or "a format without weight_packed"
    elif found["weight_packed"].dtype == torch.uint8:
        form = "nvfp4-pack-quantized" if "weight_global_scale" in found else "mxfp4-pack-quantized"
    elif "meta" in found or "scale_packed" in found:
        form = "marlin-24"
    elif said not in (None, PACKED, "mixed-precision"):
        form = said
    if form:
        raise QuantkitError(
            f"{name} is stored in compressed-tensors' format {form}, which quantkit does not read",
            f"it reads {PACKED}",
        )
    if config.get("transform_config"):
        raise QuantkitError(
            f"{name} belongs to a model with transforms (rotations) of its activations, "
            "which quantkit does not apply"
        )


def _shape(tensors: Tensors, found: Mapping[str, TensorSpec], name: str) -> tuple[int, int]:
    """(out, in) of the weight before it was packed."""
    if found["weight_shape"].shape != (2,):
        raise QuantkitError(
            f"{name}.weight_shape has the shape {found['weight_shape'].shape}, and not (2,)"
        )
    out, width = tensors.get(f"{name}.weight_shape").tolist()
    if out != found["weight_packed"].shape[0] or width < 1:
        raise QuantkitError(
            f"{name}.weight_shape says {out} x {width}, and weight_packed has "
            f"{found['weight_packed'].shape[0]} rows"
        )
    return out, width


def _bits(words: int, width: int, config: Mapping[str, Any], name: str) -> int:
    """The bits of which ``width`` codes take ``words`` words. The configuration is only asked where
    that is several, for very narrow weights."""
    fit = [bits for bits in BITS if _words(width, bits) == words]
    if len(fit) > 1:
        said = {weights.get("num_bits") for weights in _declared(config)}
        fit = [bits for bits in fit if bits in said]
    if len(fit) != 1:
        raise QuantkitError(
            f"{name}.weight_packed has {words} words a row, which for {width} inputs is "
            f"not {PACKED} as it is written today",
            "older versions padded every word of 3, 5 or 6 bits; write the model again with a "
            "current compressed-tensors",
        )
    if packbits.WORD % fit[0] and width % packbits.WORD:
        raise QuantkitError(
            f"{name} has {width} inputs of {fit[0]} bits, which old and new versions of "
            "compressed-tensors pack differently"
        )
    return fit[0]


def _check_shapes(
    found: Mapping[str, TensorSpec], out: int, width: int, bits: int, name: str
) -> None:
    groups = found["weight_scale"].shape[1]
    expected = {
        "weight_scale": (out, groups),
        "weight_zero_point": (_words(out, bits), groups),
        "weight_g_idx": (width,),
    }
    for suffix, shape in expected.items():
        if suffix in found and found[suffix].shape != shape:
            raise QuantkitError(
                f"{name}.{suffix} has the shape {found[suffix].shape}, and {bits} bits of "
                f"{out} x {width} in {groups} groups a row need {shape}"
            )


def _declared(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """How the configuration says that weights are quantized, one entry for each of its groups."""
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            yield weights


def _declared_asymmetric(config: Mapping[str, Any], bits: int, size: int, groups: int) -> bool:
    """Whether all that the configuration says of such weights is that they have zero points."""
    sizes = (size, -1, None) if groups == 1 else (size,)
    said = [
        weights.get("symmetric", True)
        for weights in _declared(config)
        if weights.get("num_bits") == bits and weights.get("group_size") in sizes
    ]
    return bool(said) and not any(said)


def _words(count: int, bits: int) -> int:
    """Words that ``count`` codes take; the last one may be filled in part."""
    return -(-count * bits // packbits.WORD)


def read(tensors: Tensors, prefix: str, config: Mapping[str, Any], codes: bool = True) -> QWeight:
    """A linear; see Format."""
    out, width, scheme = describe(tensors, prefix, config)
    held = {n.rpartition(".")[2]: tensors.get(n) for n in names(tensors, prefix)}
    zero = None
    if "weight_zero_point" in held:
        packed = held["weight_zero_point"].T.contiguous()
        zero = _unpack_rows(packed, scheme.bits, out).T.contiguous()
        if bool((zero == scheme.midpoint).all()):
            scheme, zero = replace(scheme, symmetric=True), None
    group_of = _group_of(held.get("weight_g_idx"), scheme, width, prefix)
    found = unread(out, width)
    if codes:
        found = _unpack_rows(held["weight_packed"], scheme.bits, width)
    return QWeight(scheme, found, held["weight_scale"], zero, group_of)


def _group_of(index: Tensor | None, scheme: Scheme, width: int, name: str) -> Tensor | None:
    """The group of each input where it is not the plain one. All -1 is compressed-tensors' way to
    say that there is nothing to say."""
    if index is None or bool((index == -1).all()):
        return None
    if int(index.min()) < 0 or int(index.max()) >= scheme.groups(width):
        raise QuantkitError(f"{name}.weight_g_idx names groups that do not exist")
    plain = torch.arange(width, dtype=index.dtype) // scheme.width(width)
    return None if torch.equal(index, plain) else index.to(torch.int32)


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    """uint8 [m, count] -> int32 [m, ceil(count * bits / 32)]"""
    rows, count = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -count % packbits.block_codes(bits)))
    packed = packbits.pack(padded.reshape(-1, 1), bits).reshape(rows, -1)
    return packed[:, : _words(count, bits)].contiguous()


def _unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 [m, ceil(count * bits / 32)] -> uint8 [m, count]"""
    rows, words = packed.shape
    padded = torch.nn.functional.pad(
        packed, (0, -words % packbits.words(packbits.block_codes(bits), bits))
    )
    return packbits.unpack(padded.reshape(-1, 1), bits).reshape(rows, -1)[:, :count].contiguous()


def refusal(out: int, width: int, scheme: Scheme) -> str | None:
    """Why such a weight cannot be stored; see Format."""
    if scheme.grid != "int":
        return f"{METHOD} has evenly spaced levels, not those of {scheme.grid}"
    if packbits.WORD % scheme.bits and width % packbits.WORD:
        return (
            f"old and new versions of {METHOD} pack {width} inputs of {scheme.bits} bits "
            "differently (32 have to divide them)"
        )
    return None


def specs(
    out: int, width: int, scheme: Scheme, scale: torch.dtype = torch.float16
) -> dict[str, TensorSpec]:
    """What :func:`pack` will return; see Format."""
    groups = scheme.groups(width)
    planned = {
        "weight_packed": TensorSpec(torch.int32, (out, _words(width, scheme.bits))),
        "weight_scale": TensorSpec(scale, (out, groups)),
        "weight_shape": TensorSpec(torch.int64, (2,)),
    }
    if not scheme.symmetric:
        planned["weight_zero_point"] = TensorSpec(torch.int32, (_words(out, scheme.bits), groups))
    return planned


def pack(q: QWeight) -> dict[str, Tensor]:
    """The tensors of a linear, by suffix; see Format. A group for every input is refused, although
    the format has had it: compressed-tensors took it out in 2026 (quant_args.py, actorder)."""
    reason = refusal(*q.shape, q.scheme)
    if reason:
        raise ValueError(reason)
    if q.minimum is not None:
        raise ValueError(f"{METHOD} has zero points, and this weight has minimums")
    if q.group_of is not None:
        raise ValueError(
            f"{METHOD} has contiguous groups, and this weight has a group for every input"
        )
    if q.scale.dtype not in SCALES:
        raise ValueError(f"{METHOD} stores float scales of 16 or 32 bits, not {q.scale.dtype}")
    packed = {
        "weight_packed": _pack_rows(q.codes, q.scheme.bits),
        "weight_scale": q.scale.contiguous(),
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if q.zero is not None:
        packed["weight_zero_point"] = _pack_rows(q.zero.T, q.scheme.bits).T.contiguous()
    return packed


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
    """Keys to set in config.json; see Format. compressed-tensors forbids keys that it does not
    know, so there is none for ``by`` and ``damp``."""
    actorder = "static" if act_order == "static" else None
    kinds: dict[Scheme, list[str]] = {}
    for name, one in (own or {}).items():
        kinds.setdefault(one, []).append(name)
    # A class of modules ("Linear") beside names would be up to the reader's order
    groups = [(one, sorted(names)) for one, names in kinds.items()] or [(scheme, ["Linear"])]
    return {
        "quantization_config": {
            "quant_method": METHOD,
            "format": PACKED,
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{index}": _config_group(one, targets, actorder)
                for index, (one, targets) in enumerate(groups)
            },
            "ignore": sorted({*dense} if lm_head else {*dense, "lm_head"}),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
    }


def _config_group(scheme: Scheme, targets: list[str], actorder: str | None) -> dict[str, Any]:
    """An entry of config_groups: the scheme of the linears ``targets``."""
    whole = scheme.group_size == -1
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else scheme.group_size,
        "block_structure": None,
        "dynamic": False,
        "actorder": actorder,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": PACKED,
    }


def beside(config: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """Nothing; see Format."""
    return {}
