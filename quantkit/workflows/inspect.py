"""``quantkit inspect``: what a model's folder holds, as its files and its tensors say."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from quantkit.core import provenance
from quantkit.core.checkpoint import Checkpoint
from quantkit.core.source import Source, resolve
from quantkit.formats import gptq


@dataclass
class Inspection:
    """kind: dense or gptq. The rest of the fields is empty where it does not apply.

    convention       of zero points, as found in the tensors (v1, v2; for asymmetric weights as
                     the configuration says)
    bits_per_weight  of packed weights, scales and zeros included
    warnings         where files and tensors disagree
    """

    name: str
    kind: str
    architecture: str
    bytes: int
    files: int
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    bits: int | None = None
    group: int | None = None
    sym: bool | None = None
    act_order: bool | None = None
    convention: str | None = None
    linears: int = 0
    bits_per_weight: float | None = None
    provenance: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)

    def described(self) -> dict[str, Any]:
        return asdict(self)


def inspect(model: str, *, revision: str | None = None) -> Inspection:
    """Look at ``model`` (``demo``, a folder or a Hub repository) without building it. Raises
    QuantkitError when it cannot be read."""
    source = resolve(model, revision)
    checkpoint = Checkpoint(source.folder)
    config = source.read_json("config.json") or {}
    specs = {name: checkpoint.spec(name) for name in checkpoint}
    packed = gptq.packed_names(specs)
    dense = {name: spec for name, spec in specs.items() if name not in packed}
    dtypes: Counter[str] = Counter()
    for spec in dense.values():
        dtypes[str(spec.dtype).removeprefix("torch.")] += _count(spec.shape)
    result = Inspection(
        name=source.name,
        kind="gptq" if packed else "dense",
        architecture=(config.get("architectures") or [config.get("model_type", "unknown")])[0],
        bytes=checkpoint.nbytes,
        files=len(checkpoint.files),
        tensors=len(specs),
        parameters=sum(dtypes.values()),
        dtypes=dict(dtypes),
        provenance=source.read_json(provenance.FILE),
    )
    if packed:
        _packed(result, source, checkpoint, sum(specs[name].nbytes for name in packed))
    return result


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _packed(result: Inspection, source: Source, checkpoint: Checkpoint, packed_bytes: int) -> None:
    """What the packed linears are, read from every one of them."""
    said = gptq.declared(source.read_json)
    if said is None:
        result.warnings.append("no file says how many bits the packed weights have")
        return
    kinds: Counter[tuple[int, int, bool, bool, str]] = Counter()
    weights = index_bytes = 0
    for prefix in gptq.linears(checkpoint):
        q, convention = gptq.read(checkpoint, prefix, said)
        scheme = q.scheme
        ordered = q.group_of is not None
        kinds[scheme.bits, scheme.group_size, scheme.symmetric, ordered, convention] += 1
        weights += q.codes.numel()
        index_bytes += 4 * q.shape[1]
    (bits, group, symmetric, ordered, convention), _ = kinds.most_common(1)[0]
    result.bits, result.group, result.sym = bits, group, symmetric
    result.act_order, result.convention = ordered, convention
    result.linears = sum(kinds.values())
    result.parameters += weights
    result.bits_per_weight = 8 * (packed_bytes - index_bytes) / weights
    if len(kinds) > 1:
        result.warnings.append(f"the linears are of {len(kinds)} different kinds")
    if convention != said.convention:
        result.warnings.append(
            f"the configuration says zero points are {said.convention}, the tensors say "
            f"{convention}; quantkit believes the tensors"
        )
