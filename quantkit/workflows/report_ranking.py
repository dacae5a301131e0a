"""The report of several models: an HTML file for eyes, from what ``Ranking.described()`` says.

A model's colour and shape are its place in the ranking, all over the page.
"""

from pathlib import Path
from typing import Any

from quantkit.workflows import report_candidates as candidates
from quantkit.workflows import report_charts as charts
from quantkit.workflows import report_page
from quantkit.workflows import report_sections as sections
from quantkit.workflows.report_verdict import findings, level, shortened
from quantkit.workflows.report_words import Words, finite, number, percent, size, tag, text

_FINDINGS = 2  # of one kind, for each model


def write(ranked: dict[str, Any], path: Path, lang: str = "en") -> None:
    """Write the report of ``ranked`` to ``path``. Raises UsageError for a language without labels,
    QuantkitError when the file cannot be written."""
    report_page.save(page(ranked, Words(lang)), path)


def page(ranked: dict[str, Any], words: Words) -> str:
    """The whole document."""
    parts = [
        section(ranked, words)
        for section in (
            _best,
            candidates.ranking,
            _findings,
            candidates.tradeoff,
            candidates.sets,
            candidates.distributions,
            candidates.layer_errors,
            candidates.worst,
            candidates.samples,
            candidates.settings,
            _notes,
        )
    ]
    title = words("compare_title", count=len(ranked["models"]), against=ranked["against"])
    header = tag(
        "header",
        tag("p", words("compare_kicker"), class_="kicker"),
        tag("h1", title),
        *_headline(ranked, words),
    )
    return report_page.document(title, header, parts, words)


def _headline(ranked: dict[str, Any], words: Words) -> list[str]:
    """Which is closest, in words before numbers."""
    first = ranked["models"][0]
    if not finite(first["kl"]):
        return [tag("p", words("closest_none"), class_="verdict v-broken")]
    found = level(first) or "broken"
    names = {"kl": number(first["kl"]), "size": size(first["size"]["bytes"])}
    summary = words("closest_summary", top1=percent(first["top1"]), **names)
    parts = [
        tag("p", words("closest", model=first["model"]), class_="verdict"),
        tag("p", tag("strong", words(found), class_=f"v-{found}"), " ", summary, class_="summary"),
    ]
    equal = [one["model"] for one in _equal(ranked)]
    if equal:
        parts.append(tag("p", words("closest_tied", models=", ".join(equal)), class_="summary"))
    return parts


def _equal(ranked: dict[str, Any]) -> list[dict[str, Any]]:
    """Those behind the first that this measurement does not tell from the one before them."""
    found = []
    for one, behind in list(zip(ranked["models"], ranked["behind"]))[1:]:
        if not candidates.tied(behind):
            break
        found.append(one)
    return found


def _best(ranked: dict[str, Any], words: Words) -> str:
    """What nothing else is both smaller and closer than, the smallest first; and why the others
    are not among them."""
    models = ranked["models"]
    front = candidates.front(models)
    if not front:
        return ""
    cards = [_card(models[index], index, words) for index in front]
    beaten = [
        tag(
            "li",
            words("beaten", model=one["model"], better=models[_better(models, index)]["model"]),
        )
        for index, one in enumerate(models)
        if index not in front
    ]
    rest = tag("ul", *beaten, class_="note") if beaten else ""
    note = tag("p", words("front_note"), class_="note")
    return tag(
        "section", tag("h2", words("front")), note, tag("div", *cards, class_="cards"), rest,
        class_="best",
    )  # fmt: skip


def _better(models: list[dict[str, Any]], index: int) -> int:
    """The closest of those that are not larger."""
    most = models[index]["size"]["bytes"]
    return next(i for i, one in enumerate(models) if one["size"]["bytes"] <= most)


def _card(one: dict[str, Any], index: int, words: Words) -> str:
    found = level(one) or "broken"
    return tag(
        "div",
        tag("h3", charts.key(index, one["model"])),
        tag("p", text(size(one["size"]["bytes"])), class_="big"),
        tag("p", tag("span", words(f"scale_{found}"), class_=f"v-{found}")),
        tag("p", words("front_numbers", kl=number(one["kl"]), top1=percent(one["top1"]))),
        class_="card",
    )


def _findings(ranked: dict[str, Any], words: Words) -> str:
    items = [
        tag("li", charts.key(index, one["model"]), tag("ul", *found))
        for index, one in enumerate(ranked["models"])
        for found in [
            [tag("li", sections.finding(*f, words)) for f in shortened(findings(one), _FINDINGS)]
        ]
        if found
    ]
    return sections.section(words, "findings", tag("ul", *items)) if items else ""


def _notes(ranked: dict[str, Any], words: Words) -> str:
    found = dict.fromkeys(note for one in ranked["models"] for note in one["notes"])
    return sections.notes({"notes": list(found)}, words)
