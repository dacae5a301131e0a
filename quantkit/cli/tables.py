"""Results as tables."""

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from quantkit.core.metrics import number, shown

_NAMES = {"en": "English", "ja": "Japanese", "code": "code", "chat": "chat"}


def comparison_table(measured: dict[str, Any], title: str) -> Table:
    """A model against its original, by text set (see metrics.Comparison.described)."""
    table = Table(title=Text(title), title_justify="left")
    table.add_column("text")
    for heading in ("ppl original", "ppl quantized", "KL (nats)", "top-1 agreement"):
        table.add_column(heading, justify="right")
    for label, one in measured["sets"].items():
        table.add_row(
            Text(_NAMES.get(label, label)),
            number(one["reference_perplexity"], 2),
            number(one["perplexity"], 2),
            shown(one["kl"], one["kl_error"]),
            f"{one['top1']:.1%}",
        )
    table.add_section()
    table.add_row(
        "mean",
        "",
        "",
        shown(measured["kl"], measured["kl_error"]),
        f"{measured['top1']:.1%}",
    )
    return table


def verified_table(found: dict[str, Any]) -> Table:
    """A model against its original, by text set (see Verification.described)."""
    title = f"{found['model']} against {found['against']}"
    table = Table(title=Text(title), title_justify="left")
    table.add_column("text")
    for heading in ("ppl", "new ppl", "ratio", "KL (nats)", "99 %", "top-1"):
        table.add_column(heading, justify="right")
    for label, one in found["sets"].items():
        table.add_row(
            Text(_NAMES.get(label, label)),
            number(one["reference_perplexity"], 2),
            number(one["perplexity"], 2),
            shown(one["perplexity_ratio"], one["perplexity_ratio_error"], 3),
            shown(one["kl"], one["kl_error"]),
            number(one["kl_p99"], 3),
            f"{one['top1']:.1%}",
        )
    table.add_section()
    table.add_row(
        "mean",
        "",
        "",
        shown(found["perplexity_ratio"], found["perplexity_ratio_error"], 3),
        shown(found["kl"], found["kl_error"]),
        "",
        f"{found['top1']:.1%}",
    )
    return table


