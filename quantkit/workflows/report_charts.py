"""The report's charts, as inline SVG. Every chart is drawn twice, wide and for a phone, because
text in a scaled drawing would be too small to read; the style shows one of them. Colours are
classes, so that they follow the light or dark theme."""

from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any

from quantkit.workflows.report_verdict import Layer
from quantkit.workflows.report_words import (
    Words,
    finite,
    number,
    percent,
    percent_tick,
    tag,
    text,
    tick,
)

COLOURS = 10  # of series, see style.css
_ARM, _TIP = 0.4, 1.25  # half the width of a plus's arms, and their ends
_HALF = ((-_ARM, -_TIP), (_ARM, -_TIP), (_ARM, -_ARM), (_TIP, -_ARM), (_TIP, _ARM), (_ARM, _ARM))
_PLUS = (*_HALF, *((-x, -y) for x, y in _HALF))
# what marks the points of a series, behind the circle of the first one
_SHAPES = (
    ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
    ((0, 1.2), (1.15, -0.9), (-1.15, -0.9)),
    _PLUS,
    tuple(((x - y) * 0.7, (x + y) * 0.7) for x, y in _PLUS),
)
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 44


@dataclass(frozen=True)
class Size:
    width: int
    height: int
    kind: str  # the class that the style shows or hides


