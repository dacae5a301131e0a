"""The verification report: one HTML file for eyes, from what ``Verification.described()`` says.

It loads nothing, from nowhere, and holds no script: its Content-Security-Policy allows one inline
style, by its hash, and nothing else. What cannot be seen without a mouse (titles of points and
tokens) is in a table too.
"""

from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

from quantkit import __version__, data
from quantkit.core.checkpoint import write_text
from quantkit.errors import QuantkitError
from quantkit.workflows import report_passages as passages
from quantkit.workflows import report_sections as sections
from quantkit.workflows.report_verdict import BROKEN, LEVELS, findings, level, shortened
from quantkit.workflows.report_words import Words, finite, number, percent, tag, text


def write(described: dict[str, Any], path: Path, lang: str = "en") -> None:
    """Write the report of ``described`` (what it lacks is left out) to ``path``.

    A token's KL is taken as that of the predictions made after it, as core/metrics measures them.
    Raises UsageError for a language without labels, QuantkitError when the file cannot be written.
    """
    content = page(described, Words(lang))
    try:
        write_text(path, content)
    except OSError as error:
        raise QuantkitError(
            f"the report cannot be written to {path}: {error.strerror}",
            "choose another file, in a folder that exists",
        ) from error


def page(described: dict[str, Any], words: Words) -> str:
    """The whole document."""
    style = (data.report() / "style.css").read_text("utf-8")
    allowed = b64encode(sha256(style.encode("utf-8")).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; style-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    )
    title = words("title", model=described.get("model", ""))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        f"<style>{style}</style>",
    )
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
    footer = tag("footer", tag("p", words("made_by", version=__version__)))
    main = tag("main", *parts, sections.glossary(words))
    body = tag("body", _headline(described, words), main, footer)
    return "<!DOCTYPE html>\n" + tag("html", head, "\n", body, lang=words.lang) + "\n"


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
    items = []
    for one, more in shortened(findings(d)):
        names = one.names
        if "set" in names:
            names = {**names, "set": words.text_set(str(names["set"]))}
        rest = f" ({words('find_more', count=more)})" if more else ""
        items.append(tag("li", words(one.key, **names) + rest))
    return sections.section(words, "findings", tag("ul", *items)) if items else ""
