"""Which linears will be quantized, and every tensor of the output, before any work is done."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from quantkit import formats
from quantkit.core import rules as ruling
from quantkit.core.checkpoint import TensorSpec
from quantkit.core.names import natural
from quantkit.core.qweight import Scheme
from quantkit.core.rules import Rule
from quantkit.errors import QuantkitError, UsageError
from quantkit.formats import awq
from quantkit.methods.scales import SCALE_DTYPE
from quantkit.runtime.block import features, is_linear
from quantkit.runtime.skeleton import Skeleton
from quantkit.runtime.walk import find_blocks, find_head

_BARE = re.compile(r"\bdt_proj\.weight$")  # transformers: jamba, mamba, falcon_mamba
_QUANTIZED = re.compile(r"\.(qweight|weight_packed|absmax|SCB)$")


@dataclass(frozen=True)
class Job:
    """A linear to quantize.

    name   in the model
    inner  inside its decoder block
    disk   the prefix of its tensors in files
    scheme what it is quantized to
    rtn    it is rounded to nearest, whatever the method
    """

    name: str
    inner: str
    disk: str
    out: int
    width: int
    bias: bool
    scheme: Scheme
    rtn: bool = False


@dataclass(frozen=True)
class Layout:
    """format   what linears are packed in, as formats.by_name knows it
    prefix   of the blocks' names in the model
    jobs     by block index
    dense    tensors that are copied: name on disk -> what it will be stored as
    kept     linears inside the blocks that stay dense, because their shape cannot be packed
    skipped  those that a rule leaves dense
    routers  modules of the blocks that others take for linears (what chooses experts), on disk
    dropped  tensors on disk that the model has no use for (old mask buffers and the like)
    ones     tensors of ones that a file in this format must have (see formats/awq.py)
    head     the output head, where it is quantized too
    """

    format: str
    prefix: str
    jobs: list[list[Job]]
    dense: dict[str, TensorSpec]
    kept: list[str]
    skipped: list[str]
    routers: list[str]
    dropped: list[str]
    ones: dict[str, TensorSpec]
    head: Job | None = None

    def block_jobs(self) -> list[Job]:
        return [job for block in self.jobs for job in block]

    def all_jobs(self) -> list[Job]:
        """Those of the blocks, and the head's."""
        return self.block_jobs() + ([self.head] if self.head else [])

    def own_schemes(self) -> dict[str, Scheme]:
        """The scheme of every linear by its name in the model, where they are not all alike."""
        found = {job.name: job.scheme for job in self.all_jobs()}
        return found if len(set(found.values())) > 1 else {}

    def packed(self, job: Job) -> dict[str, TensorSpec]:
        """The tensors of a quantized weight by suffix."""
        packer = formats.by_name(self.format)
        return packer.specs(job.out, job.width, job.scheme, SCALE_DTYPE)

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the output, in an order that keeps blocks together."""
        found = self.dense | self.ones
        for job in self.all_jobs():
            for suffix, spec in self.packed(job).items():
                found[f"{job.disk}.{suffix}"] = spec
            if job.bias:
                found[f"{job.disk}.bias"] = TensorSpec(torch.float16, (job.out,))
        return dict(sorted(found.items(), key=lambda item: natural(item[0])))


def lay_out(
    skeleton: Skeleton,
    scheme: Scheme,
    format: str,
    rules: Sequence[Rule] = (),
    lm_head: bool = False,
) -> Layout:
    """Plan the output, packed in the format called ``format``; linears have ``scheme``, or what
    ``rules`` make of it, and with ``lm_head`` the output head too. Raises QuantkitError for a
    checkpoint that is already quantized, keeps its experts fused, lacks tensors or holds some of
    another shape; UsageError when the group does not divide some linear's width, for rules that
    match nothing, for schemes that cannot be side by side in the format, and for a head that is the
    embedding or cannot be packed."""
    _refuse_quantized(skeleton)
    model, disk_names = skeleton.model, skeleton.disk_names
    prefix, blocks = find_blocks(model)
    refuse_unpackable(prefix, blocks.named_parameters())
    skeleton.check()
    packer = formats.by_name(format)
    jobs: list[list[Job]] = []
    kept: list[str] = []
    skipped: list[str] = []
    routers: list[str] = []
    linears: list[str] = []
    taken: set[str] = set()
    for index, block in enumerate(blocks):
        jobs.append([])
        for inner, module in block.named_modules():
            name = f"{prefix}.{index}.{inner}"
            weight = disk_names.get(f"{name}.weight")
            if not is_linear(module):
                if weight and _routes(module):
                    routers.append(weight.removesuffix(".weight"))
                continue
            out, width = features(module)
            if weight is None:
                raise QuantkitError(
                    f"the weight of {name} is not one tensor in the checkpoint",
                    "please report the architecture",
                )
            refuse_coded(weight, skeleton.checkpoint.spec(weight).dtype)
            linears.append(name)
            setting = ruling.setting(rules, name, scheme)
            if setting.skip:
                skipped.append(name)
                continue
            _check_bits(name, setting.scheme, format)
            if packer.refusal(out, width, setting.scheme):
                kept.append(name)
                continue
            bias = disk_names.get(f"{name}.bias") if module.bias is not None else None
            taken.update(filter(None, (weight, bias)))
            disk = weight.removesuffix(".weight")
            job = Job(name, inner, disk, out, width, bias is not None, setting.scheme, setting.rtn)
            jobs[-1].append(job)
    head = None
    if lm_head:
        name, head = _head(skeleton, scheme, format, rules)
        linears.append(name)
        if head is None:
            skipped.append(name)
        else:
            taken.update({f"{head.disk}.weight", *([f"{head.disk}.bias"] if head.bias else [])})
    ruling.check_matches(rules, linears)
    everything = [job for block in jobs for job in block] + ([head] if head else [])
    _check_groups(everything, skipped)
    _check_mixture(everything, format)
    expected = model.state_dict().keys()
    dropped = [disk for disk, live in skeleton.live_names.items() if live not in expected]
    dense = {
        name: _stored(skeleton.checkpoint.spec(name))
        for name in skeleton.checkpoint
        if name not in taken and name not in dropped
    }
    ones = _ones(skeleton, jobs, dense) if format == "awq" else {}
    return Layout(format, prefix, jobs, dense, kept, skipped, routers, dropped, ones, head)


def _routes(module: torch.nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and not isinstance(module, torch.nn.Embedding)


def _head(
    skeleton: Skeleton, scheme: Scheme, format: str, rules: Sequence[Rule]
) -> tuple[str, Job | None]:
    """The name of the output head, and its job unless a rule leaves it dense."""
    model, disk_names = skeleton.model, skeleton.disk_names
    name, module = find_head(model)
    weight = disk_names.get(f"{name}.weight")
    # a stored copy of a tied head does not help: readers take the embedding in its place
    if weight is None or f"{name}.weight" in model.all_tied_weights_keys:
        raise UsageError(
            f"the output head of {skeleton.source.name} is tied to the embedding, which has to "
            "stay as it is",
            "leave out --lm-head",
        )
    setting = ruling.setting(rules, name, scheme)
    if setting.skip:
        return name, None
    out, width = features(module)
    _check_bits(name, setting.scheme, format)
    if reason := formats.by_name(format).refusal(out, width, setting.scheme):
        raise UsageError(f"the output head cannot be packed: {reason}", "leave out --lm-head")
    bias = module.bias is not None
    disk = weight.removesuffix(".weight")
    return name, Job(name, name, disk, out, width, bias, setting.scheme, setting.rtn)


def _ones(
    skeleton: Skeleton, jobs: list[list[Job]], dense: dict[str, TensorSpec]
) -> dict[str, TensorSpec]:
    """Scales of activations that are not scaled, which AWQ's readers want for some models."""
    outputs = {job.disk: job.out for block in jobs for job in block}
    for name, spec in dense.items():
        if name.endswith(".weight") and len(spec.shape) == 2:
            outputs[name.removesuffix(".weight")] = spec.shape[0]
    return awq.activation_scales(skeleton.config.model_type, outputs)


