"""The formats that ``quantkit convert`` writes, behind one small interface.

safetensors   gptq, gptq_v2, awq, compressed-tensors, mlx
dense         plain weights in float16, bfloat16 or float32
gguf          one file, see convert_gguf.py
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit import formats
from quantkit.core.checkpoint import ShardWriter, TensorSpec, write_json
from quantkit.core.form import Form
from quantkit.core.names import in_block, natural
from quantkit.core.progress import Progress
from quantkit.core.qweight import QWeight, Scheme
from quantkit.core.source import Source
from quantkit.errors import QuantkitError, UsageError
from quantkit.formats import awq
from quantkit.formats.older_names import with_older_names
from quantkit.methods import fit
from quantkit.runtime.opened import (
    Opened,
    open_checkpoint,
    refuse_scaled_activations,
)

DENSE = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_SHORT = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
_PIECE = 1 << 22  # numbers that are compared at a time
LOSSY = "use --lossy to round what does not fit; the error is measured and printed"


# What became of a tensor: "digest" of a quantized weight, "error" where it was rounded, "rounded"
# the error of a plain tensor
Moved = dict[str, Any]


class Target(Protocol):
    """Where a conversion goes. Names are those of the source, as transformers has them."""

    @property
    def nbytes(self) -> int: ...
    @property
    def requantizes(self) -> bool:
        """Whether somebody else chooses the codes."""

    def survey(self, progress: Progress) -> list[str]:
        """See that everything fits, and plan the output; returns what the user should know. Raises
        QuantkitError when something does not fit."""

    def begin(self, folder: Path, shard: int) -> bool:
        """Open the output. False when it does not hold what an interrupted run had written."""

    def fitted(self, q: QWeight) -> fit.Fitted:
        """The weight as the target will hold it."""

    def error(self, q: QWeight, fitted: QWeight) -> float:
        """Relative error of what was written for ``q``."""

    def put(self, prefix: str, q: QWeight) -> None:
        """Write a fitted linear."""

    def put_dense(self, name: str, tensor: Tensor) -> dict[str, Moved]:
        """Write any other tensor, and say what became of it."""

    def sync(self) -> None: ...

    def close(self, folder: Path, by: str) -> None:
        """Write what goes beside the tensors; the index last."""

    def abandon(self) -> None: ...

    def reopened(self, folder: Path) -> Opened:
        """The result, read like any other checkpoint."""


def parse(to: str) -> tuple[str, str | None]:
    """``gguf:q4_0`` -> ("gguf", "q4_0"). Raises UsageError for what is no target."""
    name, _, kind = to.lower().replace("-", "_").partition(":")
    if name not in (*formats.TARGETS, "dense", "gguf") or (kind and name not in ("gguf", "dense")):
        known = [t.replace("compressed_tensors", "compressed-tensors") for t in formats.TARGETS]
        raise UsageError(
            f"'{to}' is no format to convert to", f"use {', '.join(known)}, dense or gguf:TYPE"
        )
    return name, kind or None


def target(to: str, opened: Opened, *, lossy: bool, pre_tokenizer: str | None) -> Target:
    """The target called ``to`` for this source."""
    name, kind = parse(to)
    if name == "gguf":
        from quantkit.workflows.convert_gguf import GgufTarget
        from quantkit.workflows.convert_kquants import TYPES, KQuantTarget

        if (kind or "").upper() in TYPES:
            return KQuantTarget(opened, (kind or "").upper(), pre_tokenizer)
        return GgufTarget(opened, kind, lossy, pre_tokenizer)
    if name == "dense":
        return DenseTarget(opened, kind)
    return PackedTarget(opened, name, lossy)


class SafetensorsTarget:
    """What both kinds of folders share."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.specs: dict[str, TensorSpec] = {}
        self.ones: dict[str, TensorSpec] = {}  # AWQ's scales of activations, where it wants them
        self._writer: ShardWriter | None = None

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in (self.specs | self.ones).values())

    @property
    def writer(self) -> ShardWriter:
        assert self._writer is not None
        return self._writer

    def begin(self, folder: Path, shard: int) -> bool:
        everything = self.specs | self.ones
        specs = dict(sorted(everything.items(), key=lambda item: natural(item[0])))
        self._writer = ShardWriter(folder, specs, shard)
        return self._writer.complete

    def put_dense(self, name: str, tensor: Tensor) -> dict[str, Moved]:
        if name not in self.specs:
            return {}
        self.writer.write(name, tensor)
        return {name: {}}

    def sync(self) -> None:
        self.writer.sync()

    def abandon(self) -> None:
        if self._writer:
            self._writer.abandon()

    def reopened(self, folder: Path) -> Opened:
        return open_checkpoint(Source(folder.name, folder))

    def config(self) -> dict[str, Any]:
        config = {
            key: value
            for key, value in self.opened.model_config.items()
            if key not in ("quantization_config", "quantization", "_name_or_path", "torch_dtype")
        }
        counts: dict[torch.dtype, int] = {}
        for name in self.opened.dense:
            spec = self.specs.get(name)
            if spec and spec.dtype.is_floating_point:
                counts[spec.dtype] = counts.get(spec.dtype, 0) + spec.nbytes
        dtype = max(counts, key=lambda d: counts[d], default=torch.float16)
        config["dtype"] = str(dtype).removeprefix("torch.")
        return with_older_names(config)

    def left_dense(self) -> list[str]:
        """Modules with a matrix that is not quantized, in blocks or as a head."""
        found = []
        for name in self.opened.dense:
            module, _, leaf = name.rpartition(".")
            head = module in ("lm_head", "embed_out")
            matrix = leaf == "weight" and len(self.opened.dense.spec(name).shape) == 2
            if matrix and (in_block(module) or head):
                found.append(module)
        return found


