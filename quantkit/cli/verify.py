"""``quantkit verify MODEL``"""

import json
from typing import Any

import click

from quantkit.cli import options
from quantkit.errors import GateFailed


@click.command("verify")
@click.argument("model")
@click.option("--against", metavar="MODEL", help="The original; default: the recorded one.")
@click.option(
    "--text",
    multiple=True,
    metavar="SOURCE",
    help="Text to measure on, repeatable (as for --calib); default: the bundled held-out sets.",
)
@click.option("--rows", type=int, default=16, show_default=True, help="Rows of each text at most.")
@click.option("--seqlen", type=int, default=512, show_default=True, help="Tokens in a row.")
@click.option(
    "--samples/--no-samples", default=True, show_default=True, help="Continue a few prompts too."
)
@click.option("--max-kl", type=float, help="Exit with 3 when the mean KL is above this.")
@options.running
@options.as_json
@options.quiet
def command(as_json: bool, quiet: bool, max_kl: float | None, **options: Any) -> None:
    """Measure a quantized MODEL against its original.

    Perplexity of both, KL divergence, how often they predict the same token, the error of every
    layer, and what both make of a few prompts.
    """
    from rich.markup import escape

    from quantkit.cli.console import Drawn, stdout
    from quantkit.cli.tables import comparison_table, layer_table, sample_table
    from quantkit.workflows.verify import verify

    progress = Drawn(quiet)
    try:
        found = verify(progress=progress, **options).described()
    finally:
        progress.end()
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        console = stdout()
        console.print(comparison_table(found, f"{found['model']} against {found['against']}"))
        if found["layers"]:
            console.print(layer_table(found["layers"], 5))
        if found["samples"]:
            console.print(sample_table(found["samples"]))
        for text in found["notes"]:
            console.print(f"[yellow]note:[/] {escape(text)}")
    # a KL that is not a number is not below any limit
    if max_kl is not None and not found["kl"] <= max_kl:
        raise GateFailed(f"mean KL {found['kl']:.4f} is above --max-kl {max_kl:g}")
