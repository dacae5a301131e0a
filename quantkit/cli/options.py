"""Options that several commands share."""

from collections.abc import Callable
from typing import Any

import click

Command = Callable[..., Any]


def running(command: Command) -> Command:
    """Where and in which precision a model runs."""
    for option in (
        click.option("--revision", metavar="REV", help="Branch, tag or commit of a repository."),
        click.option(
            "--dtype",
            default="auto",
            show_default=True,
            help="Precision to run in: auto, bfloat16, float16 or float32.",
        ),
        click.option(
            "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
        ),
    ):
        command = option(command)
    return command


quiet = click.option("-q", "--quiet", is_flag=True, help="Say nothing but warnings.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
basename = click.option(
    "--model-basename", metavar="NAME", help="The weight file, without its ending, of several."
)
rule = click.option(
    "--rule",
    multiple=True,
    metavar="RULE",
    help="Other settings for some linears, repeatable, the last one wins: "
    "'*.mlp.down_proj: bits=8,group=64', '*.layers.0.*: skip', '*.o_proj: method=rtn'.",
)
