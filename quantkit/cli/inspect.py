"""``quantkit inspect MODEL``"""

import json

import click

from quantkit.cli import options


@click.command("inspect")
@click.argument("model")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a repository.")
@options.as_json
def command(model: str, revision: str | None, as_json: bool) -> None:
    """Show what MODEL holds: method, bits, groups, zero points, sizes, where it came from."""
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    from quantkit.cli.console import stdout
    from quantkit.workflows.inspect import inspect

    found = inspect(model, revision=revision)
    if as_json:
        click.echo(json.dumps(found.described(), indent=2, ensure_ascii=False))
        return
    table = Table(title=Text(found.name), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    kind = "full precision" if found.kind == "dense" else found.kind.upper()
    table.add_row("kind", f"{kind}, {found.architecture}")
    if found.bits is not None:
        group = "one scale a row" if found.group == -1 else f"groups of {found.group}"
        symmetry = "symmetric" if found.sym else "asymmetric"
        order = ", groups by activation (g_idx)" if found.act_order else ""
        table.add_row("codes", f"{found.bits} bits, {group}, {symmetry}{order}")
        table.add_row("zero points", f"{found.convention} convention, read from the tensors")
        table.add_row(
            "quantized", f"{found.linears} linears, {found.bits_per_weight:.2f} bits per weight"
        )
    table.add_row("parameters", f"{found.parameters / 1e6:,.1f} M")
    dense = ", ".join(f"{count / 1e6:,.1f} M {dtype}" for dtype, count in found.dtypes.items())
    table.add_row("dense tensors", dense)
    table.add_row(
        "size", f"{found.bytes / 1e6:,.1f} MB, {found.files} files, {found.tensors} tensors"
    )
    if found.provenance:
        source = found.provenance["source"]
        revision = f" @ {source['revision'][:12]}" if source["revision"] else ""
        table.add_row("made from", escape(f"{source['name']}{revision}"))
        table.add_row("made by", f"quantkit {found.provenance['versions']['quantkit']}")
        measured = found.provenance["measured"]
        if measured:
            table.add_row("measured KL", f"{measured['kl']:.4f} ± {measured['kl_error']:.4f}")
    console = stdout()
    console.print(table)
    for text in found.warnings:
        console.print(f"[yellow]warning:[/] {escape(text)}")
