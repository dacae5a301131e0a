"""What came of a conversion, and what quantkit.json will say of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.core import provenance
from quantkit.methods import digest
from quantkit.runtime.opened import Opened, recorded
from quantkit.workflows.rounded import Rounded
from quantkit.workflows.sizes import bytes_of


@dataclass
class Conversion:
    """What came of it.

    exact    every weight means the very same number as before
    digests  of every quantized weight's numbers, in any format that holds them exactly
    errors   relative error |W - W'|^2 / |W|^2 of each linear that was rounded to fit the target
    layers   the same against the original, of each linear that was quantized on the way
    measured the quantized model against the original on held-out text, where that was done
    settings what else decided it, for quantkit.json
    dense    largest relative error of a tensor that is not quantized, and was rounded
    """

    folder: Path
    source_format: str
    target: str
    linears: int = 0
    bytes: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    layers: dict[str, float] = field(default_factory=dict)
    dense: float = 0.0
    measured: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    written: bool = False

    @property
    def exact(self) -> bool:
        return not self.errors and not self.dense

    @property
    def digest(self) -> str | None:
        """Of all quantized weights together."""
        return digest.together(self.digests) if self.digests else None

    @property
    def worst(self) -> tuple[str, float] | None:
        """The linear with the largest error."""
        return max(self.errors.items(), key=lambda item: item[1]) if self.errors else None


def made(rounded: Rounded, result: Conversion, files: dict[str, str]) -> dict[str, Any]:
    """What quantkit.json says of a checkpoint that was quantized on the way."""
    source = rounded.source
    linears = rounded.linears.values()
    return {
        "method": rounded.method,
        "source": {
            "name": source.name,
            "revision": source.revision,
            "files": files,
            "bytes": bytes_of(rounded.opened),
        },
        "settings": {**rounded.settings, "format": result.target},
        "size": {
            "bytes": result.bytes,
            "quantized_weights": sum(packed.out * packed.width for packed in linears),
            "linears": result.linears,
        },
        "layers": {
            name: {"error": error, "digest": result.digests[name]}
            for name, error in result.layers.items()
        },
        "digest": result.digest,
        "versions": provenance.versions(),
        "seconds": {"convert": round(result.seconds, 2)},
    }


def provenance_of(opened: Opened, result: Conversion, files: dict[str, str]) -> dict[str, Any]:
    """What the source's record says, and how it became what it is now. ``source`` is the original
    that was quantized; it is only known where the source was quantkit's, or is no quantized one."""
    record = recorded(opened)
    name, revision = opened.source.name, opened.source.revision
    conversion: dict[str, Any] = {
        "from": {"name": name, "revision": revision, "format": result.source_format},
        "to": result.target,
        "exact": result.exact,
        "digest": result.digest,
        "worst_error": None,
        "worst_dense_error": result.dense or None,
        "versions": provenance.versions(),
        "seconds": round(result.seconds, 2),
    }
    if result.settings:
        conversion["settings"] = result.settings
    if result.worst:
        conversion["worst_error"] = {"linear": result.worst[0], "error": result.worst[1]}
    if "conversion" in record:
        conversion["before"] = record["conversion"]
    if not result.exact:  # then it was measured on another model
        conversion["measured_before"] = record.pop("measured", None)
        record.pop("verified", None)
        record.pop("layers", None)
    if not record and not opened.linears:
        record["source"] = {"name": name, "revision": revision, "files": files}
    layers = dict(record.get("layers") or {})
    for linear, found in result.digests.items():
        layers[linear] = {**layers.get(linear, {}), "digest": found}
    record["layers"] = layers
    record.setdefault("versions", conversion["versions"])
    size = {"bytes": result.bytes, "linears": result.linears}
    return {**record, "size": size, "conversion": conversion}