class PackedTarget(SafetensorsTarget):
    """A folder in one of formats.TARGETS."""

    requantizes = False

    def __init__(self, opened: Opened, name: str, lossy: bool) -> None:
        super().__init__(opened)
        self.format, self.lossy = formats.by_name(name), lossy
        self.form: Form = self.format.FORM
        self.scheme: Scheme | None = None  # that most linears have
        self.own: dict[str, Scheme] = {}  # of every linear
        self.ordered = False  # some linear has groups that are not contiguous
        self._name = name

    def survey(self, progress: Progress) -> list[str]:
        opened = self.opened
        if not opened.linears:
            raise QuantkitError(
                f"{opened.source.name} is not quantized, and converting does not quantize",
                "use 'quantkit gptq', or convert to dense or gguf:f16",
            )
        self._choose_groups()
        kinds: dict[str, tuple[Scheme, torch.dtype]] = {}
        rounded, notes = "", list[str]()
        for prefix, packed in opened.linears.items():
            try:
                q, exact = fit.fit(opened.survey(prefix), self.form)
                scheme, scale = q.scheme, q.scale.dtype
                notes += fit.damage(prefix, q)
                self.ordered |= q.group_of is not None
            except fit.CannotHold as error:
                if not self.lossy:
                    raise QuantkitError(f"{prefix} cannot be held: {error}", LOSSY) from error
                scheme, exact = fit.nearest_scheme(packed.scheme, self.form), False
                scale = self.form.scales[0]
            opened.release()
            if reason := self.format.refusal(packed.out, packed.width, scheme):
                raise QuantkitError(f"{prefix} cannot be held: {reason}")
            rounded = rounded or ("" if exact else prefix)
            kinds[prefix] = scheme, scale
        self._choose_schemes({prefix: scheme for prefix, (scheme, _) in kinds.items()})
        for prefix, (_, scale) in kinds.items():
            packed = opened.linears[prefix]
            specs = self.format.specs(packed.out, packed.width, self.own[prefix], scale)
            self.specs |= {f"{prefix}.{suffix}": spec for suffix, spec in specs.items()}
        self._dense_specs()
        if rounded:
            notes.append(f"{rounded} and others will be rounded; the error is measured")
        return notes

    def _choose_schemes(self, schemes: dict[str, Scheme]) -> None:
        """What the configuration will say. One asymmetric linear makes all of them so."""
        sizes = {scheme.group_size for scheme in schemes.values()}
        for prefix, scheme in schemes.items():  # one group is a row, and may be like all others
            width = self.opened.linears[prefix].width
            if scheme.group_size == -1 and width in sizes:
                schemes[prefix] = replace(scheme, group_size=width)
        first = next(iter(schemes))
        for prefix, scheme in schemes.items():
            alike = replace(scheme, symmetric=True) == replace(schemes[first], symmetric=True)
            if not alike and not self.form.mixed:
                raise QuantkitError(
                    f"{first} has {schemes[first]} and {prefix} has {scheme}, and the target has "
                    "one kind for all",
                    "gptq, compressed-tensors, gguf:TYPE and dense have a kind for each",
                )
        symmetric = all(scheme.symmetric for scheme in schemes.values())
        self.own = {prefix: replace(s, symmetric=symmetric) for prefix, s in schemes.items()}
        self.scheme = Counter(self.own.values()).most_common(1)[0][0]

    def _choose_groups(self) -> None:
        """One group size for all linears, where they do not have the same or the target has not:
        the largest in which all of them can be written. GGUF has cut every group into blocks of 32,
        which are joined again."""
        own = {packed.scheme.group_size for packed in self.opened.linears.values()}
        known = self.form.groups
        if self.opened.format != "gguf" and self.form.mixed:
            return
        if self.opened.format != "gguf" and len(own) == 1 and (not known or own <= set(known)):
            self.form = replace(self.form, groups=tuple(own) if known else ())
            return
        sizes = sorted(known, reverse=True) or [-1, 1024, 512, 256, 128, 64, 32, 16]
        for prefix in self.opened.linears:
            q = self.opened.survey(prefix)
            while sizes and q.regrouped(sizes[0]) is None:
                sizes.pop(0)
        if sizes:
            self.form = replace(self.form, groups=(sizes[0],))

    def _dense_specs(self) -> None:
        dense = self.opened.dense
        dropped = refuse_scaled_activations(self.opened)
        self.specs |= {name: dense.spec(name) for name in dense if name not in dropped}
        if self._name != "awq":
            return
        outputs = {prefix: packed.out for prefix, packed in self.opened.linears.items()}
        for name in self.left_dense():
            outputs[name] = dense.spec(f"{name}.weight").shape[0]
        self.ones = awq.activation_scales(self.opened.model_config.get("model_type", ""), outputs)

    def fitted(self, q: QWeight) -> fit.Fitted:
        assert self.scheme is not None
        found = fit_or_round(q, self.form, self.lossy)
        if found.qweight.scheme.symmetric and not self.scheme.symmetric:
            return found._replace(qweight=fit.with_zeros(found.qweight))
        return found

    def error(self, q: QWeight, fitted: QWeight) -> float:
        return fit.relative_error(q.dequantize(), fitted.dequantize())

    def put(self, prefix: str, q: QWeight) -> None:
        for suffix, tensor in self.format.pack(q).items():
            self.writer.write(f"{prefix}.{suffix}", tensor)

    def close(self, folder: Path, by: str) -> None:
        assert self.scheme is not None
        for name, spec in self.ones.items():
            self.writer.write(name, torch.ones(spec.shape, dtype=spec.dtype))
        config = self.config()
        config |= self.format.configuration(
            self.scheme,
            self.left_dense(),
            by,
            own=self.own if len(set(self.own.values())) > 1 else None,
            act_order="group" if self.ordered else None,
        )
        write_json(folder / "config.json", config)
        for file, content in self.format.beside(config, self.opened.source.name).items():
            write_json(folder / file, content)
        self.writer.close()


