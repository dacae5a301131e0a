"""Limits on what was measured: the model passes, or it does not.

The defaults by bits are in ``DEFAULTS``; why they are what they are is in docs/verify.md.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from quantkit.core.checkpoint import write_text
from quantkit.errors import UsageError

MEAN = "mean"  # in the place of a set: over all of them
NAMES = {"kl": "mean KL", "top1": "top-1 agreement", "perplexity_ratio": "perplexity ratio"}
OPTIONS = {"kl": "--max-kl", "top1": "--min-top1", "perplexity_ratio": "--max-ppl-ratio"}
_AT_LEAST = {"top1"}  # of the others it is at most

# from so many bits a weight on: mean KL at most, top-1 agreement at least, perplexity ratio at most
DEFAULTS = (
    (7.5, 0.005, 0.96, 1.005),
    (5.5, 0.06, 0.88, 1.05),
    (3.8, 0.15, 0.80, 1.10),
    (2.8, 0.50, 0.65, 1.50),
    (0.0, 1.50, 0.42, 2.50),
)

Given = float | str | Iterable[float | str] | None


@dataclass(frozen=True)
class Limit:
    """``what`` of described()["sets"][``set``], or over all sets where it is MEAN."""

    what: str
    set: str
    limit: float


@dataclass(frozen=True)
class Gate:
    """``limits`` that were given; ``usual``: those of the model's bits too, where no other is."""

    limits: list[Limit]
    usual: bool = False

    @classmethod
    def of(cls, max_kl: Given, min_top1: Given, max_ppl_ratio: Given, usual: bool) -> "Gate":
        """Each is a number, ``SET=NUMBER``, or several of them. Raises UsageError."""
        given = {"kl": max_kl, "top1": min_top1, "perplexity_ratio": max_ppl_ratio}
        limits = [limit(what, text) for what, some in given.items() for text in _several(some)]
        for one, times in Counter((limit.what, limit.set) for limit in limits).items():
            if times > 1:
                raise UsageError(
                    f"{OPTIONS[one[0]]} is given {times} times for {one[1]}",
                    "give it once, or once for each text",
                )
        return cls(limits, usual)

    def __bool__(self) -> bool:
        return self.usual or bool(self.limits)

    def check_sets(self, labels: Iterable[str]) -> None:
        """Raises UsageError for a limit on a set that is not measured."""
        known = [MEAN, *labels]
        for limit in self.limits:
            if limit.set not in known:
                raise UsageError(
                    f"{OPTIONS[limit.what]} is for a text '{limit.set}', which is not measured",
                    f"the texts are {', '.join(known[1:])}",
                )

    def judge(self, measured: dict[str, Any], bits: float | None, nonfinite: int) -> dict[str, Any]:
        """``measured`` as Comparison.described has it. A value that is not a number passes no
        limit."""
        limits = {(limit.what, limit.set): limit.limit for limit in self.limits}
        if self.usual:
            limits = _usual(bits) | limits
        checks = [
            _check(what, label, limit, _value(measured, what, label))
            for (what, label), limit in limits.items()
        ]
        if self.usual:
            checks.append(_check("nonfinite", MEAN, 0.0, float(nonfinite)))
        return {"passed": all(check["passed"] for check in checks), "checks": checks}


def told(check: dict[str, Any]) -> str:
    """A check that did not pass, as a sentence."""
    what, value, limit = check["what"], check["value"], check["limit"]
    if what == "nonfinite":
        return f"{value:.0f} tensors or layers hold NaN or infinities"
    where = "" if check["set"] == MEAN else f" on {check['set']}"
    side = "below" if what in _AT_LEAST else "above"
    return f"{NAMES[what]}{where} {value:.4f} is {side} {OPTIONS[what]} {limit:g}"


def write_junit(path: Path, name: str, gate: dict[str, Any]) -> None:
    """The checks as a JUnit file, which most build servers show."""
    failed = [check for check in gate["checks"] if not check["passed"]]
    suite = ElementTree.Element(
        "testsuite",
        name=f"quantkit verify {name}",
        tests=str(len(gate["checks"])),
        failures=str(len(failed)),
    )
    for check in gate["checks"]:
        title = f"{check['what']} {check['set']}"
        case = ElementTree.SubElement(suite, "testcase", classname=name, name=title)
        if not check["passed"]:
            ElementTree.SubElement(case, "failure", message=told(check))
    ElementTree.indent(suite)
    text = ElementTree.tostring(suite, encoding="unicode", xml_declaration=False)
    write_text(path, f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n')


def github_summary(found: dict[str, Any]) -> str:
    """Markdown for the page of a GitHub job."""
    lines = [f"### {found['model']} against {found['against']}", ""]
    lines += ["| text | KL | top-1 | perplexity ratio |", "|---|---|---|---|"]
    lines += [
        f"| {label} | {one['kl']:.4f} | {one['top1']:.1%} | {one['perplexity_ratio']:.4f} |"
        for label, one in found["sets"].items()
    ]
    if found["gate"]:
        failed = [told(check) for check in found["gate"]["checks"] if not check["passed"]]
        lines += ["", *([f"**failed**: {text}" for text in failed] or ["**passed**"])]
    return "\n".join(lines) + "\n"


def _several(given: Given) -> list[float | str]:
    if given is None:
        return []
    return [given] if isinstance(given, (str, float, int)) else list(given)


def limit(what: str, text: float | str) -> Limit:
    """What an option says: a number or ``SET=NUMBER``. Raises UsageError."""
    label, equals, number = str(text).rpartition("=")
    try:
        most = float("nan") if equals and not label else float(number)
    except ValueError:
        most = float("nan")
    if not isfinite(most) or most < 0:
        raise UsageError(
            f"{OPTIONS[what]} takes a number or SET=NUMBER, not '{text}'",
            f"write {OPTIONS[what]} 0.9 or {OPTIONS[what]} ja=0.9",
        )
    if what == "top1" and most > 1:
        raise UsageError(
            f"{OPTIONS[what]} is a share of the predictions, at most 1",
            f"write {most / 100:g}" if most <= 100 else "write 0.9",
        )
    return Limit(what, label or MEAN, most)


def _usual(bits: float | None) -> dict[tuple[str, str], float]:
    """The limits for so many bits; a model that is not quantized is held to the strictest."""
    row = next(row for row in DEFAULTS if bits is None or bits >= row[0])
    return {(what, MEAN): limit for what, limit in zip(NAMES, row[1:])}


def _value(measured: dict[str, Any], what: str, label: str) -> float:
    found = measured if label == MEAN else measured["sets"][label]
    return float(found[what])


def _check(what: str, label: str, limit: float, value: float) -> dict[str, Any]:
    passed = value >= limit if what in _AT_LEAST else value <= limit
    return {"what": what, "set": label, "limit": limit, "value": value, "passed": passed}
