"""Charts of several models: what a size costs, and how the tokens' losses are spread."""

from dataclasses import dataclass

from quantkit.workflows.report_charts import (
    BOTTOM,
    COLOURS,
    LEFT,
    NARROW,
    RIGHT,
    TOP,
    WIDE,
    Axis,
    Size,
    grid,
    marker,
    scale,
    svg,
)
from quantkit.workflows.report_words import Words, number, percent, tag, text, tick

_RARE = 0.001  # of a model's tokens
_ROW, _RIDGE = 62, 42  # of the distributions: a model's height, and its highest bar's


@dataclass(frozen=True)
class Point:
    """A model; ``series`` is its colour and shape everywhere. ``kl`` above 0, finite; ``best``:
    nothing else is both as small and as close."""

    name: str
    series: int
    bits: float
    kl: float
    best: bool


def tradeoff(points: list[Point], words: Words) -> str:
    """KL against bits a weight. Empty without two points."""
    if len(points) < 2:
        return ""
    return "".join(_tradeoff(points, words, size) for size in (WIDE, NARROW))


def _tradeoff(points: list[Point], words: Words, size: Size) -> str:
    bits, kls = ([getattr(one, key) for one in points] for key in ("bits", "kl"))
    room = max(0.25, (max(bits) - min(bits)) * 0.12)
    x = Axis(max(0, min(bits) - room), max(bits) + room, LEFT, size.width - RIGHT, log=False)
    y = Axis(min(kls) * 0.6, max(kls) * 1.7, size.height - BOTTOM, TOP)
    parts = [grid(x, y, size, words("tradeoff_x"), words("tradeoff_y"), tick, tick)]
    front = sorted((one for one in points if one.best), key=lambda one: one.bits)
    if len(front) > 1:
        run = " ".join(f"{x.at(one.bits)},{y.at(one.kl)}" for one in front)
        parts.append(tag("polyline", points=run, class_="front"))
    places = [(x.at(one.bits), y.at(one.kl)) for one in points]
    taken = [_Box(left - 8, top - 8, 16, 16) for left, top in places]
    for one, (left, top) in zip(points, places):
        about = words.plain(
            "tradeoff_point", name=one.name, bits=number(one.bits), kl=number(one.kl)
        )
        shape = {"d": marker(one.series, left, top, 6), "class_": f"dot f{one.series % COLOURS}"}
        parts.append(tag("path", tag("title", text(about)), **shape))
        if size is WIDE:  # a phone has the legend
            parts.append(_label(one.name, left, top, taken, x))
    return svg(size, words("tradeoff"), parts)


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    width: float
    height: float

    def touches(self, other: "_Box") -> bool:
        beside = self.left >= other.left + other.width or other.left >= self.left + self.width
        return not beside and abs(self.top - other.top) < max(self.height, other.height) - 2


def _label(name: str, left: float, top: float, taken: list[_Box], x: Axis) -> str:
    """The name beside its point, where no other point or name is; none where there is no room."""
    width = 7.2 * len(name)
    for drop in (0, -13, 13):
        for side in (11, -11 - width):
            box = _Box(left + side, top - 7 + drop, width, 14)
            inside = x.start <= box.left and box.left + width <= x.end
            if inside and not any(box.touches(other) for other in taken):
                taken.append(box)
                return tag("text", text(name), x=round(box.left, 1), y=box.top + 11, class_="label")
    return ""


@dataclass(frozen=True)
class Spread:
    """How many of a model's tokens (``counts``) lie in every bin."""

    name: str
    counts: list[int]
    mean: float | None


def distributions(edges: list[float], models: list[Spread], words: Words) -> str:
    """A row for every model, in the order of its colour; empty without tokens. Bins on the left
    that hardly any token is in are left out."""
    used = [i for i in range(len(edges) - 1) if any(_seen(model, i) for model in models)]
    if not used:
        return ""
    last = max(i for i in range(len(edges) - 1) if any(model.counts[i] for model in models))
    bins = range(used[0], last + 1)
    height = TOP + _ROW * len(models) + BOTTOM
    sizes = (Size(one.width, height, one.kind) for one in (WIDE, NARROW))
    return "".join(_distributions(edges, models, bins, words, size) for size in sizes)


def _seen(model: Spread, index: int) -> bool:
    return model.counts[index] > _RARE * sum(model.counts)


def _distributions(
    edges: list[float], models: list[Spread], bins: range, words: Words, size: Size
) -> str:
    x = Axis(edges[bins[0]], edges[bins[-1] + 1], RIGHT, size.width - RIGHT)
    parts = [scale(x, size.height - BOTTOM, size, words("histogram_x"), tick)]
    most = max(model.counts[i] / max(1, sum(model.counts)) for model in models for i in bins)
    for index, model in enumerate(models):
        base = TOP + _ROW * (index + 1)
        y = Axis(0, most, base, base - _RIDGE, log=False)
        total = max(1, sum(model.counts))
        steps = [f"M{x.at(edges[bins[0]])},{base}"]
        for i in bins:
            high = y.at(model.counts[i] / total)
            steps.append(f"L{x.at(edges[i])},{high}L{x.at(edges[i + 1])},{high}")
        steps.append(f"L{x.end},{base}z")
        above = sum(model.counts[i] for i in bins if edges[i] >= 1) / total
        about = words.plain("spread", name=model.name, above=percent(above))
        shape = {"d": "".join(steps), "class_": f"ridge f{index % COLOURS}"}
        parts.append(tag("path", tag("title", text(about)), **shape))
        parts.append(tag("line", x1=x.start, x2=x.end, y1=base, y2=base, class_="axis"))
        parts.append(tag("text", text(model.name), x=x.start, y=base - _RIDGE + 2, class_="strong"))
        if model.mean and x.low <= model.mean <= x.high:
            at = x.at(model.mean)
            mean = {"x1": at, "x2": at, "y1": base - _RIDGE, "y2": base}
            parts.append(tag("line", **mean, class_="mean"))
    return svg(size, words("distributions_chart"), parts)
