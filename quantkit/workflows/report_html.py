"""The report of one model: an HTML file for eyes, from what ``Verification.described()`` says.

What cannot be seen without a mouse (titles of points and tokens) is in a table too.
"""

from pathlib import Path
from typing import Any

from quantkit.workflows import report_page
from quantkit.workflows import report_passages as passages
from quantkit.workflows import report_sections as sections
from quantkit.workflows.report_verdict import BROKEN, LEVELS, findings, level, shortened
from quantkit.workflows.report_words import Words, finite, number, percent, tag, text


def write(described: dict[str, Any], path: Path, lang: str = "en") -> None:
    """Write the report of ``described`` (what it lacks is left out) to ``path``.

    A token's KL is taken as that of the predictions made after it, as core/metrics measures them.
    Raises UsageError for a language without labels, QuantkitError when the file cannot be written.
    """
    report_page.save(page(described, Words(lang)), path)


def page(described: dict[str, Any], words: Words) -> str:
    """The whole document."""
    parts = [
        section(described, words)
        for section in (
            _findings,
            sections.numbers,
            sections.gate,
            sections.sets,
            sections.histogram,
            sections.layer_errors,
            passages.worst,
            passages.samples,
            sections.settings,
            sections.notes,
        )
    ]
    title = words("title", model=described.get("model", ""))
    return report_page.document(title, _headline(described, words), parts, words)


def _headline(d: dict[str, Any], words: Words) -> str:
    """The verdict, in words before numbers."""
    found = level(d)
    parts = [
        tag("p", words("kicker"), class_="kicker"),
        tag("h1", text(d.get("model", ""))),
    ]
    if d.get("against"):
        parts.append(tag("p", words("against", against=d["against"]), class_="against"))
    if found is not None:
        parts += _verdict(d, found, words)
    return tag("header", *parts)


def _verdict(d: dict[str, Any], found: str, words: Words) -> list[str]:
    badge = ""
    if d.get("gate"):
        passed = d["gate"]["passed"]
        sign, key = ("✓ ", "gate_passed") if passed else ("✗ ", "gate_failed")
        badge = tag("span", sign, words(key), class_="passed" if passed else "failed")
    steps = [
        tag(
            "li",
            words(f"scale_{name}"),
            class_=f"v-{name}" if name == found else None,
            aria_current="true" if name == found else None,
        )
        for name in (*(name for name, _, _ in LEVELS), BROKEN)
    ]
    kl, top1 = d.get("kl"), d.get("top1")
    summary = (
        words("summary", top1=percent(top1), kl=number(kl))
        if finite(kl) and finite(top1)
        else words("summary_nan")
    )
    return [
        tag(
            "p",
            tag("span", words(found), class_=f"verdict v-{found}"),
            " ",
            badge,
            class_="verdict-line",
        ),
        tag("p", summary, class_="summary"),
        tag("ol", *steps, class_="scale", aria_label=words.plain("scale")),
    ]


def _findings(d: dict[str, Any], words: Words) -> str:
    items = [tag("li", sections.finding(*one, words)) for one in shortened(findings(d))]
    return sections.section(words, "findings", tag("ul", *items)) if items else ""
