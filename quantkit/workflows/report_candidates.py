"""The sections of a report of several models: the same numbers of all of them side by side."""

from collections.abc import Iterable
from statistics import fmean
from typing import Any

from quantkit.workflows import report_charts as charts
from quantkit.workflows import report_passages as passages
from quantkit.workflows import report_sections as sections
from quantkit.workflows import report_tradeoff as tradeoffs
from quantkit.workflows.report_sections import Described, section, switch, table
from quantkit.workflows.report_verdict import Layer, layers, level
from quantkit.workflows.report_words import (
    NOTHING,
    Words,
    change,
    finite,
    number,
    percent,
    size,
    tag,
    text,
    with_error,
)

_ABOVE = (0.1, 0.3, 1.0, 3.0)  # nats


def front(models: list[Described]) -> list[int]:
    """The models that no other one beats in both size and KL, the smallest first. ``models`` are in
    the order of their KL."""
    best: list[int] = []
    for index, one in enumerate(models):
        smallest = min((models[i]["size"]["bytes"] for i in best), default=float("inf"))
        if finite(one["kl"]) and one["size"]["bytes"] < smallest:
            best.append(index)
    return best[::-1]


def tied(behind: Described | None) -> bool:
    """Whether two standard errors hide the difference from the model before."""
    if behind is None or not finite(behind["kl"]) or not finite(behind["kl_error"]):
        return False
    return bool(behind["kl"] <= 2 * behind["kl_error"])


def ranking(ranked: Described, words: Words) -> str:
    models = ranked["models"]
    largest = max(one["size"]["bytes"] for one in models)
    columns = ["kl", "verdict", "top1", "perplexity_ratio", "same_text", "size", "bits", "memory"]
    gated = any(one["gate"] for one in models)
    head = [words("model"), *(words(key) for key in columns), *([words("gate")] if gated else [])]
    rows = []
    for index, (one, behind) in enumerate(zip(models, ranked["behind"])):
        cells = [
            charts.key(index, one["model"]),
            ("≈ " if tied(behind) else "") + _estimate(one, "kl"),
            _verdict(one, words),
            text(percent(one["top1"])),
            text(change(one["perplexity_ratio"])),
            _same_text(one),
            text(size(one["size"]["bytes"])) + charts.bar(one["size"]["bytes"] / largest, index),
            text(number(one["size"]["bits_per_weight"])),
            text(size(one["size"]["memory"])),
        ]
        rows.append([*cells, _gate(one, words)] if gated else cells)
    return section(words, "ranking", table(words("ranking"), head, rows), note="ranking_note")


def _estimate(one: Described, name: str, share: bool = False) -> str:
    value, error = with_error(one[name], one.get(f"{name}_error"), share)
    return text(value) + (tag("small", text(error)) if error else "")


def _verdict(one: Described, words: Words) -> str:
    found = level(one) or "broken"
    return tag("span", words(f"scale_{found}"), class_=f"v-{found}")


def _same_text(one: Described) -> str:
    found = one["divergence"]
    return text(f"{number(found['mean'], 2)} / {found['tokens']}") if found else NOTHING


def _gate(one: Described, words: Words) -> str:
    result = "passed" if one["gate"]["passed"] else "failed"
    return tag("span", ("✓ " if one["gate"]["passed"] else "✗ ") + words(result), class_=result)


def tradeoff(ranked: Described, words: Words) -> str:
    models = ranked["models"]
    best = front(models)
    points = [
        tradeoffs.Point(one["model"], index, bits, one["kl"], index in best)
        for index, one in enumerate(models)
        for bits in [one["size"]["bits_per_weight"]]
        if bits is not None and finite(one["kl"]) and one["kl"] > 0
    ]
    drawn = tradeoffs.tradeoff(points, words)
    figure = tag("figure", drawn, _legend(models))
    return section(words, "tradeoff", figure, note="tradeoff_note") if drawn else ""


def _legend(models: list[Described], shapes: bool = True) -> str:
    return charts.legend([one["model"] for one in models], shapes)


def sets(ranked: Described, words: Words) -> str:
    """The KL of all on all texts, and each text with all its numbers."""
    models = ranked["models"]
    labels = list(models[0]["sets"])
    head = [words("model"), *(text(words.text_set(label)) for label in labels), words("mean")]
    rows = [
        [charts.key(index, one["model"])]
        + [_estimate(part, "kl") for part in [*(one["sets"][label] for label in labels), one]]
        for index, one in enumerate(models)
    ]
    panels = {text(words.text_set(label)): _set(label, models, words) for label in labels}
    by_text = switch("sets", words("set"), panels)
    parts = [table(words("kl"), head, rows), tag("h3", words("all_numbers")), by_text]
    return section(words, "sets", *parts, note="compared_sets_note")


def _set(label: str, models: list[Described], words: Words) -> str:
    found = [one["sets"][label] for one in models]
    columns = sections.measured(found)
    for same in ("reference_perplexity", "tokens"):  # for all models: said below
        columns.pop(same, None)
    rows = [
        [charts.key(index, one["model"]), *(show(part) for show in columns.values())]
        for index, (one, part) in enumerate(zip(models, found))
    ]
    names = {"perplexity": number(found[0]["reference_perplexity"], 4)}
    below = words("set_common", tokens=f"{found[0]['tokens']:,}", **names)
    made = table(text(words.text_set(label)), [words("model"), *map(words, columns)], rows)
    return made + tag("p", below, class_="note")