def ranking_table(found: dict[str, Any]) -> Table:
    """Models against one original, best first (see Ranking.described)."""
    title = Text(f"against {found['against']}")
    # narrow, so that names have room
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", overflow="fold")
    for heading in ("KL (nats)", "ppl ratio", "top-1", "same", "bits", "MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for place, one in enumerate(found["models"], 1):
        bits, written = one["size"]["bits_per_weight"], one["divergence"]
        table.add_row(
            Text(f"{place} {one['model']}"),
            shown(one["kl"], one["kl_error"]),
            f"{one['perplexity_ratio']:.4f}",
            f"{one['top1']:.1%}",
            f"{written['mean']:.1f}" if written else "-",
            f"{bits:.2f}" if bits else "-",
            f"{one['size']['bytes'] / 1e6:,.1f}",
        )
    return table


def layer_table(layers: dict[str, dict[str, Any]], count: int) -> Table:
    """The linears with the largest relative output errors."""
    table = Table(title=f"largest of {len(layers)} layer errors", title_justify="left")
    table.add_column("linear", overflow="fold")
    for heading in ("error", "dB", "cosine", "predicted"):
        table.add_column(heading, justify="right")

    def worst(item: tuple[str, dict[str, Any]]) -> float:
        error: float = item[1]["error"]
        return -error if error == error else float("-inf")

    for name, layer in sorted(layers.items(), key=worst)[:count]:
        predicted = layer["predicted"]
        table.add_row(
            name,
            f"{layer['error']:.5f}",
            f"{layer['sqnr']:.1f}",
            f"{layer['cosine']:.5f}",
            "-" if predicted is None else f"{predicted:.5f}",
        )
    return table


def passage_table(worst: list[dict[str, Any]], count: int) -> Table:
    """Where the two disagree most, up to the token behind which they do."""
    table = Table(title="largest disagreements", title_justify="left", show_lines=True)
    for heading in ("text", "KL"):
        table.add_column(heading, justify="right")
    for heading in ("behind", "original: next", "quantized: next"):
        table.add_column(heading, overflow="fold")
    for passage in worst[:count]:
        before = "".join(token["text"] for token in passage["tokens"][: passage["at"] + 1])
        table.add_row(
            Text(_NAMES.get(passage["set"], passage["set"])),
            f"{passage['kl']:.2f}",
            Text("…" + before[-60:].replace("\n", "⏎")),
            *(
                Text("  ".join(f"{text!r} {p:.0%}" for text, p in passage[model][:3]))
                for model in ("reference", "model")
            ),
        )
    return table


def sample_table(samples: list[dict[str, Any]], count: int) -> Table:
    """Continuations side by side, those that part first. What a model writes is no markup, whatever
    brackets it has."""
    table = Table(title="greedy continuations", title_justify="left", show_lines=True)
    for heading in ("prompt", "original", "quantized"):
        table.add_column(heading, overflow="fold")
    for sample in sorted(samples, key=lambda sample: sample["same"])[:count]:
        table.add_row(*(Text(sample[part]) for part in ("prompt", "original", "quantized")))
    return table


def facts(found: dict[str, Any]) -> list[str]:
    """Lines below the tables."""
    size, written = found["size"], found["divergence"]
    bits = size["bits_per_weight"]
    lines = [
        f"size: {size['bytes'] / 1e6:,.1f} MB, original {size['original_bytes'] / 1e6:,.1f} MB"
        + (f"; {bits:.2f} bits per quantized weight" if bits else "")
        + (f"; {size['memory'] / 1e6:,.1f} MB in memory" if size["memory"] else "")
    ]
    if written:
        lines.append(
            f"continuations: the same for {written['mean']:.1f} of {written['tokens']} tokens, "
            f"{written['identical']} of {written['prompts']} identical"
        )
    return lines


def finding_lines(found: dict[str, Any]) -> list[str]:
    """What to look at first, as the report says it."""
    from quantkit.workflows.report_verdict import findings, shortened
    from quantkit.workflows.report_words import Words

    words = Words("en")
    return [words.plain(one.key, **one.names) for one, _ in shortened(findings(found), 1)]


def gate_lines(found: dict[str, Any]) -> list[str]:
    """The limits that were not kept."""
    from quantkit.workflows.gate import told

    checks = found["gate"]["checks"] if found["gate"] else []
    return [told(check) for check in checks if not check["passed"]]


def score_table(found: dict[str, Any]) -> Table:
    """Scores of tasks (see Evaluation.described)."""
    table = Table(title=Text(found["model"]), title_justify="left")
    table.add_column("task", overflow="fold")
    table.add_column("metric")
    for heading in ("score", "examples", "questions"):
        table.add_column(heading, justify="right")
    for one in found["scores"]:
        kind = "" if one["filter"] == "none" else f" ({one['filter']})"
        table.add_row(
            Text(one["task"]),
            Text(one["metric"] + kind),
            shown(one["value"], one["error"]),
            str(found["few_shot"].get(one["task"], "-")),
            str(found["samples"].get(one["task"], "-")),
        )
    return table


def plain_table(title: str, header: list[str], rows: list[list[str]]) -> Table:
    """Cells that are ready."""
    table = Table(title=Text(title), title_justify="left")
    for heading in header:
        table.add_column(Text(heading), justify="right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def bench_table(found: dict[str, Any]) -> Table:
    """Speeds of a model (see workflows/bench.py)."""
    where = ", ".join(filter(None, (found["engine"], found["device"], found["dtype"])))
    title = (
        f"{found['model']} ({where}, {found['threads']} threads): loaded in "
        f"{found['load_seconds']:.1f} s, {found['peak_bytes'] / 1e9:.2f} GB at most, "
        f"copies reach {found['copy_bandwidth'] / 1e9:.1f} GB/s"
    )
    table = Table(title=Text(title), title_justify="left")
    for heading in ("batch", "context", "prefill", "decode", "MB a step", "of bandwidth"):
        table.add_column(heading, justify="right")
    for row in found["rows"]:
        table.add_row(
            str(row["batch"]),
            str(row["context"]),
            f"{row['prefill']:.0f} tokens/s",
            f"{row['decode']:.1f} tokens/s",
            f"{row['step_bytes'] / 1e6:.1f}",
            f"{row['bandwidth'] / found['copy_bandwidth']:.0%}",
        )
    return table