def fit_or_round(q: QWeight, form: Form, lossy: bool) -> fit.Fitted:
    """The weight in this form: as it is, or with ``lossy`` rounded to it. Raises QuantkitError."""
    try:
        return fit.fit(q, form)
    except fit.CannotHold as error:
        if not lossy:
            raise QuantkitError(f"a weight cannot be held: {error}", LOSSY) from error
    try:
        return fit.Fitted(fit.nearest(q, form), False)
    except fit.CannotHold as error:
        raise QuantkitError(f"a weight cannot be held, not even rounded: {error}") from error


class DenseTarget(SafetensorsTarget):
    """A folder of plain weights. ``kind`` is their dtype; by default that of the source's other
    tensors."""

    requantizes = False

    def __init__(self, opened: Opened, kind: str | None) -> None:
        super().__init__(opened)
        name = _SHORT.get(kind or "", kind)
        if name is not None and name not in DENSE:
            raise UsageError(f"'{kind}' is no dtype", "use dense:f16, dense:bf16 or dense:f32")
        self.dtype = DENSE[name] if name else self._usual()

    def _usual(self) -> torch.dtype:
        dense = self.opened.dense
        dtypes = [dense.spec(name).dtype for name in dense if len(dense.spec(name).shape) == 2]
        found = next((dtype for dtype in dtypes if dtype in DENSE.values()), torch.float16)
        return found

    def survey(self, progress: Progress) -> list[str]:
        dense = self.opened.dense
        for prefix, packed in self.opened.linears.items():
            self.specs[f"{prefix}.weight"] = TensorSpec(self.dtype, (packed.out, packed.width))
        dropped = refuse_scaled_activations(self.opened)
        for name in dense:
            if name in dropped:
                continue
            spec = dense.spec(name)
            dtype = self.dtype if spec.dtype.is_floating_point else spec.dtype
            self.specs[name] = TensorSpec(dtype, spec.shape)
        return []

    def fitted(self, q: QWeight) -> fit.Fitted:
        exact = bool(torch.equal(q.dequantize(self.dtype).float(), q.dequantize()))
        return fit.Fitted(q, exact)

    def put(self, prefix: str, q: QWeight) -> None:
        stored, _ = rounded(q.dequantize(), self.dtype, prefix)
        self.writer.write(f"{prefix}.weight", stored)

    def put_dense(self, name: str, tensor: Tensor) -> dict[str, Moved]:
        if name not in self.specs:
            return {}
        stored, error = rounded(tensor, self.specs[name].dtype, name)
        self.writer.write(name, stored)
        return {name: {"rounded": error} if error else {}}

    def error(self, q: QWeight, fitted: QWeight) -> float:
        return fit.relative_error(q.dequantize(), q.dequantize(self.dtype).float())

    def close(self, folder: Path, by: str) -> None:
        write_json(folder / "config.json", self.config())
        self.writer.close()


def rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> tuple[Tensor, float]:
    """The tensor in ``dtype``, and its relative error |t - t'|^2 / |t|^2. Raises QuantkitError for
    numbers that are too large for it."""
    stored = tensor.to(dtype)
    if stored.dtype == tensor.dtype:
        return stored, 0.0
    lost = total = 0.0
    pieces = zip(stored.reshape(-1).split(_PIECE), tensor.reshape(-1).split(_PIECE), strict=True)
    for after, before in pieces:
        after, before = after.double(), before.double()
        total += float(before.square().sum())
        if torch.equal(after, before):
            continue
        if not bool(before.isfinite().all()):
            raise QuantkitError(
                f"{name} holds infinities or no numbers (NaN)",
                "'quantkit inspect' says more; the model was damaged before",
            )
        if not bool(after.isfinite().all()):
            raise QuantkitError(
                f"{name} has values that do not fit into {str(dtype).removeprefix('torch.')}",
                "choose bfloat16 or float32",
            )
        lost += float((after - before).square().sum())
    return stored, lost / total if lost else 0.0
