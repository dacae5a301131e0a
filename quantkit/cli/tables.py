"""Results as tables."""

from typing import Any

from rich.table import Table
from rich.text import Text

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
            f"{one['reference_perplexity']:.2f}",
            f"{one['perplexity']:.2f}",
            f"{one['kl']:.4f} ± {one['kl_error']:.4f}",
            f"{one['top1']:.1%}",
        )
    table.add_section()
    table.add_row(
        "mean",
        "",
        "",
        f"{measured['kl']:.4f} ± {measured['kl_error']:.4f}",
        f"{measured['top1']:.1%}",
    )
    return table


def layer_table(layers: dict[str, float], count: int) -> Table:
    """The linears with the largest relative output errors."""
    table = Table(title=f"largest of {len(layers)} layer errors", title_justify="left")
    table.add_column("linear")
    table.add_column("relative output error", justify="right")
    for name, error in sorted(layers.items(), key=lambda item: -item[1])[:count]:
        table.add_row(name, f"{error:.5f}")
    return table


def sample_table(samples: list[dict[str, str]]) -> Table:
    """Continuations side by side. What a model writes is no markup, whatever brackets it has."""
    table = Table(title="greedy continuations", title_justify="left", show_lines=True)
    for heading in ("prompt", "original", "quantized"):
        table.add_column(heading, overflow="fold")
    for sample in samples:
        table.add_row(*(Text(sample[part]) for part in ("prompt", "original", "quantized")))
    return table


def plain_table(title: str, header: list[str], rows: list[list[str]]) -> Table:
    """Cells that are ready."""
    table = Table(title=Text(title), title_justify="left")
    for heading in header:
        table.add_column(Text(heading), justify="right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
