"""``quantkit inspect``: what a model's folder holds, as its files and its tensors say."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from quantkit.core import provenance
from quantkit.core.qweight import Scheme
from quantkit.core.source import resolve
from quantkit.formats import gptq
from quantkit.runtime.opened import Opened, open_checkpoint


@dataclass
class Inspection:
    """kind: dense, or the format's name. The rest of the fields is empty where it does not apply.

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
    opened = open_checkpoint(resolve(model, revision))
    config = opened.source.read_json("config.json") or {}
    dtypes: Counter[str] = Counter()
    for name in opened.dense:
        spec = opened.dense.spec(name)
        dtypes[str(spec.dtype).removeprefix("torch.")] += prod(spec.shape)
    result = Inspection(
        name=opened.source.name,
        kind=opened.format,
        architecture=(config.get("architectures") or [config.get("model_type", "unknown")])[0],
        bytes=opened.tensors.nbytes,
        files=len(opened.tensors.files),
        tensors=sum(1 for _ in opened.tensors),
        parameters=sum(dtypes.values()),
        dtypes=dict(dtypes),
        provenance=opened.source.read_json(provenance.FILE),
    )
    if opened.linears:
        _packed(result, opened)
    return result


def _packed(result: Inspection, opened: Opened) -> None:
    """What the packed linears are, read from every one of them."""
    kinds: Counter[tuple[Scheme, bool, str | None]] = Counter()
    weights = packed_bytes = 0
    for prefix in opened.linears:
        convention = None
        if opened.format == "gptq":
            q, convention = gptq.read_with_convention(opened.tensors, prefix, opened.config)
        else:
            q = opened.qweight(prefix)
        kinds[q.scheme, q.group_of is not None, convention] += 1
        weights += q.codes.numel()
        names = [name for name in opened.names(prefix) if not name.endswith(".g_idx")]
        packed_bytes += sum(opened.tensors.spec(name).nbytes for name in names)
    (scheme, ordered, convention), _ = kinds.most_common(1)[0]
    result.bits, result.group, result.sym = scheme.bits, scheme.group_size, scheme.symmetric
    result.act_order, result.convention = ordered, convention
    result.linears = sum(kinds.values())
    result.parameters += weights
    result.bits_per_weight = 8 * packed_bytes / weights
    if len(kinds) > 1:
        result.warnings.append(f"the linears are of {len(kinds)} different kinds")
    said = gptq.declared_convention(opened.config) if convention else None
    if convention != said:
        result.warnings.append(
            f"the configuration says zero points are {said}, the tensors say {convention}; "
            "quantkit believes the tensors"
        )
