"""``quantkit verify MODEL``"""

import json
import os
from pathlib import Path
from typing import Any

import click

from quantkit.cli import options
from quantkit.errors import GateFailed, UsageError

_SUMMARY = "GITHUB_STEP_SUMMARY"


@click.command("verify")
@click.argument("model")
@click.option("--against", metavar="MODEL", help="The original; default: the recorded one.")
@options.measuring
@options.judging
@options.reporting
@click.option(
    "--junit",
    metavar="FILE",
    callback=options.in_a_folder,
    help="Write the limits as a JUnit file.",
)
@click.option("--github", is_flag=True, help="Add a table to the summary of a GitHub job.")
@click.option(
    "--write/--no-write",
    default=True,
    show_default=True,
    help="Put the verdict into quantkit.json and the model card, if quantkit wrote the folder.",
)
@options.running
@options.as_json
@options.quiet
def command(
    as_json: bool,
    quiet: bool,
    report: str | None,
    lang: str,
    junit: str | None,
    github: bool,
    **options: Any,
) -> None:
    """Measure a quantized MODEL against its original.

    Perplexity of both, KL divergence, how often they predict the same token, the error of every
    layer, and what both make of a few prompts. Ends with 3 when a limit was not kept.
    """
    from quantkit.cli.console import Drawn
    from quantkit.workflows import gate
    from quantkit.workflows.verdict import plain
    from quantkit.workflows.verify import verify

    limits = any(options[name] for name in ("max_kl", "min_top1", "max_ppl_ratio", "gate"))
    _refuse(junit, github, limits)
    progress = Drawn(quiet)
    try:
        found = verify(progress=progress, **options).described()
    finally:
        progress.end()
    if as_json:
        click.echo(json.dumps(plain(found), indent=2, ensure_ascii=False))
    else:
        _show(found)
    if report:
        from quantkit.workflows import report_html

        report_html.write(found, Path(report), lang)
    if junit:
        gate.write_junit(Path(junit), found["model"], found["gate"])
    if github:
        with open(os.environ[_SUMMARY], "a", encoding="utf-8") as file:
            file.write(gate.github_summary(found))
    _judge(found)


def _refuse(junit: str | None, github: bool, limits: bool) -> None:
    """What could not be written in the end, before anything is measured."""
    if junit and not limits:
        raise UsageError("--junit has nothing to tell", "add --gate or a limit such as --max-kl")
    if github and not os.environ.get(_SUMMARY):
        raise UsageError("--github works inside of a GitHub job only", f"it sets {_SUMMARY}")


def _show(found: dict[str, Any]) -> None:
    from rich.markup import escape

    from quantkit.cli import tables
    from quantkit.cli.console import stdout

    console = stdout()
    console.print(tables.verified_table(found))
    if found["layers"]:
        console.print(tables.layer_table(found["layers"], 5))
    if found["worst"]:
        console.print(tables.passage_table(found["worst"], 3))
    if found["samples"]:
        console.print(tables.sample_table(found["samples"], 3))
    for line in tables.facts(found):
        console.print(escape(line))
    for line in tables.finding_lines(found):
        console.print(f"[yellow]look at this:[/] {escape(line)}")
    for text in found["notes"]:
        console.print(f"[yellow]note:[/] {escape(text)}")
    if found["gate"] and found["gate"]["passed"]:
        console.print(f"[green]passed:[/] {len(found['gate']['checks'])} limits were kept")


def _judge(found: dict[str, Any]) -> None:
    from quantkit.cli.tables import gate_lines

    failed = gate_lines(found)
    if failed:
        raise GateFailed("; ".join(failed))
