"""The report's sections of text: where both models disagree most, and what both write."""

import re
from typing import Any

from quantkit.workflows import report_charts as charts
from quantkit.workflows.report_sections import Described, folded, section
from quantkit.workflows.report_words import Words, finite, number, percent, tag, text, token

# KL of a token, in nats, from which it has the next stronger colour
HEAT = (0.1, 0.3, 1.0, 3.0)
_PASSAGES = 4  # shown at once
# what is marked as the first difference: a word, or the like
_FIRST = r"\s*\S[^\s、。，．,.]{0,11}"


def worst(d: Described, words: Words) -> str:
    found = passages(d, words)
    return section(words, "worst", heat(words), found, note="worst_note") if found else ""


def heat(words: Words) -> str:
    """What the colours mean."""
    steps = [tag("span", text(f"< {HEAT[0]:g}"), class_="h0")]
    steps += [tag("span", text(f"≥ {least:g}"), class_=f"h{i + 1}") for i, least in enumerate(HEAT)]
    return tag("p", words("worst_key"), " ", *steps, class_="heat")


def passages(d: Described, words: Words) -> str:
    """Empty without any."""
    parts = [_passage(one, words) for one in d.get("worst") or []]
    rest = "".join(parts[_PASSAGES:])
    more = folded(words("worst_more", count=len(parts) - _PASSAGES), rest) if rest else ""
    return "".join(parts[:_PASSAGES]) + more


def _passage(one: Described, words: Words) -> str:
    at, tokens = one["at"], one["tokens"]
    head = tag(
        "h3",
        text(words.text_set(one["set"])),
        " ",
        tag("span", words("worst_kl", kl=number(one["kl"])), class_="badge"),
    )
    shown = [_heated(piece, i == at) for i, piece in enumerate(tokens)]
    parts = [head, tag("p", "…", *shown, "…", class_="passage", lang=_language(one["set"]))]
    if at + 1 < len(tokens):
        parts.append(tag("p", words.around("worst_here", token=token(tokens[at + 1]["text"]))))
    lists = [
        _candidates(one.get(key) or [], name, hue, words)
        for key, name, hue in (
            ("reference", "candidates_original", 7),
            ("model", "candidates_quantized", 0),
        )
    ]
    return tag("article", *parts, tag("div", *lists, class_="pair"))


def _heated(piece: Described, here: bool) -> str:
    kl = piece["kl"]
    step = sum(kl >= least for least in HEAT) if finite(kl) else len(HEAT)
    shown = text(piece["text"]).replace("\n", tag("span", "↵", class_="blank") + "\n")
    # the outlined token must be seen even when it is only a blank
    if here and not piece["text"].strip():
        shown = token(piece["text"])
    content = tag("span", shown, class_=f"h{step}", title=f"KL {number(kl)}")
    return tag("mark", content) if here else content


def _candidates(found: list[Any], name: str, hue: int, words: Words) -> str:
    if not found:
        return ""
    head = [words("candidate"), words("probability"), ""]
    top = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head[:2])))
    rows = [
        tag(
            "tr",
            tag("th", token(piece), scope="row"),
            tag("td", charts.bar(share if finite(share) else 0, hue), text(percent(share))),
        )
        for piece, share in found
    ]
    return tag("table", tag("caption", words(name)), top, tag("tbody", *rows), class_="candidates")


def samples(d: Described, words: Words) -> str:
    found = d.get("samples") or []
    return (
        section(words, "samples", *(_sample(one, words) for one in found), note="samples_note")
        if found
        else ""
    )


def _sample(one: Described, words: Words) -> str:
    shared, how = parting(one, words)
    language = one.get("language")
    badge = tag("p", tag("span", how, class_="badge")) if how else ""
    sides = [
        tag("div", tag("h4", words(key)), continued(one[key], shared, language, words))
        for key in ("original", "quantized")
    ]
    return tag("article", prompt(one, words), badge, tag("div", *sides, class_="pair"))


def prompt(one: Described, words: Words) -> str:
    named = tag("h3", words("prompt"), class_="unseen")
    return named + tag(
        "p", text(one["prompt"]), class_="prompt", lang=_language(one.get("language"))
    )


def parting(one: Described, words: Words) -> tuple[int, str]:
    """How many characters both continuations share, and how many tokens, as a label (HTML)."""
    before, after = one["original"], one["quantized"]
    shared = next(
        (i for i, (a, b) in enumerate(zip(before, after)) if a != b), min(len(before), len(after))
    )
    if before == after:
        return shared, words("identical")
    if "same" in one and "tokens" in one:
        return shared, words("same_tokens", same=one["same"], tokens=one["tokens"])
    return shared, ""


def continued(
    content: str, shared: int, language: str | None, words: Words, marked: bool = True
) -> str:
    """A continuation; the first difference, behind ``shared`` characters, is marked."""
    if not content:
        return tag("p", words("nothing"), class_="note")
    first = re.match(_FIRST, content[shared:], re.DOTALL) if marked else None
    end = shared + (first.end() if first else 0)
    parts = [tag("span", text(content[:shared])), text(content[end:])]
    if end > shared:
        parts.insert(1, tag("mark", text(content[shared:end])))
    return tag("p", *parts, class_="says", lang=_language(language))


def _language(label: str | None) -> str | None:
    """Japanese text needs Japanese glyphs, whatever the page's language."""
    return label if label in ("ja", "en") else None