def distributions(ranked: Described, words: Words) -> str:
    models = ranked["models"]
    edges = models[0]["histogram"]["edges"]
    spreads = [
        tradeoffs.Spread(one["model"], _together(one["histogram"]["counts"].values()), one["kl"])
        for one in models
    ]
    drawn = tradeoffs.distributions(edges, spreads, words)
    if not drawn:
        return ""
    head = [words("model"), *(words("above", kl=f"{least:g}") for least in _ABOVE)]
    rows = [
        [charts.key(index, one.name), *(text(percent(_share(edges, one, k))) for k in _ABOVE)]
        for index, one in enumerate(spreads)
    ]
    shares = table(words("distributions_table"), head, rows)
    return section(words, "distributions", tag("figure", drawn), shares, note="distributions_note")


def _together(counts: Iterable[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*counts)]


def _share(edges: list[float], spread: tradeoffs.Spread, least: float) -> float:
    """Of the tokens, with at least so much KL; the edges hold powers of ten times 10^0.1."""
    above = sum(n for edge, n in zip(edges, spread.counts) if edge >= least * 0.999)
    return above / max(1, sum(spread.counts))


def layer_errors(ranked: Described, words: Words) -> str:
    """A line for each model: the mean over a block's linears, and each kind of linear."""
    models = ranked["models"]
    found = [layers(one) for one in models]
    if not any(found):
        return ""
    kinds = dict.fromkeys(layer.kind for some in found for layer in some if layer.block is not None)
    lines = {words("mean"): [_means(one["model"], some) for one, some in zip(models, found)]}
    for kind in kinds:
        lines[text(kind)] = [
            [_named(one["model"], layer) for layer in some if layer.kind == kind]
            for one, some in zip(models, found)
        ]
    drawn = {label: charts.lines(series, words) for label, series in lines.items()}
    panels = {label: chart for label, chart in drawn.items() if chart}
    chosen = switch("layers", words("layer"), panels) if panels else ""
    figure = tag("figure", chosen, _legend(models)) if panels else ""
    head = [words("model"), words("layer"), words("error"), words("predicted")]
    rows = [
        [
            charts.key(index, one["model"]),
            text(layer.name),
            percent(layer.error),
            percent(layer.predicted),
        ]
        for index, (one, some) in enumerate(zip(models, found))
        for layer in sorted(some, key=_error, reverse=True)[:1]
    ]
    worst = table(words("worst_layers"), head, rows)
    parts = [figure, tag("h3", words("worst_layers")), worst]
    return section(words, "layers", *parts, note="compared_layers_note")


def _named(model: str, layer: Layer) -> Layer:
    return Layer(f"{model}, {layer.name}", layer.block, layer.kind, layer.error)


def _means(model: str, some: list[Layer]) -> list[Layer]:
    blocks: dict[int, list[float]] = {}
    for layer in some:
        if layer.block is not None:
            error = float("nan") if layer.error is None else layer.error
            blocks.setdefault(layer.block, []).append(error)
    return [Layer(f"{model}, {b}", b, "", fmean(errors)) for b, errors in blocks.items()]


def _error(layer: Layer) -> float:
    """What is not a number is larger than any other."""
    return layer.error if finite(layer.error) else float("inf")


def worst(ranked: Described, words: Words) -> str:
    panels = {
        charts.key(index, one["model"]): passages.passages(one, words)
        for index, one in enumerate(ranked["models"])
        if one["worst"]
    }
    if not panels:
        return ""
    shown = switch("worst", words("model"), panels)
    return section(words, "worst", passages.heat(words), shown, note="worst_note")


def samples(ranked: Described, words: Words) -> str:
    """Every prompt with all continuations under each other, so that their beginnings align."""
    models = [(i, one) for i, one in enumerate(ranked["models"]) if one["samples"]]
    if not models:
        return ""
    parts = []
    for place, first in enumerate(models[0][1]["samples"]):
        original = passages.continued(first["original"], 0, first.get("language"), words, False)
        rows = [_continuation(tag("h4", words("original")), original)]
        for index, one in models:
            sample = one["samples"][place]
            shared, how = passages.parting(sample, words)
            name = charts.key(index, one["model"]) + tag("span", how, class_="badge")
            language = sample.get("language")
            written = passages.continued(sample["quantized"], shared, language, words)
            rows.append(_continuation(tag("h4", name), written))
        parts.append(tag("article", passages.prompt(first, words), *rows))
    return section(words, "samples", *parts, note="compared_samples_note")


def _continuation(name: str, written: str) -> str:
    return tag("div", name, tag("div", written), class_="continuation")


def settings(ranked: Described, words: Words) -> str:
    """What was the same for all, and what each was made with; rows that differ stand out."""
    models = ranked["models"]
    common = {**models[0]["settings"]}
    common.pop("quantization", None)
    head = [words("setting"), words("value")]
    rows = [[text(key), value] for key, value in sections.flat(common, words)]
    measured = table(words("settings_measured"), head, rows)
    made = [dict(sections.flat(one["settings"].get("quantization", {}), words)) for one in models]
    keys = dict.fromkeys(key for one in made for key in one)
    names = [charts.key(index, one["model"]) for index, one in enumerate(models)]
    rows = [[_key(key, made), *(one.get(key, NOTHING) for one in made)] for key in keys]
    own = table(words("settings_quantization"), [words("setting"), *names], rows)
    parts = [tag("h3", words("settings_quantization")), own]
    parts += [tag("h3", words("settings_measured")), measured]
    return section(words, "settings", *parts)


def _key(key: str, made: list[dict[str, Any]]) -> str:
    differs = len({one.get(key) for one in made}) > 1
    return tag("strong", text(key)) if differs else text(key)
