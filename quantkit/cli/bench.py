"""``quantkit bench MODEL``"""

import json
from pathlib import Path
from typing import Any

import click

from quantkit.cli import options
from quantkit.errors import UsageError


@click.command("bench")
@click.argument("model")
@click.option("--batch", default="1", show_default=True, help="Texts at a time: 1,4.")
@click.option("--context", default="128,512", show_default=True, help="Tokens of the prompt.")
@click.option("--new", type=int, default=64, show_default=True, help="Tokens to make.")
@click.option("--repeats", type=int, default=3, show_default=True, help="The median counts.")
@click.option("--engine", default="auto", show_default=True, help="auto, torch or llama.cpp.")
@click.option(
    "--json", "json_file", callback=options.in_a_folder, help="Write it to this file too."
)
@click.option("--plot", callback=options.in_a_folder, help="Draw it here: an .svg file.")
@options.basename
@options.running
@options.quiet
def command(
    model: str,
    batch: str,
    context: str,
    json_file: str | None,
    plot: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure how fast MODEL reads prompts and makes text, and what share of the memory's bandwidth
    that is."""
    if plot is not None and Path(plot).suffix != ".svg":
        raise UsageError(f"{plot} is not an .svg file", "name it so")
    from quantkit.cli.console import Drawn, stdout
    from quantkit.cli.tables import bench_table
    from quantkit.core.checkpoint import write_text
    from quantkit.workflows.bench import bench

    found = bench(
        model,
        batch=_numbers(batch, "--batch"),
        context=_numbers(context, "--context"),
        progress=Drawn(quiet),
        **options,
    )
    stdout().print(bench_table(found.described()))
    if json_file is not None:
        write_text(Path(json_file), json.dumps(found.described(), indent=2) + "\n")
    if plot is not None:
        from quantkit.workflows.bench_chart import chart

        write_text(Path(plot), chart(found))


def _numbers(given: str, option: str) -> list[int]:
    try:
        return [int(part) for part in given.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} {given} should be whole numbers", "such as 1,4") from error
