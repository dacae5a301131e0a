"""The report's sections: each takes what was described and gives HTML, empty when its part of the
description is missing (an older one, or not asked for)."""

from collections.abc import Callable, Iterable
from math import exp, log
from typing import Any

from quantkit.workflows import report_charts as charts
from quantkit.workflows.report_verdict import Finding, Layer, layers
from quantkit.workflows.report_words import (
    NOTHING,
    Words,
    change,
    finite,
    number,
    percent,
    percent_tick,
    size,
    tag,
    text,
    tick,
    with_error,
)

_WORST_LAYERS = 8
_HEX = 16  # digits of a checksum that are enough to compare by eye

Described = dict[str, Any]


def section(words: Words, name: str, *content: str, note: str | None = None) -> str:
    """A heading, a sentence about it, and the content."""
    about = [tag("p", words(note), class_="note")] if note else []
    return tag("section", tag("h2", words(name)), *about, *content, class_=name)


def table(
    caption: str, head: list[str], rows: Iterable[list[str]], foot: list[str] | None = None
) -> str:
    """A table of ready cells (HTML). The first column names the row. It scrolls by itself where the
    page is narrow."""
    top = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
    body = tag("tbody", *(_row(row) for row in rows))
    end = tag("tfoot", _row(foot)) if foot else ""
    named = tag("caption", caption, class_="unseen")
    inner = tag("table", named, top, body, end)
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">{inner}</div>'


def _row(cells: list[str]) -> str:
    return tag("tr", tag("th", cells[0], scope="row"), *(tag("td", cell) for cell in cells[1:]))


def folded(summary: str, content: str) -> str:
    return tag("details", tag("summary", summary), content)


def switch(name: str, legend: str, panels: dict[str, str]) -> str:
    """One of several panels at a time, chosen by its label. Labels and panels are HTML; ``name`` is
    the page's only switch of that name."""
    parts = []
    for index, (label, panel) in enumerate(panels.items()):
        place = f"{name}-{index}"
        parts.append(tag("input", type="radio", name=name, id=place, checked=index == 0))
        parts.append(tag("label", label, for_=place))
        parts.append(tag("div", tag("p", label, class_="shown"), panel, class_="panel"))
    return tag("fieldset", tag("legend", legend, class_="unseen"), *parts, class_="switch")


def finding(one: Finding, more: int, words: Words) -> str:
    """A sentence of report_verdict.shortened (HTML)."""
    names = dict(one.names)
    if "set" in names:
        names["set"] = words.text_set(str(names["set"]))
    rest = f" ({words('find_more', count=more)})" if more else ""
    return words(one.key, **names) + rest


def numbers(d: Described, words: Words) -> str:
    """The few numbers that matter, big."""
    cards = [*_prediction_cards(d, words), _size_card(d, words), _divergence_card(d, words)]
    if not any(cards):
        return ""
    return section(words, "numbers", tag("div", *cards, class_="cards"))


def _card(name: str, value: str, *below: str) -> str:
    lines = (tag("p", line) for line in below if line)
    return tag("div", tag("h3", name), tag("p", value, class_="big"), *lines, class_="card")


def _prediction_cards(d: Described, words: Words) -> list[str]:
    cards = []
    if "kl" in d:
        error = d.get("kl_error")
        spread = f"± {number(error, 2)}" if finite(error) and error else ""
        value = text(number(d["kl"]))
        cards.append(_card(words("card_kl"), value, words("card_kl_note"), spread))
    if "top1" in d:
        five = words("card_top5_note", top5=percent(d["top5"])) if "top5" in d else ""
        value = text(percent(d["top1"]))
        cards.append(_card(words("card_top1"), value, words("card_top1_note"), five))
    ratio = d.get("perplexity_ratio") or _mean_ratio(d.get("sets") or {})
    if ratio is not None:
        note = words("card_perplexity_note")
        cards.append(_card(words("card_perplexity"), text(change(ratio)), note))
    return cards


def _mean_ratio(sets: Described) -> float | None:
    """The geometric mean of the sets' ratios: their losses weigh the same."""
    ratios = [_ratio(one) for one in sets.values()]
    known = [ratio for ratio in ratios if ratio]
    if not known or len(known) < len(ratios):
        return None
    return exp(sum(log(ratio) for ratio in known) / len(known))


def _ratio(one: Described) -> float | None:
    if "perplexity_ratio" in one:
        return one["perplexity_ratio"]  # type: ignore[no-any-return]
    before, after = one.get("reference_perplexity"), one.get("perplexity")
    return after / before if before and after is not None else None


