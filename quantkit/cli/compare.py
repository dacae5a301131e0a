"""``quantkit compare MODEL...``"""

import json
from pathlib import Path
from typing import Any

import click

from quantkit.cli import options
from quantkit.errors import GateFailed


@click.command("compare")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--against", metavar="MODEL", help="The original; default: that of the first.")
@options.measuring
@options.judging
@options.reporting
@options.computing
@options.as_json
@options.quiet
def command(as_json: bool, quiet: bool, report: str | None, lang: str, **options: Any) -> None:
    """Measure every MODEL against one original, and rank them by mean KL.

    The original runs once. "same" is how many tokens of a greedy continuation are the original's,
    "bits" those of a quantized weight. Models may be of any format that quantkit loads.
    """
    from rich.markup import escape

    from quantkit.cli.console import Drawn, stdout
    from quantkit.cli.tables import gate_lines, ranking_table
    from quantkit.workflows.compare import compare
    from quantkit.workflows.verdict import plain

    progress = Drawn(quiet)
    try:
        found = compare(progress=progress, **options).described()
    finally:
        progress.end()
    if as_json:
        click.echo(json.dumps(plain(found), indent=2, ensure_ascii=False))
    else:
        console = stdout()
        console.print(ranking_table(found))
        for text in dict.fromkeys(text for one in found["models"] for text in one["notes"]):
            console.print(f"[yellow]note:[/] {escape(text)}")
    if report:
        from quantkit.workflows import report_ranking

        report_ranking.write(found, Path(report), lang)
    failed = [f"{one['model']}: {line}" for one in found["models"] for line in gate_lines(one)]
    if failed:
        raise GateFailed("; ".join(failed))
