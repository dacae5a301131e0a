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

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from quantkit.core import packbits
from quantkit.core.checkpoint import TensorSpec
from quantkit.core.form import Form
from quantkit.core.qweight import QWeight, Scheme
from quantkit.errors import QuantkitError
from quantkit.formats import Tensors, unread

Convention = Literal["v1", "v2"]
CONFIG_FILE = "quantize_config.json"
SCALES = (torch.float16,)
BITS = (2, 3, 4, 8)
FORM = Form(BITS, "zero", SCALES, ordered=True, zero_min=1, mixed=True)
_FORMATS: dict[Convention, str] = {"v1": "gptq", "v2": "gptq_v2"}
_REQUIRED = ("qweight", "qzeros", "scales")
_SUFFIXES = (*_REQUIRED, "g_idx")
# what vLLM computes as one layer
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
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


def specs(
    out: int, width: int, scheme: Scheme, scale: torch.dtype = torch.float16
) -> dict[str, TensorSpec]:
    """What :func:`pack` will return for a weight [out, width]."""
    groups = scheme.groups(width)
    return {
        "qweight": TensorSpec(torch.int32, (packbits.words(width, scheme.bits), out)),
        "qzeros": TensorSpec(torch.int32, (groups, packbits.words(out, scheme.bits))),
        "scales": TensorSpec(scale, (groups, out)),
        "g_idx": TensorSpec(torch.int32, (width,)),
    }


def pack(q: QWeight, convention: Convention = "v1") -> dict[str, Tensor]:
    """The tensors of a linear, by suffix. Raises ValueError for a zero point that v1 cannot hold,
    scales that are not float16, and minimums in the place of zero points."""
    reason = refusal(*q.shape, q.scheme)
    if reason:
        raise ValueError(reason)
    bits = q.scheme.bits
    if q.minimum is not None:
        raise ValueError("GPTQ has zero points, and this weight has minimums")
    if q.scale.dtype != torch.float16:
        raise ValueError(f"GPTQ stores float16 scales, not {q.scale.dtype}")
    zero = q.zero
    if zero is None:
        zero = torch.full_like(q.scale, q.scheme.midpoint, dtype=torch.uint8)
    if convention == "v1":
        if q.zero is not None and bool((zero == 0).any()):
            raise ValueError("a zero point of 0 cannot be written in the v1 convention")
        zero = zero - 1
    return {
        "qweight": packbits.pack(q.codes.T, bits),
        "qzeros": packbits.pack(zero.contiguous(), bits).T.contiguous(),
        "scales": q.scale.T.contiguous(),
        "g_idx": q.group_index().to(torch.int32),
    }


def unpack(
    tensors: Mapping[str, Tensor],
    scheme: Scheme,
    convention: Convention,
    name: str = "a linear",
    codes: bool = True,
) -> QWeight:
    """The QWeight that the tensors (by suffix) hold. ``g_idx`` may be missing in old files.

    Raises QuantkitError, naming ``name``, when shapes, dtypes or group numbers do not fit together.
    """
    bits = scheme.bits
    _check({suffix: TensorSpec.of(t) for suffix, t in tensors.items()}, scheme, name)
    words, out = tensors["qweight"].shape
    width = words * packbits.WORD // bits
    zero = stored_zeros(tensors["qzeros"], bits)
    if convention == "v1":
        zero = (zero + 1) & scheme.max_code
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
    found = (
        packbits.unpack(tensors["qweight"], bits).T.contiguous() if codes else unread(out, width)
    )
    return QWeight(scheme, found, scale, None if scheme.symmetric else zero, group_of)


def _check(found: Mapping[str, TensorSpec], scheme: Scheme, name: str) -> None:
    for suffix in _REQUIRED:
        if suffix not in found:
            raise QuantkitError(f"{name} has no tensor {suffix}")
    packed = found["qweight"].shape
    if len(packed) != 2 or 0 in packed:
        raise _no_weight(name, "qweight", packed)
    width = packed[0] * packbits.WORD // scheme.bits
    try:
        expected = specs(packed[1], width, scheme)
    except (ValueError, QuantkitError) as error:
        raise QuantkitError(f"{name}.qweight has the shape {packed}: {error}") from error
    for suffix in _SUFFIXES:
        if suffix not in found:
            continue
        if found[suffix].dtype not in _DTYPES[suffix]:
            raise QuantkitError(
                f"{name}.{suffix} has the dtype {found[suffix].dtype}, which is not one of "
                "quantkit's GPTQ formats",
            )
        if found[suffix].shape != expected[suffix].shape:
            raise QuantkitError(
                f"{name}.{suffix} has the shape {found[suffix].shape}, but {scheme.bits} bits in "
                f"groups of {scheme.group_size} need {expected[suffix].shape}"
            )