WIDE, NARROW = Size(920, 340, "wide"), Size(360, 300, "narrow")
_SQUARE, _SQUARE_NARROW = Size(560, 420, "wide"), Size(360, 340, "narrow")


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high`` on pixels from ``start`` to ``end``, in powers of ten or
    evenly."""

    low: float
    high: float
    start: float
    end: float
    log: bool = True

    def at(self, value: float) -> float:
        """The pixel; outside values stay at the end of the axis."""
        value = min(max(value, self.low), self.high)
        if self.log:
            part = log10(value / self.low) / log10(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return round(self.start + part * (self.end - self.start), 1)

    def ticks(self, most: int) -> list[float]:
        if not self.log:
            step = _nice((self.high - self.low) / most)
            return [
                round(i * step, 9)
                for i in range(ceil(self.low / step), floor(self.high / step) + 1)
            ]
        low, high = ceil(log10(self.low) - 1e-9), floor(log10(self.high) + 1e-9)
        if high - low < 2:
            fine = [m * 10.0**e for e in range(low - 1, high + 1) for m in (1, 2, 5)]
            return [tick for tick in fine if self.low <= tick <= self.high]
        return [10.0**e for e in range(low, high + 1, ceil((high - low + 1) / most))]


def _nice(step: float) -> float:
    """1, 2 or 5 times a power of ten, at least ``step``."""
    power: float = 10.0 ** floor(log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999)


def histogram(
    edges: list[float], counts: dict[str, list[int]], mean: float | None, words: Words
) -> str:
    """Shares of tokens by KL, the text sets on top of each other. Empty without tokens."""
    used = [i for i in range(len(edges) - 1) if any(bins[i] for bins in counts.values())]
    if not used:
        return ""
    bins = range(used[0], used[-1] + 1)
    return "".join(_histogram(edges, counts, bins, mean, words, size) for size in (WIDE, NARROW))


def _histogram(
    edges: list[float],
    counts: dict[str, list[int]],
    bins: range,
    mean: float | None,
    words: Words,
    size: Size,
) -> str:
    total = sum(sum(one) for one in counts.values())
    most = max(sum(one[i] for one in counts.values()) for i in bins) / total
    x = Axis(edges[bins[0]], edges[bins[-1] + 1], LEFT, size.width - RIGHT)
    y = Axis(0, most * 1.05, size.height - BOTTOM, TOP + 10, log=False)
    parts = [grid(x, y, size, words("histogram_x"), words("histogram_y"), tick, percent_tick)]
    for i in bins:
        left, right = x.at(edges[i]), x.at(edges[i + 1])
        below, bars, shares = 0.0, [], []
        for index, (label, one) in enumerate(counts.items()):
            top = y.at(below + one[i] / total)
            box = {"x": left, "y": top, "width": round(right - left - 1, 1)}
            height = round(y.at(below) - top, 1)
            if height > 0:
                bars.append(tag("rect", **box, height=height, class_=f"f{index % COLOURS}"))
            below += one[i] / total
            shares.append(f"{words.text_set(label)} {percent(one[i] / max(1, sum(one)))}")
        about = {"low": number(edges[i], 2), "high": number(edges[i + 1], 2)}
        summary = words.plain("bin", **about, share=percent(below))
        title = tag("title", text("; ".join([summary, *shares])))
        # the whole column answers to the pointer, however low its bar
        column = {"x": left, "y": TOP, "width": round(right - left, 1)}
        hover = tag("rect", **column, height=y.start - TOP, class_="hover")
        parts.append(tag("g", title, *bars, hover))
    if finite(mean) and mean and x.low <= mean <= x.high:
        at = x.at(mean)
        side = {"x": at - 6, "text_anchor": "end"} if at > size.width / 2 else {"x": at + 6}
        parts.append(tag("line", x1=at, x2=at, y1=TOP, y2=y.start, class_="mean"))
        label = words("histogram_mean", kl=number(mean))
        parts.append(tag("text", label, y=TOP + 10, class_="strong", **side))
    return svg(size, words("histogram_chart"), parts)


def layer_chart(layers: list[Layer], words: Words) -> str:
    """Errors over the blocks, one line for every kind of layer. Empty without an error above 0."""
    # of many layers of one kind in a block (experts), the worst
    shown: dict[tuple[str, int | None], Layer] = {}
    for layer in layers:
        before = shown.setdefault((layer.kind, layer.block), layer)
        if finite(before.error) and (not finite(layer.error) or layer.error > before.error):
            shown[layer.kind, layer.block] = layer
    return lines([*kinds([*shown.values()]).values()], words)


def lines(series: list[list[Layer]], words: Words) -> str:
    """Errors over the blocks, one line for each series. Empty without an error above 0."""
    if not any(finite(layer.error) and layer.error for same in series for layer in same):
        return ""
    return "".join(_lines(series, words, size) for size in (WIDE, NARROW))


def _lines(series: list[list[Layer]], words: Words, size: Size) -> str:
    layers = [layer for same in series for layer in same]
    blocks = sorted({layer.block for layer in layers if layer.block is not None})
    others = any(layer.block is None for layer in layers)
    last = blocks[-1] if blocks else 0
    first = blocks[0] if blocks else 0
    # what is outside of the blocks has a place of its own at the right
    x = Axis(first - 0.5, last + (1.8 if others else 0.5), LEFT, size.width - RIGHT, log=False)
    y = error_axis([layer.error for layer in layers], size.height - BOTTOM, TOP)
    radius = 4.5 if len(blocks) <= 40 else 3
    parts = [grid(x, y, size, words("block"), "", _block_name(last), percent_tick)]
    if others:
        at = x.at(last + 1.2)
        label = words("other")
        parts.append(tag("text", label, x=at, y=y.start + 18, text_anchor="middle", class_="tick"))
    for index, same in enumerate(series):
        run, dots = [], []
        for layer in same:
            at = x.at(last + 1.2 if layer.block is None else layer.block)
            if not finite(layer.error):
                dots.append(_dot(layer, words, _cross(at, y.end + 6), "nan"))
                continue
            place = at, y.at(layer.error or y.low)
            if layer.block is not None:
                run.append(place)
            dots.append(_dot(layer, words, marker(index, *place, radius), f"f{index % COLOURS}"))
        if len(run) > 1:
            points = " ".join(f"{left},{top}" for left, top in run)
            parts.append(tag("polyline", points=points, class_=f"line s{index % COLOURS}"))
        parts += dots
    return svg(size, words("layers_chart"), parts)


def predicted_chart(layers: list[Layer], words: Words) -> str:
    """Measured over predicted errors. Empty when nothing was predicted."""
    both = [layer for layer in layers if layer.ratio]
    if len(both) < 2:
        return ""
    return "".join(
        _predicted_chart(layers, both, words, size) for size in (_SQUARE, _SQUARE_NARROW)
    )


def _predicted_chart(layers: list[Layer], both: list[Layer], words: Words, size: Size) -> str:
    values = [value for layer in both for value in (layer.error, layer.predicted)]
    x = error_axis(values, LEFT, size.width - RIGHT)
    y = error_axis(values, size.height - BOTTOM, TOP)
    parts = [
        grid(x, y, size, words("predicted_x"), words("predicted_y"), percent_tick, percent_tick)
    ]
    parts.append(tag("line", x1=x.start, y1=y.start, x2=x.end, y2=y.end, class_="mean"))
    for index, same in enumerate(kinds(layers).values()):
        for layer in same:
            if layer.ratio:
                place = x.at(layer.predicted or 0), y.at(layer.error or 0)
                dot = marker(index, *place, 4.5)
                parts.append(_dot(layer, words, dot, f"f{index % COLOURS}"))
    return svg(size, words("predicted_chart"), parts)


def kinds(layers: list[Layer]) -> dict[str, list[Layer]]:
    """The layers of every kind; its place is its colour and shape."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer.kind, []).append(layer)
    return found


