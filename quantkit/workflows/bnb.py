"""``quantkit bnb``: NF4, FP4 and int8 checkpoints that bitsandbytes loads, made without it.

Shard by shard, with the weights of one linear in memory, on any machine; the bytes are those that
transformers and bitsandbytes write on a CPU.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.core.checkpoint import write_json
from quantkit.core.names import in_block
from quantkit.core.progress import Progress
from quantkit.core.qweight import QWeight, Scheme
from quantkit.core.source import resolve
from quantkit.errors import QuantkitError, UsageError
from quantkit.formats import bnb
from quantkit.methods import fit, nf4
from quantkit.runtime.opened import open_checkpoint, refuse_scaled_activations
from quantkit.workflows.ahead import on_cores
from quantkit.workflows.convert import carry
from quantkit.workflows.convert_record import Conversion
from quantkit.workflows.convert_targets import SafetensorsTarget
from quantkit.workflows.output import Output
from quantkit.workflows.rounded import Rounded, Rounding

_SCHEMES = {
    "nf4": Scheme(4, nf4.BLOCK, True, "nf4"),
    "fp4": Scheme(4, nf4.BLOCK, True, "fp4"),
    "int8": Scheme(8, -1),
}
_COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PLAIN = (torch.float16, torch.bfloat16, torch.float32)


def quantize_bnb(
    model: str,
    out: str | Path | None = None,
    *,
    type: str = "nf4",
    double_quant: bool | None = None,
    compute_dtype: str = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    low_disk: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Quantize the linears inside the blocks of ``model`` (``demo``, a folder, or a Hub repository)
    as bitsandbytes does and write it to ``out``. All other tensors stay as they are.

    type           nf4, fp4 or int8
    double_quant   store the scales of 4-bit blocks in 8 bits (the default): 4.13 instead of 4.5
                   bits a weight
    compute_dtype  what 4-bit matmuls compute in: bf16, fp16 (for a T4, which has no bf16), or auto:
                   bf16 where the model is stored in it, else fp16
    low_disk       leave the weights on the Hub, and read them tensor by tensor (with double_quant
                   twice, see BnbTarget.survey)

    Raises UsageError for options that are not known, QuantkitError for a model that cannot be
    quantized, both before anything is written. An interrupted call goes on when repeated.
    """
    if type not in _SCHEMES:
        raise UsageError(f"'{type}' is no type of bitsandbytes", f"use {', '.join(_SCHEMES)}")
    if compute_dtype not in (*_COMPUTE, "auto"):
        raise UsageError(f"'{compute_dtype}' is no compute dtype", "use bf16, fp16 or auto")
    if type == "int8" and (double_quant or compute_dtype != "auto"):
        raise UsageError(
            "int8 has no double quantization and no compute dtype", "leave them out, or use nf4"
        )
    scheme = _SCHEMES[type]
    nested = type != "int8" and double_quant is not False

    def rounder(weight: Tensor) -> Rounding:
        return _round(weight, scheme, nested)

    source = resolve(model, revision, low_disk=low_disk)
    settings: dict[str, Any] = {"type": type, "double_quant": nested}
    opened = Rounded(open_checkpoint(source), rounder, "bnb", settings)
    for prefix, (rows, width) in opened.shapes.items():
        if reason := bnb.refusal(rows, width, scheme):
            raise QuantkitError(f"{prefix} cannot be held: {reason}")
    compute = _COMPUTE.get(compute_dtype) or _usual(opened)
    if type != "int8":
        settings["compute_dtype"] = str(compute).removeprefix("torch.")
    return carry(
        opened,
        BnbTarget(opened, scheme, nested, compute),
        "bnb",
        Output(Path(out) if out else Path(f"{source.short_name}-bnb-{type}"), overwrite),
        settings={"method": "bnb", **settings},
        max_shard_size=max_shard_size,
        dry_run=dry_run,
        progress=progress,
    )


def _round(weight: Tensor, scheme: Scheme, double_quant: bool) -> Rounding:
    if scheme.grid == "int":
        return Rounding(nf4.quantize_int8(weight))
    q = nf4.quantize(weight, scheme)
    if not double_quant:
        return Rounding(q)
    nested = nf4.nest(q.scale)
    return Rounding(replace(q, scale=nested.dequantize().reshape(q.scale.shape)), nested)


def _usual(opened: Rounded) -> torch.dtype:
    """bfloat16 if the linears are stored in it."""
    name = next(iter(opened.linears))
    dtype = opened.opened.dense.spec(f"{name}.weight").dtype
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


class BnbTarget(SafetensorsTarget):
    """A folder in the format of bitsandbytes, as transformers saves it."""

    requantizes = False

    def __init__(
        self, opened: Rounded, scheme: Scheme, double_quant: bool, compute: torch.dtype
    ) -> None:
        super().__init__(opened)
        self.rounded, self.scheme = opened, scheme
        self.double_quant, self.compute = double_quant, compute

    def survey(self, progress: Progress) -> list[str]:
        """With double quantization this reads every weight once: the mean of its scales is written
        as a text, whose length has to be known."""
        for prefix, packed in self.rounded.linears.items():
            offset = None
            if self.double_quant:
                with on_cores(1):
                    offset = nf4.offset(self.rounded.weight(prefix), self.scheme)
                self.rounded.release()
            dtype = self._dtype(prefix)
            specs = bnb.specs(packed.out, packed.width, self.scheme, dtype=dtype, offset=offset)
            self.specs |= {f"{prefix}.{suffix}": spec for suffix, spec in specs.items()}
        dense = self.opened.dense
        dropped = refuse_scaled_activations(self.opened)
        self.specs |= {name: dense.spec(name) for name in dense if name not in dropped}
        return []

    def _dtype(self, prefix: str) -> torch.dtype:
        dtype = self.rounded.opened.dense.spec(f"{prefix}.weight").dtype
        if dtype not in _PLAIN:
            raise QuantkitError(f"{prefix}.weight is {dtype}, which bitsandbytes does not quantize")
        return dtype

    def fitted(self, q: QWeight) -> fit.Fitted:
        return fit.Fitted(q, True)

    def error(self, q: QWeight, fitted: QWeight) -> float:
        return 0.0

    def put(self, prefix: str, q: QWeight) -> None:
        nested = self.rounded.rounding(prefix).nested
        for suffix, tensor in bnb.pack(q, nested, self._dtype(prefix)).items():
            self.writer.write(f"{prefix}.{suffix}", tensor)

    def close(self, folder: Path, by: str) -> None:
        config = self.config()
        # transformers leaves heads out by itself, and writes no list for them alone
        dense = [module for module in self.left_dense() if in_block(module)]
        config |= bnb.configuration(self.scheme, dense, by, self.double_quant, self.compute)
        write_json(folder / "config.json", config)
        self.writer.close()
