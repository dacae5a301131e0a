"""``quantkit inspect MODEL``"""

import json
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli import options
from quantkit.core.counted import counted

if TYPE_CHECKING:
    from rich.table import Table

    from quantkit.workflows.inspect import Inspection

_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}
_HEADS = {
    "own": "a tensor of its own",
    "quantized": "quantized",
    "tied": "tied to the embedding",
    "both": "tied to the embedding, and stored",
    "missing": "missing",
}


@click.command("inspect")
@click.argument("model")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a repository.")
@options.basename
@click.option("--repair", metavar="OUT", help="Write a corrected copy to the folder OUT.")
@options.as_json
def command(as_json: bool, repair: str | None, **options: Any) -> None:
    """Show what MODEL holds, what is wrong with it, and which programs will load it.

    Method, bits, groups, zero points, sizes, where it came from. Exits with 1 when there are
    errors (with --repair: when some of them could not be repaired).
    """
    from quantkit.workflows.inspect import inspect

    found = inspect(repair=repair, **options)
    if as_json:
        click.echo(json.dumps(found.described(), indent=2, ensure_ascii=False))
    else:
        _print(found, repair)
    left = [f for f in found.findings if f.level == "error" and not (repair and f.changes)]
    if left:
        raise click.exceptions.Exit(1)


def _print(found: "Inspection", repair: str | None) -> None:
    from rich.markup import escape

    from quantkit.cli.console import stdout

    console = stdout()
    if not repair:
        console.print(_facts(found))
    if found.targets and not repair:
        console.print(_targets(found))
    for finding in found.findings:
        colour = _COLOURS[finding.level]
        can = " [dim](--repair)[/]" if finding.changes and not repair else ""
        console.print(
            f"[{colour}]{finding.level}:[/] {escape(finding.text)}{can}",
            soft_wrap=not console.is_terminal,
        )
    if not found.findings:
        console.print("[green]nothing is wrong with it[/]")
    for text in found.repaired:
        console.print(f"[green]repaired:[/] {escape(text)}", soft_wrap=not console.is_terminal)
    if repair:
        console.print(f"wrote {escape(repair)}")


def _facts(found: "Inspection") -> "Table":
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(found.name), title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in _rows(found):
        table.add_row(name, escape(value))
    return table


def _rows(found: "Inspection") -> list[tuple[str, str]]:
    """What the folder holds, line by line."""
    from quantkit.core.metrics import shown

    kind = "full precision" if found.kind == "dense" else found.kind.replace("_", "-").upper()
    rows = [("kind", f"{kind}, {found.architecture}")]
    if found.method and found.method.replace("_", "-").upper() != kind:
        rows.append(("method", found.method))
    if found.types:
        rows.append(("codes", ", ".join(f"{n} x {name}" for name, n in found.types.items())))
    elif found.bits is not None:
        group = "one scale a row" if found.group == -1 else f"groups of {found.group}"
        levels = f"{found.bits} bits" if found.grid == "int" else str(found.grid)
        symmetry = "symmetric" if found.sym else "asymmetric"
        order = ", groups by activation (g_idx)" if found.act_order else ""
        rows.append(("codes", f"{levels}, {group}, {symmetry}{order}"))
    if found.convention:
        seen = f"{found.convention} convention, read from the tensors"
        said = f"{found.convention} convention, as the configuration says"
        rows.append(("zero points", seen if found.sym else said))
    if found.linears:
        size = f", {found.bits_per_weight:.2f} bits per weight" if found.bits_per_weight else ""
        rows.append(("quantized", f"{counted(found.linears, 'linear')}{size}"))
    rows.append(("parameters", f"{found.parameters / 1e6:,.1f} M"))
    dense = ", ".join(f"{count / 1e6:,.1f} M {dtype}" for dtype, count in found.dtypes.items())
    rows.append(("dense tensors", dense or "none"))
    if found.head:
        rows.append(("head", _HEADS[found.head]))
    parts = f"{counted(found.files, 'file')}, {counted(found.tensors, 'tensor')}"
    rows.append(("size", f"{found.bytes / 1e6:,.1f} MB, {parts}"))
    chat = "with a chat template" if found.chat_template else "no chat template"
    rows.append(("tokenizer", chat if found.tokenizer else "none"))
    rows += [("made from", found.made_from)] if found.made_from else []
    rows += [("made by", found.made_by)] if found.made_by else []
    if found.measured and (kl := found.measured["kl"]) is not None:
        rows.append(("measured KL", shown(kl, found.measured["kl_error"])))
    return rows


def _targets(found: "Inspection") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="what will load it", title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for verdict in found.targets:
        needs = [f"pip install {verdict.needs.replace(',', '')}"] if verdict.needs else []
        details = needs + verdict.hardware if verdict.loads else verdict.reasons
        mark = "[green]yes[/]" if verdict.loads else "[red]no[/]"
        table.add_row(verdict.target, mark, escape("; ".join(details)))
    return table