def marker(index: int, x: float, y: float, r: float) -> str:
    """The shape of a series, as a path: colours alone would leave some readers out."""
    which = index % (len(_SHAPES) + 1)
    if which == 0:
        return f"M{x - r},{y}a{r},{r} 0 1,0 {2 * r},0a{r},{r} 0 1,0 {-2 * r},0z"
    corners = _SHAPES[which - 1]
    return "M" + "L".join(f"{x + a * r:.1f},{y + b * r:.1f}" for a, b in corners) + "z"


def legend(names: list[str], shapes: bool = True) -> str:
    """Which series has which colour, and which shape if they differ (else all have a square)."""
    keys = (tag("li", key(i, name, i if shapes else 1)) for i, name in enumerate(names))
    return tag("ul", *keys, class_="legend")


def key(index: int, name: str, shape: int | None = None) -> str:
    """The name of a series behind its mark."""
    path = marker(index if shape is None else shape, 8, 8, 5)
    drawn = tag("path", d=path, class_=f"f{index % COLOURS}")
    mark = tag("svg", drawn, width=16, height=16, aria_hidden="true")
    return tag("span", mark, tag("span", text(name)), class_="key")


def bar(share: float, series: int) -> str:
    """A bar of a share of the whole width."""
    width = f"{max(0.0, min(1.0, share)):.1%}"
    back = tag("rect", width="100%", height=8, rx=2, class_="track")
    front = tag("rect", width=width, height=8, rx=2, class_=f"f{series % COLOURS}")
    return tag("svg", back, front, class_="bar", width="100%", height=8, aria_hidden="true")


def error_axis(values: list[float | None], start: float, end: float) -> Axis:
    real = [value for value in values if finite(value) and value]
    return Axis(min(real) * 0.75, max(real) * 1.3, start, end)


def _block_name(last: int) -> Any:
    return lambda value: f"{value:.0f}" if 0 <= value <= last and value == int(value) else ""


def _dot(layer: Layer, words: Words, path: str, kind: str) -> str:
    about = [words.plain("point", name=layer.name, error=percent(layer.error))]
    if layer.predicted is not None:
        about.append(f"{words.plain('predicted')} {percent(layer.predicted)}")
    if layer.sqnr is not None:
        about.append(f"SQNR {number(layer.sqnr)} dB")
    return tag("path", tag("title", text("; ".join(about))), d=path, class_=f"dot {kind}")


def _cross(x: float, y: float) -> str:
    return f"M{x - 5},{y - 5}l10,10M{x - 5},{y + 5}l10,-10"


def grid(x: Axis, y: Axis, size: Size, below: str, beside: str, x_name: Any, y_name: Any) -> str:
    """Axes with their ticks. ``below`` and ``beside`` are the axes' names (HTML)."""
    parts = []
    for value in y.ticks(6):
        at = y.at(value)
        parts.append(tag("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="grid"))
        name = text(y_name(value))
        parts.append(tag("text", name, x=LEFT - 7, y=at + 4, text_anchor="end", class_="tick"))
    parts.append(scale(x, y.start, size, below, x_name))
    if beside:
        turned = f"translate(12 {(y.start + y.end) / 2}) rotate(-90)"
        parts.append(tag("text", beside, transform=turned, text_anchor="middle", class_="name"))
    return "".join(parts)


def scale(x: Axis, base: float, size: Size, below: str, x_name: Any) -> str:
    """The horizontal axis at ``base``; ``below`` is its name (HTML)."""
    parts = [tag("line", x1=x.start, x2=x.end, y1=base, y2=base, class_="axis")]
    for value in x.ticks(size.width // (60 if size.kind == "narrow" else 70)):
        at, name = x.at(value), x_name(value)
        if not name:
            continue
        parts.append(tag("line", x1=at, x2=at, y1=base, y2=base + 5, class_="axis"))
        place = {"x": at, "y": base + 18, "text_anchor": "middle"}
        parts.append(tag("text", text(name), class_="tick", **place))
    middle = {"x": (x.start + x.end) / 2, "y": size.height - 6, "text_anchor": "middle"}
    parts.append(tag("text", below, class_="name", **middle))
    return "".join(parts)


def svg(size: Size, title: str, parts: list[str]) -> str:
    box = {"viewBox": f"0 0 {size.width} {size.height}", "class_": f"chart {size.kind}"}
    return tag("svg", tag("title", title), *parts, role="img", **box)