def _no_weight(name: str, suffix: str, shape: tuple[int, ...]) -> QuantkitError:
    return QuantkitError(f"{name}.{suffix} has the shape {shape}, which is not a packed weight")


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


def declared_convention(config: Mapping[str, Any]) -> Convention:
    """How zero points are stored, as the configuration says: v1 where it says nothing. Raises
    QuantkitError for the formats that only look alike (Marlin, GPTQModel's planar one)."""
    form = config.get("checkpoint_format", config.get("format", "gptq"))
    if form not in _FORMATS.values() or config.get("is_marlin_format"):
        raise QuantkitError(f"GPTQ in the format '{form}' is not read")
    return "v2" if form == _FORMATS["v2"] else "v1"


def linears(tensors: Tensors, config: Mapping[str, Any]) -> list[str]:
    """Prefixes of packed linears: those with a qweight that are not AWQ's."""
    prefixes = (n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight"))
    return [prefix for prefix in prefixes if _ours(tensors, prefix, config)]


def _ours(tensors: Tensors, prefix: str, config: Mapping[str, Any]) -> bool:
    """Whether GPTQ could have written a qweight: its scales are as wide. Square linears of AWQ's
    variants are told by other signs: float zero points, or one row of everything for an output."""
    found = {
        s: tensors.spec(f"{prefix}.{s}")
        for s in (*_SUFFIXES, "scaled_zeros")
        if f"{prefix}.{s}" in tensors
    }
    if "scales" not in found:
        return config.get("quant_method") != "awq"
    zeros = found.get("qzeros")
    if "scaled_zeros" in found or (zeros and zeros.dtype.is_floating_point):
        return False
    weight, scales = found["qweight"].shape, found["scales"].shape
    if (
        zeros
        and weight[:1] == scales[:1] == zeros.shape[:1]
        and scales[1:] == tuple(n * 8 for n in zeros.shape[1:])
    ):
        return False
    return scales[-1:] == weight[-1:]


def names(tensors: Tensors, prefix: str) -> list[str]:
    """The tensors of a packed linear."""
    return [f"{prefix}.{s}" for s in _SUFFIXES if f"{prefix}.{s}" in tensors]


def describe(tensors: Tensors, prefix: str, config: Mapping[str, Any]) -> tuple[int, int, Scheme]:
    """(out, in, scheme) from shapes alone; see Format."""
    specs = {
        suffix: tensors.spec(f"{prefix}.{suffix}")
        for suffix in _SUFFIXES
        if f"{prefix}.{suffix}" in tensors
    }
    for suffix in _REQUIRED:
        if suffix not in specs:
            raise QuantkitError(f"{prefix} has no tensor {suffix}")
        if len(specs[suffix].shape) != 2 or 0 in specs[suffix].shape:
            raise _no_weight(prefix, suffix, specs[suffix].shape)
    config = _declared_scheme(config, prefix)
    bits = config.get("bits", config.get("w_bit", config.get("wbits")))
    symmetric = config.get("sym", not config.get("zero_point", False))
    scheme = scheme_of(specs, bool(symmetric), bits, prefix)
    width = specs["qweight"].shape[0] * packbits.WORD // scheme.bits
    _check(specs, scheme, prefix)
    return specs["qweight"].shape[1], width, scheme


def scheme_of(
    specs: Mapping[str, TensorSpec], symmetric: bool, bits: int | None, name: str
) -> Scheme:
    """Bits and group size from the shapes of a linear's tensors. Bits are told by qzeros, which are
    packed along the outputs; ``bits`` is what the configuration says. Raises QuantkitError when
    they make no sense."""
    rows, out = specs["qweight"].shape
    groups, columns = specs["qzeros"].shape
    found = columns * packbits.WORD // out
    if found not in BITS or columns * packbits.WORD != found * out:
        raise QuantkitError(
            f"{name} has {columns} words of zero points for {out} outputs, which is not "
            "2, 3, 4 or 8 bits"
        )
    if "g_idx" in specs and specs["g_idx"].shape[:1] != (rows * packbits.WORD // found,):
        raise QuantkitError(
            f"{name}.g_idx has the shape {specs['g_idx'].shape}, and {rows} words of {found} bits "
            f"hold {rows * packbits.WORD // found} inputs"
        )
    width = rows * packbits.WORD // found
    if not width or width % groups or (groups > 1 and not 16 <= width // groups <= 1024):
        raise QuantkitError(f"{name} has {groups} groups for {width} inputs")
    return Scheme(found, -1 if groups == 1 else width // groups, symmetric)


def read(tensors: Tensors, prefix: str, config: Mapping[str, Any], codes: bool = True) -> QWeight:
    """One linear."""
    return read_with_convention(tensors, prefix, config, codes)[0]


def read_with_convention(
    tensors: Tensors, prefix: str, config: Mapping[str, Any], codes: bool = True
) -> tuple[QWeight, Convention]:
    """One linear, and the zero-point convention that it was found to use.

    Where all zero points are those of a symmetric weight in one of the conventions, the data is
    believed, whatever the configuration says.
    """
    _, _, scheme = describe(tensors, prefix, config)
    held = {n.rpartition(".")[2]: tensors.get(n) for n in names(tensors, prefix)}
    said = declared_convention(config)
    found = convention_of(held["qzeros"], scheme.bits)
    if found and not scheme.symmetric and found != said:
        found = None  # zero points of 7 throughout are rare, but they may be meant
    scheme = replace(scheme, symmetric=found is not None)
    return unpack(held, scheme, found or said, prefix, codes), found or said


def refusal(out: int, width: int, scheme: Scheme) -> str | None:
    """Why such a weight cannot be stored; see Format."""
    if scheme.grid != "int":
        return f"GPTQ has evenly spaced levels, not those of {scheme.grid}"
    if scheme.bits not in BITS:
        return f"GPTQ has 2, 3, 4 or 8 bits, not {scheme.bits}"
    if not packable(out, width, scheme.bits):
        return f"a weight of {out} x {width} does not fill GPTQ's 32-bit words"
    return None


def quantization_config(
    scheme: Scheme,
    convention: Convention,
    *,
    dense: list[str],
    quantizer: str,
    own: Mapping[str, Scheme] | None = None,
    act_order: str | None = None,
    damp: float | None = None,
    lm_head: bool = False,
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json, in the keys that GPTQModel, transformers, vLLM
    and AutoGPTQ read. ``dense`` names linears inside the blocks that were left as they were,
    ``own`` all others with their schemes where these differ; ``act_order`` (by default: no g_idx of
    its own) and ``damp`` are written down where they are known. ``lm_head``: the head is
    quantized too."""
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": act_order == "group",
        "static_groups": act_order == "static",
        "true_sequential": False,
        "lm_head": lm_head,
        "checkpoint_format": _FORMATS[convention],
        "pack_dtype": "int32",
        "meta": {"quantizer": [quantizer]},
    }
    if damp is not None:
        config["damp_percent"] = damp
    if dynamic := _dynamic(scheme, own or {}, dense):
        config["dynamic"] = dynamic
    return config


def _dynamic(
    scheme: Scheme, own: Mapping[str, Scheme], dense: list[str]
) -> dict[str, dict[str, Any]]:
    """GPTQModel's way to say that a module is not quantized (-:), or in another way than the rest
    (+:): regular expressions, the first match wins. vLLM asks by the names of its own fused layers,
    so that these are matched too where all parts are alike."""
    found: dict[str, dict[str, Any]] = {}
    for name in _with_fused(dense):
        found[f"-:^{_escaped(name)}$"] = {}
    kinds: dict[Scheme, list[str]] = {}
    for name, one in own.items():
        if one != scheme:
            kinds.setdefault(one, []).append(name)
    for one, names in kinds.items():
        said = {"bits": one.bits, "group_size": one.group_size, "sym": one.symmetric}
        for name in _with_fused(names):
            found[f"+:^{_escaped(name)}$"] = said
    return found


def _with_fused(names: list[str]) -> list[str]:
    """The names, and those of fused layers that are made of them alone."""
    held = set(names)
    parents = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    fused = [
        f"{parent}.{whole}"
        for parent in parents
        for whole, parts in _FUSED.items()
        if held.issuperset(f"{parent}.{part}" for part in parts)
    ]
    return names + fused


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


def _declared_scheme(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What the configuration says about one linear, where it names it alone. Other expressions are
    not run, since a file could bring one that never ends; the tensors tell all but symmetry, and
    that as soon as they are read."""
    dynamic = config.get("dynamic")
    said = dynamic.get(f"+:^{_escaped(name)}$") if isinstance(dynamic, Mapping) else None
    return {**config, **said} if isinstance(said, Mapping) else config


def legacy_config(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """``quantize_config.json``, which AutoGPTQ and many loaders after it read."""
    return {**config, "model_name_or_path": name, "model_file_base_name": "model"}


def configuration(
    scheme: Scheme,
    dense: list[str],
    by: str,
    convention: Convention = "v1",
    *,
    own: Mapping[str, Scheme] | None = None,
    act_order: str | None = None,
    damp: float | None = None,
    lm_head: bool = False,
) -> dict[str, Any]:
    """Keys to set in config.json; see Format. With a g_idx of their own (``act_order`` group)
    linears must be kept from kernels for contiguous groups."""
    return {
        "quantization_config": quantization_config(
            scheme,
            convention,
            dense=dense,
            quantizer=by,
            own=own,
            act_order=act_order,
            damp=damp,
            lm_head=lm_head,
        )
    }


def beside(config: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """``quantize_config.json``; see Format."""
    return {CONFIG_FILE: legacy_config(config["quantization_config"], name)}
