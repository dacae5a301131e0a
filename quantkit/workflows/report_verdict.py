"""What to think of a verified model, and what in it to look at first."""

from collections import defaultdict
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from quantkit.workflows.gate import DEFAULTS
from quantkit.workflows.report_words import finite, number, percent

# A level holds while the mean KL (nats) is at most, and the top-1 agreement at least, what is usual
# for 8, 6, 4, 3 and 2 bits: the gate's limits, so that the two do not contradict each other.
_NAMES = ("same", "close", "different", "worse", "far")
LEVELS = tuple((name, kl, top1) for name, (_, kl, top1, _) in zip(_NAMES, DEFAULTS))
BROKEN = "broken"
_SHOWN = 5  # findings of one kind
_LOST = 0.5  # relative error of a layer's output that leaves nothing of it
_UNPREDICTED = 3.0  # measured / predicted, beyond what is usual for layers like it
_COMPARABLE = 3  # layers of a kind that tell what is usual for it
_THIN = 3.0  # the median of measured / predicted from which on the calibration text was thin
_OUTLIER = 10.0  # times the median of the same kind of layer
_OFFSET = 0.5  # steps that all weights of a layer lie beside the original's; rounding: under 0.1
_SMALL = 0.01  # a layer's error that is no finding, whatever the others have
_SUFFERS = 2.0  # times the median KL of the other texts


@dataclass(frozen=True)
class Layer:
    """A linear of the model. block: its number, None outside of the blocks; kind: its name in the
    block, the same in every block; held: whether the file holds what was computed, None where
    nobody recorded that."""

    name: str
    block: int | None
    kind: str
    error: float | None
    sqnr: float | None = None
    cosine: float | None = None
    predicted: float | None = None
    offset: float | None = None
    held: bool | None = None

    @property
    def ratio(self) -> float | None:
        if not finite(self.error) or not finite(self.predicted) or not self.predicted:
            return None
        return self.error / self.predicted


@dataclass(frozen=True)
class Finding:
    """A sentence: the label's key, and what to fill in."""

    key: str
    names: dict[str, object] = field(default_factory=dict)


def layers(described: dict[str, Any]) -> list[Layer]:
    """The layers in their order. Before there was more, a layer was its error only."""
    found = []
    for name, one in (described.get("layers") or {}).items():
        one = one if isinstance(one, dict) else {"error": one}
        block, kind = _place(name)
        keys = ("error", "sqnr", "cosine", "predicted", "offset", "held")
        found.append(Layer(name, block, kind, *(one.get(key) for key in keys)))
    return found


def _place(name: str) -> tuple[int | None, str]:
    """``model.layers.3.mlp.experts.7.up`` is block 3's ``mlp.experts.*.up``."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isascii() and part.isdigit()]
    if not numbers:
        return None, name
    kind = ["*" if i in numbers else part for i, part in enumerate(parts)]
    return int(parts[numbers[0]]), ".".join(kind[numbers[0] + 1 :]) or name


def level(described: dict[str, Any]) -> str | None:
    """One of LEVELS' names or BROKEN; None when nothing was measured."""
    if described.get("nonfinite"):
        return BROKEN
    if "kl" not in described or "top1" not in described:
        return None
    kl, top1 = described["kl"], described["top1"]
    if not finite(kl) or not finite(top1):
        return BROKEN
    return next((name for name, most, least in LEVELS if kl <= most and top1 >= least), BROKEN)


def findings(described: dict[str, Any]) -> list[Finding]:
    """What stands out, worst first; each layer once."""
    found = [Finding("find_nonfinite", {"name": name}) for name in described.get("nonfinite") or []]
    named = tuple(str(one.names["name"]) for one in found)
    all_layers = layers(described)
    found += [
        one
        for one in _layer_findings(all_layers)
        if not any(name.startswith(str(one.names["name"])) for name in named)
    ]
    found += _set_findings(described.get("sets") or {})
    found += _thin(all_layers, (described.get("settings") or {}).get("quantization") or {})
    size = described.get("size") or {}
    before, after = size.get("original_bytes"), size.get("bytes")
    if before and after and after > before:
        found.append(Finding("find_larger"))
    return found