def _size_card(d: Described, words: Words) -> str:
    found = d.get("size") or {}
    after, before = found.get("bytes"), found.get("original_bytes")
    if not after:
        return ""
    lines = []
    if before:
        share = percent(after / before)
        lines.append(words("card_size_note", share=share, original=size(before)))
        most = max(before, after)
        pairs = (("bar_before", before, 7), ("bar_after", after, 0))
        bars = [tag("span", words(key)) + charts.bar(n / most, hue) for key, n, hue in pairs]
        lines.append(tag("span", *bars, class_="bars"))
    if found.get("bits_per_weight") is not None:
        lines.append(words("card_bits", bits=number(found["bits_per_weight"])))
    if found.get("memory") is not None:
        lines.append(words("card_memory", memory=size(found["memory"])))
    return _card(words("card_size"), text(size(after)), *lines)


def _divergence_card(d: Described, words: Words) -> str:
    found = d.get("divergence")
    if not found:
        return ""
    value = text(number(found["mean"], 2)) + " " + tag("small", words("card_divergence_unit"))
    counts = {"identical": found["identical"], "prompts": found["prompts"]}
    return _card(
        words("card_divergence"),
        value,
        words("card_divergence_note", tokens=found["tokens"]),
        words("card_identical", **counts),
    )


def gate(d: Described, words: Words) -> str:
    checks = (d.get("gate") or {}).get("checks") or []
    if not checks:
        return ""
    head = [words(f"gate_{key}") for key in ("what", "set", "limit", "value", "result")]
    rows = [_check(check, words) for check in checks]
    return section(words, "gate", table(words("gate"), head, rows), note="gate_intro")


def _check(check: Described, words: Words) -> list[str]:
    what = check["what"].removeprefix("max_").removeprefix("min_")
    least = check["what"].startswith("min") or what in ("top1", "top5")
    show = percent if what in ("top1", "top5") else number
    label = _CHECKED.get(what, what)
    of = check.get("set")
    result = "passed" if check["passed"] else "failed"
    return [
        words(label) if label in words.labels else text(check["what"]),
        words("mean") if of in (None, "", "mean") else text(words.text_set(of)),
        words(
            "at_least" if least else "at_most",
            limit=(percent_tick if show is percent else tick)(check["limit"]),
        ),
        text(show(check["value"])),
        tag("span", ("✓ " if check["passed"] else "✗ ") + words(result), class_=result),
    ]


# checks whose label is not that of a column
_CHECKED = {
    "ppl_ratio": "gate_ratio",
    "perplexity_ratio": "gate_ratio",
    "nonfinite": "gate_nonfinite",
}
_Shown = Callable[[Described], str]


def _columns() -> dict[str, _Shown]:
    """How a text set's numbers are shown (HTML), in the order of the table."""

    def plain(key: str, digits: int = 3) -> _Shown:
        return lambda one: text(number(one.get(key), digits))

    def estimate(key: str, share: bool = False) -> _Shown:
        def shown(one: Described) -> str:
            value, error = with_error(one.get(key), one.get(f"{key}_error"), share)
            return text(value) + (tag("small", text(error)) if error else "")

        return shown

    return {
        "kl": estimate("kl"),
        "kl_p95": plain("kl_p95"),
        "kl_p99": plain("kl_p99"),
        "kl_max": plain("kl_max"),
        "top1": estimate("top1", share=True),
        "top5": estimate("top5", share=True),
        "reference_perplexity": plain("reference_perplexity", 4),
        "perplexity": plain("perplexity", 4),
        "perplexity_ratio": estimate("perplexity_ratio"),
        "probability_lost": estimate("probability_lost", share=True),
        "tokens": lambda one: f"{one['tokens']:,}" if "tokens" in one else NOTHING,
    }


def measured(sets: Iterable[Described]) -> dict[str, Callable[[Described], str]]:
    """The columns that at least one of the text sets has something for."""
    known = {key for one in sets for key, value in one.items() if value is not None}
    return {key: show for key, show in _columns().items() if key in known}


def sets(d: Described, words: Words) -> str:
    """A row for every text set; columns that nothing was measured for are left out."""
    found = {label: {**one} for label, one in (d.get("sets") or {}).items()}
    for one in found.values():
        one.setdefault("perplexity_ratio", _ratio(one))
    columns = measured(found.values())
    if not columns:
        return ""
    rows = [
        [text(words.text_set(label)), *(show(one) for show in columns.values())]
        for label, one in found.items()
    ]
    whole = {key: value for key, value in d.items() if key.removesuffix("_error") in columns}
    foot = [words("mean"), *(show(whole) if key in whole else "" for key, show in columns.items())]
    head = [words("set"), *(words(key) for key in columns)]
    made = table(words("sets"), head, rows, foot if len(rows) > 1 else None)
    return section(words, "sets", made, note="sets_note")


