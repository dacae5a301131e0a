"""GGUF as a target of ``quantkit convert``: one file that llama.cpp opens.

Quantized linears keep their codes: groups are cut into blocks of 32 that repeat the scale. Rows
(queries and keys of Llama, the fused projection of GPT-NeoX) are put into llama.cpp's order, codes
as well as plain weights. Embeddings, heads and norms stay as precise as they were.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from quantkit.core import gguf_writer
from quantkit.core.form import Form
from quantkit.core.gguf_values import Value
from quantkit.core.gguf_writer import GgufWriter
from quantkit.core.progress import Progress
from quantkit.core.qweight import QWeight, Scheme
from quantkit.core.source import Source
from quantkit.errors import QuantkitError, UsageError
from quantkit.formats import gguf, gguf_model, gguf_rotary, gguf_tokenizer, gguf_words
from quantkit.methods import digest, fit
from quantkit.runtime.gguf_opened import GgufOpened
from quantkit.runtime.opened import Opened, refuse_scaled_activations
from quantkit.workflows.convert_targets import LOSSY, Moved, fit_or_round, rounded

_BLOCK = 32  # elements of a block of every type that is written
_PLAIN = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


class GgufTarget:
    """``kind``: q4_0, q4_1, q5_0, q5_1, q8_0 for the linears, or f16, bf16, f32 for everything.
    ``types`` are those of other tensors by their names in GGUF, where they should not keep theirs.
    """

    requantizes = False

    def __init__(
        self,
        opened: Opened,
        kind: str | None,
        lossy: bool,
        pre_tokenizer: str | None,
        types: Mapping[str, str] | None = None,
    ) -> None:
        self.types = dict(types or {})
        self.opened, self.lossy, self.pre_tokenizer = opened, lossy, pre_tokenizer
        self.kind = (kind or "").upper()
        if self.kind not in gguf.FORMS and self.kind not in _PLAIN.values():
            known = ", ".join(f"gguf:{name.lower()}" for name in (*gguf.FORMS, *_PLAIN.values()))
            raise UsageError(f"'gguf:{kind or ''}' is no type that is written", f"use {known}")
        self.form = gguf.FORMS.get(self.kind)
        self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.metadata: dict[str, Value] = {}
        self._writer: GgufWriter | None = None

    @property
    def nbytes(self) -> int:
        return gguf_writer.size(self.metadata, self.tensors)

    def survey(self, progress: Progress) -> list[str]:
        opened = self.opened
        config = opened.model_config
        dropped = refuse_scaled_activations(opened)
        shapes = {n: opened.dense.spec(n).shape for n in opened.dense if n not in dropped}
        shapes |= {
            f"{p}.weight": (packed.out, packed.width) for p, packed in opened.linears.items()
        }
        self.places = gguf_model.plan(config, shapes)
        self.there = {place.source: there for there, place in self.places.items()}
        self.extra = gguf_rotary.extra_tensors(config)
        notes = gguf_model.warnings(config)
        if self.form is not None and not opened.linears and not self.lossy:
            raise QuantkitError(
                f"{opened.source.name} is not quantized, and converting does not quantize", LOSSY
            )
        self.tensors = {name: ("F32", tuple(t.shape)) for name, t in self.extra.items()}
        for there, place in self.places.items():
            shape = shapes[place.source]
            self.tensors[there] = self._type(there, place.source, shape), shape
        files = _tokenizer_files(opened)
        name = opened.source.short_name
        self.metadata = gguf_model.metadata(config, name, self.kind)
        self.metadata |= gguf_tokenizer.metadata(files, self.pre_tokenizer)
        if self.pre_tokenizer and not gguf_words.is_known(self.pre_tokenizer):
            notes.append(
                f"quantkit does not know how {self.pre_tokenizer} cuts texts: only llama.cpp, if "
                "it knows the name, can use the file"
            )
        if self.form is not None and not opened.linears:
            notes.append("the linears, which are not quantized, will be rounded to nearest")
        notes += self._see_that_all_fit()
        return notes

    def _type(self, there: str, name: str, shape: tuple[int, ...]) -> str:
        """What a tensor of the source is stored as."""
        if gguf_model.keeps_float32(shape):
            return "F32"
        packed = self._is_packed(name)
        kind = self.kind if packed else self.types.get(there)
        if (packed or kind in gguf.FORMS) and shape[-1] % _BLOCK:
            raise QuantkitError(
                f"{name} cannot be held: rows of {shape[-1]} are not whole blocks of {_BLOCK}"
            )
        if kind is not None:
            return kind
        if self.form is None:
            return self.kind
        dtype = self.opened.dense.spec(name).dtype
        if dtype not in _PLAIN:
            raise QuantkitError(f"{name} cannot be held: GGUF's plain weights are not {dtype}")
        return _PLAIN[dtype]

    def _is_packed(self, name: str) -> bool:
        if self.form is None:
            return False
        prefix = name.removesuffix(".weight")
        return prefix in self.opened.linears or (
            not self.opened.linears and gguf_model.is_linear(self.opened.model_config, name)
        )

    def _see_that_all_fit(self) -> list[str]:
        if self.form is None:
            return []
        inexact, notes = None, []
        for prefix, packed in self.opened.linears.items():
            if reason := gguf.refusal(packed.out, packed.width, _as_stored(self.form), self.kind):
                raise QuantkitError(f"{prefix} cannot be held: {reason}")
            try:
                fitted = fit.fit(self._enough(prefix, self.form), self.form)
                exact = fitted.exact
                notes += fit.damage(prefix, fitted.qweight)
            except fit.CannotHold as error:
                if not self.lossy:
                    raise QuantkitError(f"{prefix} cannot be held: {error}", LOSSY) from error
                exact = False
            self.opened.release()
            inexact = inexact or (None if exact else prefix)
        if inexact:
            notes.append(f"{inexact} and others will be rounded; the error is measured")
        return notes

    def _enough(self, prefix: str, form: Form) -> QWeight:
        """What decides whether a linear fits: its codes only where other codes, or an asymmetric
        weight, have to go into symmetric blocks."""
        q = self.opened.survey(prefix)
        alike = q.scheme.symmetric and q.scheme.bits in form.bits
        return q if alike or form.offset != "symmetric" else self.opened.qweight(prefix)

    def begin(self, folder: Path, shard: int) -> bool:
        self.file = f"{self.opened.source.short_name}-{self.kind}.gguf"
        self._writer = GgufWriter(folder / self.file, self.metadata, self.tensors)
        for name, tensor in self.extra.items():
            self._writer.write(name, gguf.pack_dense(tensor.float(), "F32"))
        return self._writer.complete

    def fitted(self, q: QWeight) -> fit.Fitted:
        if self.form is None:
            exact = torch.equal(q.dequantize(_dtype(self.kind)).float(), q.dequantize())
            return fit.Fitted(q, exact)
        return fit_or_round(q, self.form, self.lossy)

    def put(self, prefix: str, q: QWeight) -> None:
        there = self.there[f"{prefix}.weight"]
        q = self.places[there].packed(q)
        if self.form is None:
            stored, _ = rounded(q.dequantize(), _dtype(self.kind), prefix)
            raw = gguf.pack_dense(stored, self.kind)
        else:
            raw = gguf.pack(q, self.kind)
        self.writer.write(there, raw)

    def error(self, q: QWeight, fitted: QWeight) -> float:
        if self.form is None:
            return fit.relative_error(q.dequantize(), q.dequantize(_dtype(self.kind)).float())
        return fit.relative_error(q.dequantize(), fitted.dequantize())

    def put_dense(self, name: str, tensor: Tensor) -> dict[str, Moved]:
        moved: dict[str, Moved] = {}
        for there, place in self.places.items():
            if place.source != name:
                continue
            kind, _ = self.tensors[there]
            if kind in gguf.FORMS:
                put = self._put_rounded if self._is_packed(name) else self._put_lookup
                moved = put(there, name, tensor) | moved
                continue
            stored, error = rounded(tensor, _dtype(kind), name)
            self.writer.write(there, gguf.pack_dense(place.dense(stored), kind))
            moved.setdefault(name, {"rounded": error} if error else {})
        return moved

    def _put_rounded(self, there: str, name: str, tensor: Tensor) -> dict[str, Moved]:
        """A plain weight into codes."""
        assert self.form is not None
        q = fit.nearest_to(tensor, self.form)
        prefix = name.removesuffix(".weight")
        self.put(prefix, q)
        error = fit.relative_error(tensor.float(), q.dequantize())
        return {prefix: {"digest": digest.of(q), "error": error}}

    def _put_lookup(self, there: str, name: str, tensor: Tensor) -> dict[str, Moved]:
        """An embedding or a head, which readers make dense again, into codes."""
        kind, _ = self.tensors[there]
        q = fit.nearest_to(tensor, gguf.FORMS[kind])
        self.writer.write(there, gguf.pack(self.places[there].packed(q), kind))
        meant = q.dequantize()
        error = fit.relative_error(tensor.float(), meant)
        return {name: {"rounded": error, "sha256": digest.of_plain(meant)}}

    @property
    def writer(self) -> GgufWriter:
        assert self._writer is not None
        return self._writer

    def sync(self) -> None:
        self.writer.sync()

    def close(self, folder: Path, by: str) -> None:
        self.writer.close()

    def abandon(self) -> None:
        if self._writer:
            self._writer.abandon()

    def reopened(self, folder: Path) -> Opened:
        return GgufOpened(folder / self.file, Source(folder.name, folder, file=self.file))


def _as_stored(form: Form) -> Scheme:
    return Scheme(form.bits[0], form.groups[0], form.offset == "symmetric")


def _dtype(kind: str) -> torch.dtype:
    return gguf.DENSE[kind]


def _tokenizer_files(opened: Opened) -> gguf_tokenizer.Files:
    """What the source says of its tokenizer; a tokenizer.model alone is read by transformers."""
    read = opened.source.read_json
    tokenizer = read("tokenizer.json")
    if tokenizer is None:
        fast = opened.tokenizer()
        tokenizer = json.loads(fast.backend_tokenizer.to_str())
    template = opened.source.folder / "chat_template.jinja"
    return gguf_tokenizer.Files(
        tokenizer,
        read("tokenizer_config.json") or {},
        read("special_tokens_map.json") or {},
        opened.model_config,
        template.read_text("utf-8") if template.exists() else None,
    )