def shortened(found: list[Finding], most: int = _SHOWN) -> list[tuple[Finding, int]]:
    """Not more than ``most`` of every kind, with how many more there are (at the last one)."""
    kinds: dict[str, list[Finding]] = defaultdict(list)
    for one in found:
        kinds[one.key].append(one)
    result = []
    for same in kinds.values():
        shown = same[:most]
        result += [(one, 0) for one in shown[:-1]] + [(shown[-1], len(same) - len(shown))]
    return result


def _layer_findings(all_layers: list[Layer]) -> list[Finding]:
    """Of every layer the worst that there is to say."""
    by_kind = defaultdict(list)
    for layer in all_layers:
        if finite(layer.error):
            by_kind[layer.kind].append(layer.error)
    moved = [layer for layer in all_layers if finite(layer.offset) and abs(layer.offset) >= _OFFSET]
    known = {layer.name for layer in moved}
    usual = _usual_ratios(all_layers)
    damaged, dead, lost, unpredicted, outliers = [], [], [], [], []
    for layer in sorted(all_layers, key=lambda one: -one.error if finite(one.error) else 0):
        name, error = layer.name, layer.error
        if name in known:
            continue
        if layer.held is False:
            damaged.append(Finding("find_damaged", {"name": name}))
            continue
        if not finite(error):
            dead.append(Finding("find_nan_layer", {"name": name}))
            continue
        middle = median(by_kind[layer.kind])
        if error >= _LOST:
            lost.append(Finding("find_lost", {"name": name, "error": percent(error)}))
        elif error < _SMALL:
            continue
        elif layer.held is None and (layer.ratio or 0) > _UNPREDICTED * usual.get(layer.kind, 1.0):
            names = {"predicted": percent(layer.predicted), "error": percent(error)}
            unpredicted.append(Finding("find_unpredicted", {"name": name, **names}))
        elif len(by_kind[layer.kind]) > 3 and error > _OUTLIER * middle:
            names = {"median": percent(middle), "error": percent(error)}
            outliers.append(Finding("find_outlier", {"name": name, **names}))
    return _moved(moved, len(all_layers)) + damaged + dead + lost + unpredicted + outliers


def _usual_ratios(all_layers: list[Layer]) -> dict[str, float]:
    """Measured / predicted as it is usual for layers of a kind: 1 at least.

    On text that calibration did not see layers lose more, the more so the less of it there was: two
    times or fifty, and wide inputs lose most. What layers of a kind have in common says nothing
    about the file."""
    by_kind = defaultdict(list)
    for layer in all_layers:
        if layer.ratio is not None:
            by_kind[layer.kind].append(layer.ratio)
    every = [ratio for some in by_kind.values() for ratio in some]
    return {
        kind: max(1.0, median(some if len(some) >= _COMPARABLE else every))
        for kind, some in by_kind.items()
    }


def _thin(all_layers: list[Layer], made: dict[str, Any]) -> list[Finding]:
    """What calibration promised of layers that are as they were computed, and was not kept."""
    ratios = [one.ratio for one in all_layers if one.ratio is not None and one.held is not False]
    tokens = made.get("calibration_tokens")
    if not ratios or tokens is None or median(ratios) < _THIN:
        return []
    return [Finding("find_thin", {"ratio": number(median(ratios)), "tokens": f"{tokens:,}"})]


def _moved(some: list[Layer], count: int) -> list[Finding]:
    """One finding: a convention is confused for the whole file. It points at the first layer."""
    if not some:
        return []
    steps = f"{median(layer.offset for layer in some if layer.offset is not None):+.1f}"
    names = {"name": some[0].name, "count": len(some), "all": count, "steps": steps}
    return [Finding("find_zero_points", names)]


def _set_findings(sets: dict[str, Any]) -> list[Finding]:
    kls = {label: one.get("kl") for label, one in sets.items() if finite(one.get("kl"))}
    if len(kls) < 2:
        return []
    label = max(kls, key=lambda one: kls[one])
    others = median(kl for other, kl in kls.items() if other != label)
    if kls[label] <= _SUFFERS * others or kls[label] < LEVELS[0][1]:
        return []
    return [Finding("find_set", {"set": label, "kl": number(kls[label]), "others": number(others)})]
