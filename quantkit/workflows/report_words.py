"""What the report says: HTML elements, labels in one language, and numbers as people read them.

Text from models and files comes into the page through :func:`text` only (labels and attributes pass
there too), so nothing that a token holds can become markup.
"""

import html
import json
from math import floor, isfinite, isnan, log10
from typing import Any, TypeGuard

from quantkit import data
from quantkit.errors import UsageError

NOTHING = "–"
_VOID = {"meta", "br", "input"}
# what would be invisible, or not allowed in HTML, is shown by its picture
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_PICTURES[127] = "␡"


def languages() -> list[str]:
    return sorted(file.stem for file in data.report().glob("*.json"))


class Words:
    """The labels of one language. ``words("key", name=...)`` is HTML: the label with the names
    filled in, both escaped."""

    def __init__(self, lang: str) -> None:
        """Raises UsageError for a language that there are no labels in."""
        if lang not in languages():
            raise UsageError(
                f"there is no report in '{lang}'", f"choose one of {', '.join(languages())}"
            )
        self.lang = lang
        file = data.report() / f"{lang}.json"
        self.labels: dict[str, str] = json.loads(file.read_text("utf-8"))

    def __call__(self, key: str, **names: object) -> str:
        return text(self.labels[key]).format(**{name: text(one) for name, one in names.items()})

    def around(self, key: str, **parts: str) -> str:
        """The same, around parts that are HTML already."""
        return text(self.labels[key]).format(**parts)

    def plain(self, key: str, **names: object) -> str:
        """The same, not yet escaped: for attributes, and as a name in another label."""
        return self.labels[key].format(**names)

    def text_set(self, label: str) -> str:
        """A text set's name, not escaped: ours have one in this language, files keep theirs."""
        return self.labels.get(f"set_{label}", label)


def text(content: object) -> str:
    """Anything as HTML text, safe in an attribute too."""
    kept = str(content).encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair
    return html.escape(kept.translate(_PICTURES))


def tag(name: str, /, *children: str, **attributes: object) -> str:
    """An element. Children are HTML; attributes are text: None and False leave one out, True needs
    no value, ``class_`` is class and ``aria_label`` aria-label."""
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{text(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return f"<{name}{written}>" + ("" if name in _VOID else "".join(children) + f"</{name}>")


def token(content: str) -> str:
    """A token by itself, with its blanks visible (HTML)."""
    shown = text(content)
    for blank, picture in ((" ", "␣"), ("\n", "↵"), ("\t", "⇥"), ("　", "□")):
        shown = shown.replace(blank, tag("span", picture, class_="blank"))
    return tag("bdi", shown, class_="token")


def number(value: Any, digits: int = 3) -> str:
    """``digits`` significant digits, no exponent down to a millionth: 0.0871, 5.32, 12,345."""
    if value is None:
        return NOTHING
    if not isfinite(value):
        return "NaN" if isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    if abs(value) < 1e-6:
        return f"{value:.{digits - 1}e}"
    places = max(0, digits - 1 - floor(log10(abs(value))))
    return f"{value:,.{places}f}".replace("-", "−")


def with_error(value: Any, error: Any, share: bool = False) -> tuple[str, str]:
    """0.0871 and ± 0.0016, to the place where the error has its second digit; of a share, 81.8% and
    ± 0.9. Without an error the second is empty."""
    if not finite(value) or not finite(error) or not error:
        return (percent(value) if share else number(value)), ""
    if share:
        value, error = value * 100, error * 100
        places = 2 if error < 0.1 else 1
    else:
        places = min(6, max(0, 1 - floor(log10(error))))
    shown = f"{value:,.{places}f}".replace("-", "−")
    return shown + ("%" if share else ""), f"± {error:.{places}f}"


def percent(value: Any) -> str:
    """0.811 is 81.1%; small shares keep two digits (0.21%, 0.0034%)."""
    if value is None or not isfinite(value):
        return number(value)
    if value and abs(value) < 0.01:
        return f"{number(value * 100, 2)}%"
    return f"{value:.1%}".replace("-", "−")


def tick(value: float) -> str:
    """A round number on an axis: 0.05, 1, 10⁻⁶."""
    if 0 < value < 0.001:
        return "10" + str(round(log10(value))).translate(
            str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
        )
    return f"{value:g}"


def percent_tick(value: float) -> str:
    return f"{value * 100:.6g}%"


def change(ratio: Any) -> str:
    """1.047 is +4.7%."""
    if ratio is None or not isfinite(ratio):
        return number(ratio)
    return f"{ratio - 1:+.1%}".replace("-", "−")


def size(count: Any) -> str:
    """Bytes in decimal units, as disks are sold: 5.87 MB."""
    if count is None:
        return NOTHING
    for unit, step in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{number(count / step)} {unit}"
    return f"{count} B"


def finite(value: Any) -> TypeGuard[float]:
    return value is not None and isfinite(value)
