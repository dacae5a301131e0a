"""``--push`` of commands that write a model, and what a push says at its end."""

import functools
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.options import Command
from quantkit.core.counted import counted
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from quantkit.workflows.push import Pushed


def publishing(command: Command) -> Command:
    """Adds --push to a command whose function returns the folder that it wrote (None: nothing)."""

    @functools.wraps(command)
    def and_push(push: str | None, **given: Any) -> None:
        if push is not None:
            _check(push)
        folder: Path | None = command(**given)
        if push is not None and folder is not None:
            _publish(folder, given, push)

    option = click.option(
        "--push", metavar="REPOSITORY", help="Then publish it on the Hub, as 'quantkit push' does."
    )
    return option(and_push)


def _check(repository: str) -> None:
    """What would only be refused hours later."""
    from quantkit.core import publish
    from quantkit.workflows.push import check_name

    check_name(repository)
    publish.check_token()


def _publish(folder: Path, given: dict[str, Any], repository: str) -> None:
    from quantkit.cli.console import Drawn
    from quantkit.core import provenance
    from quantkit.core.source import Source
    from quantkit.workflows.push import measured, push
    from quantkit.workflows.verify import verify

    quiet = given["quiet"]
    progress = Drawn(quiet)
    record = Source(folder.name, folder).read_json(provenance.FILE) or {}
    if not measured(record):
        progress.note("measuring it against the original before it is published")
        try:
            original = given["model"] if given.get("revision") is None else None
            verify(str(folder), against=original, samples=False, progress=progress)
        finally:
            progress.end()
    try:
        result = push(folder, repository, progress=progress)
    except QuantkitError as error:
        again = shlex.join(["quantkit", "push", str(folder), repository])
        error.hint = f"the model is finished in {folder}; '{again}' goes on"
        raise
    if not quiet:
        tell(result)


def tell(result: "Pushed") -> None:
    """Print what was, or would be, published."""
    from rich.markup import escape

    from quantkit.cli.console import stdout

    console = stdout()
    size = f"{counted(len(result.files), 'file')}, {result.bytes / 1e6:,.1f} MB"
    if not result.written:
        console.print(f"would publish {size} as {escape(result.address)}")
        for name in result.files:
            console.print(f"  {escape(name)}")
        for name in result.removed:
            console.print(f"  and remove {escape(name)}")
        return
    for name in result.removed:
        console.print(f"removed {escape(name)}")
    console.print(
        f"published [bold]{escape(result.address)}[/], {size}, every one compared by its hash"
    )