def histogram(d: Described, words: Words) -> str:
    found = d.get("histogram") or {}
    edges, counts = found.get("edges") or [], found.get("counts") or {}
    drawn = charts.histogram(edges, counts, d.get("kl"), words) if counts else ""
    if not drawn:
        return ""
    totals = {label: max(1, sum(one)) for label, one in counts.items()}
    rows = [
        [f"{number(edges[i], 2)}–{number(edges[i + 1], 2)}"]
        + [percent(one[i] / totals[label]) for label, one in counts.items()]
        for i in range(len(edges) - 1)
        if any(one[i] for one in counts.values())
    ]
    names = [words.text_set(label) for label in counts]
    head = [words("range"), *map(text, names)]
    numbers = folded(words("as_table"), table(words("histogram"), head, rows))
    figure = tag("figure", drawn, charts.legend(names, shapes=False))
    return section(words, "histogram", figure, numbers, note="histogram_note")


def layer_errors(d: Described, words: Words) -> str:
    found = layers(d)
    if not found:
        return ""
    chart = charts.layer_chart(found, words)
    key = charts.legend(list(charts.kinds(found)))
    # a layer whose error is not a number is worse than any other
    worst = sorted(found, key=lambda one: -one.error if finite(one.error) else float("-inf"))
    parts = [tag("figure", chart, key)] if chart else []
    parts.append(tag("h3", words("worst_layers")))
    parts.append(_layer_table(words("worst_layers"), worst[:_WORST_LAYERS], words))
    if len(found) > _WORST_LAYERS:
        name = words("all_layers", count=len(found))
        parts.append(folded(name, _layer_table(name, found, words)))
    compared = charts.predicted_chart(found, words)
    if compared:
        note = tag("p", words("predicted_note"), class_="note")
        parts += [
            tag("h3", words("predicted_title")),
            note,
            tag("figure", compared, key, class_="square"),
        ]
    return section(words, "layers", *parts, note="layers_note")


def _layer_table(caption: str, found: list[Layer], words: Words) -> str:
    columns: dict[str, Callable[[Layer], str]] = {"error": lambda one: percent(one.error)}
    if any(one.predicted is not None for one in found):
        columns["predicted"] = lambda one: percent(one.predicted)
        columns["against_predicted"] = lambda one: number(one.ratio)
    if any(one.sqnr is not None for one in found):
        columns["sqnr"] = lambda one: (
            f"{number(one.sqnr)} dB" if finite(one.sqnr) else number(one.sqnr)
        )
    if any(one.cosine is not None for one in found):
        columns["cosine"] = lambda one: number(one.cosine, 5)
    head = [words("layer"), *(words(key) for key in columns)]
    rows = [[text(one.name), *(text(show(one)) for show in columns.values())] for one in found]
    return table(caption, head, rows)


def settings(d: Described, words: Words) -> str:
    found = {**(d.get("settings") or {})}
    making = found.pop("quantization", None) or {}
    tables = [
        tag("div", tag("h3", words(name)), table(words(name), head, rows))
        for name, one in (("settings_measured", found), ("settings_quantization", making))
        for head in [[words("setting"), words("value")]]
        for rows in [[[text(key), value] for key, value in flat(one, words)]]
        if rows
    ]
    return section(words, "settings", tag("div", *tables, class_="pair")) if tables else ""


def flat(content: Described, words: Words, before: str = "") -> Iterable[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from flat(value, words, f"{before}{key}.")
        else:
            yield f"{before}{key}", _value(value, words)


def _value(value: Any, words: Words) -> str:
    if value is None or value in ([], ""):
        return words("none")
    if isinstance(value, bool):
        return words("yes" if value else "no")
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return text(number(value, 6).rstrip("0").rstrip(".") if value % 1 else f"{value:,.0f}")
    if isinstance(value, list):
        return ", ".join(_value(one, words) for one in value)
    if len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return tag("span", text(f"{value[:_HEX]}…"), title=value)
    return text(value)


def notes(d: Described, words: Words) -> str:
    found = d.get("notes") or []
    return (
        section(words, "notes", tag("ul", *(tag("li", text(one)) for one in found)))
        if found
        else ""
    )


def glossary(words: Words) -> str:
    terms = [
        tag("dt", words(f"term_{term}")) + tag("dd", words(f"about_{term}"))
        for term in ("kl", "top1", "perplexity", "lost", "error")
    ]
    return section(words, "glossary", tag("dl", *terms))