def _refuse_quantized(skeleton: Skeleton) -> None:
    name = next((name for name in skeleton.checkpoint if _QUANTIZED.search(name)), None)
    if name is not None or getattr(skeleton.config, "quantization_config", None):
        raise QuantkitError(
            f"{skeleton.source.name} is already quantized"
            + (f" ({name})" if name else " (config.json says so)"),
            "quantize the full-precision original; 'quantkit inspect' names it if it is recorded",
        )


def refuse_coded(name: str, dtype: torch.dtype) -> None:
    """Raises QuantkitError for a weight that is not plain numbers of half precision or more."""
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise QuantkitError(
            f"{name} is {str(dtype).removeprefix('torch.')}: it is already quantized",
            "quantize the full-precision original",
        )


def refuse_unpackable(prefix: str, parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Raises QuantkitError, naming it, for a parameter that holds several experts, and for a linear
    whose weight its block multiplies with itself. Convolutions over tokens stay as they are."""
    for name, parameter in parameters:
        shape = tuple(parameter.shape)
        if parameter.dim() == 3 and shape[1] > 1:
            raise QuantkitError(
                f"{prefix}.{name} holds {shape[0]} experts in one tensor {shape}, and quantkit "
                "only quantizes separate linears",
                "experts are quantized where the checkpoint has each as linears of its own "
                "(Mixtral, Qwen, DeepSeek and others)",
            )
        if _BARE.search(name):
            raise QuantkitError(
                f"{prefix}.{name} is used by itself, not by a linear, so that it cannot be packed",
                "state spaces of Mamba's first kind are not supported yet",
            )


def _check_groups(jobs: list[Job], skipped: Sequence[str]) -> None:
    if not jobs and skipped:
        raise UsageError("the rules skip every linear, so there is nothing to quantize")
    if not jobs:
        raise QuantkitError("the model has no linear that could be quantized")
    wrong = [job for job in jobs if job.width % job.scheme.width(job.width)]
    if wrong:
        wrong.sort(key=lambda job: job.width)
        widths = sorted({job.width for job in wrong})
        fitting = [g for g in (128, 64, 32, 16) if not any(job.width % g for job in jobs)]
        raise UsageError(
            f"group size {wrong[0].scheme.group_size} does not divide the input widths "
            f"{', '.join(map(str, widths))} (for example {wrong[0].name})",
            f"use --group {fitting[0]}" if fitting else "use --group -1, one scale a row",
        )


def _check_bits(name: str, scheme: Scheme, format: str) -> None:
    known = formats.by_name(format).FORM.bits
    if scheme.bits not in known:
        raise UsageError(
            f"{name} cannot have {scheme.bits} bits in the format {_shown(format)}",
            f"it has {', '.join(map(str, known))}",
        )


def _check_mixture(jobs: list[Job], format: str) -> None:
    """Whether the format has a place for all the schemes together."""
    other = next((job for job in jobs if job.scheme != jobs[0].scheme), None)
    if other and not formats.by_name(format).FORM.mixed:
        raise UsageError(
            f"the format {_shown(format)} has one scheme for all linears, and {jobs[0].name} would "
            f"have {jobs[0].scheme}, {other.name} {other.scheme}",
            "use --format gptq or compressed-tensors, or rules that only skip",
        )


def _shown(format: str) -> str:
    return format.replace("compressed_tensors", "compressed-tensors")


def _stored(spec: TensorSpec) -> TensorSpec:
    """Dense tensors keep 16-bit dtypes; float32 becomes float16, as quantized models are run."""
    return TensorSpec(torch.float16, spec.shape) if spec.dtype == torch.float32 else spec
