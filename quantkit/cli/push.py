"""``quantkit push FOLDER REPOSITORY``"""

from typing import Any

import click

from quantkit.cli import options


@click.command("push")
@click.argument("folder")
@click.argument("repository")
@click.option(
    "--branch",
    default="main",
    show_default=True,
    metavar="NAME",
    help="One branch for each variant, such as gptq-4bit-32g-actorder_True.",
)
@click.option("--private", is_flag=True, help="Make a repository that only you see.")
@click.option("--message", metavar="TEXT", help="Of the commit.")
@click.option(
    "--unverified", is_flag=True, help="Also a model that was not measured, or missed its limits."
)
@click.option("--overwrite", is_flag=True, help="Also over weights of somebody else.")
@click.option("--dry-run", is_flag=True, help="Look at everything, send nothing.")
@options.quiet
def command(quiet: bool, **settings: Any) -> None:
    """Publish the model in FOLDER on the Hub as REPOSITORY (owner/name).

    All files arrive in one commit, and are compared by their hashes afterwards. When it was
    interrupted, the same command goes on.
    """
    from quantkit.cli.console import Drawn
    from quantkit.cli.published import tell
    from quantkit.workflows.push import push

    result = push(progress=Drawn(quiet), **settings)
    if not quiet:
        tell(result)
