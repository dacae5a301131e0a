"""The speeds of a bench as one SVG file: decoding over the length of the prompt, a line for every
batch size."""

from quantkit.workflows.bench import Bench
from quantkit.workflows.report_charts import Axis, marker
from quantkit.workflows.report_words import tag, text

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 110, 48, 48
_COLOURS = ("#2a6fbb", "#d1495b", "#2e933c", "#8d5a97", "#b07d12")
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#333}.title{font-size:15px;font-weight:600}"
    ".grid{stroke:#ddd}.axis{stroke:#888}.line{fill:none;stroke-width:2}"
)


def chart(found: Bench) -> str:
    """An SVG document."""
    lengths = sorted({row.context for row in found.rows})
    most = max(row.decode for row in found.rows)
    x = Axis(lengths[0] * 0.9, lengths[-1] * 1.1, _LEFT, _WIDTH - _RIGHT)
    y = Axis(0, most * 1.1, _HEIGHT - _BOTTOM, _TOP, log=False)
    parts = [tag("style", _STYLE), tag("rect", width=_WIDTH, height=_HEIGHT, fill="#fff")]
    parts.append(tag("text", text(_title(found)), x=_LEFT, y=24, class_="title"))
    for value in y.ticks(6):
        at = y.at(value)
        parts.append(tag("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", f"{value:g}", x=_LEFT - 8, y=at + 4, text_anchor="end"))
    for length in lengths:
        place = {"x": x.at(length), "y": y.start + 20, "text_anchor": "middle"}
        parts.append(tag("text", str(length), **place))
    parts.append(tag("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"))
    middle = {"x": (x.start + x.end) / 2, "y": _HEIGHT - 8, "text_anchor": "middle"}
    parts.append(tag("text", "tokens of the prompt", **middle))
    turned = f"translate(16 {(y.start + y.end) / 2}) rotate(-90)"
    parts.append(tag("text", "tokens/s", transform=turned, text_anchor="middle"))
    for index, size in enumerate(sorted({row.batch for row in found.rows})):
        parts += _line(found, size, index, x, y)
    box = {"viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "xmlns": "http://www.w3.org/2000/svg"}
    return tag("svg", *parts, role="img", **box) + "\n"


def _line(found: Bench, size: int, index: int, x: Axis, y: Axis) -> list[str]:
    rows = sorted((row for row in found.rows if row.batch == size), key=lambda row: row.context)
    points = [(x.at(row.context), y.at(row.decode)) for row in rows]
    colour = _COLOURS[index % len(_COLOURS)]
    path = "M" + "L".join(f"{a},{b}" for a, b in points)
    dots = [tag("path", d=marker(index, a, b, 4), fill=colour) for a, b in points]
    last = points[-1]
    name = tag("text", f"batch {size}", x=last[0] + 12, y=last[1] + 4, fill=colour)
    return [tag("path", d=path, class_="line", stroke=colour), *dots, name]


def _title(found: Bench) -> str:
    precision = f", {found.dtype}" if found.dtype else ""
    return f"{found.model}: decoding with {found.engine} on {found.device}{precision}"
