"""``quantkit chat MODEL``"""

import importlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli import options
from quantkit.errors import QuantkitError, UsageError

if TYPE_CHECKING:
    from quantkit.workflows.conversation import Conversation

_HELP = """\
/system TEXT   another system message (nothing: none)
/regen         another answer to the last thing you said
/undo          forget the last turn
/save FILE     keep the conversation
/load FILE     go on with one that was kept
/help          this
/exit          leave (as Ctrl-D does)
Ctrl-C stops an answer; at the prompt it leaves."""


@click.command("chat")
@click.argument("model")
@options.talking
@options.basename
@options.running
@options.quiet
def command(quiet: bool, model: str, **settings: Any) -> None:
    """Talk with MODEL; /help at the prompt shows what else there is.

    From a pipe every line is a turn, and standard output has the answers alone.
    """
    from quantkit.cli.console import Drawn
    from quantkit.workflows.conversation import open_conversation

    progress = Drawn(quiet)
    chat = open_conversation(model, note=progress.note, **settings)
    progress.note("/help shows what there is, Ctrl-D leaves")
    for line in _lines():
        try:
            if line.startswith("/"):
                done = _obey(chat, line, quiet)
                if done:
                    return
            elif line.strip():
                _show(chat, chat.say(line), quiet)
        except QuantkitError as error:
            progress.warn(" - ".join(filter(None, (error.message, error.hint))))


def _lines() -> Iterator[str]:
    """What is typed, line by line, until it ends."""
    if sys.stdin is None:
        raise UsageError("standard input is closed")
    if not sys.stdin.isatty():
        try:
            for line in sys.stdin:
                yield line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UsageError("standard input is not UTF-8 text") from error
        return
    if find_spec("readline"):  # not on Windows
        importlib.import_module("readline")  # input() lets lines be edited with it
    while True:
        try:
            yield input("> ")
        except UnicodeDecodeError:  # bytes that are no UTF-8, from a terminal that should send it
            click.echo("that was no UTF-8 text", err=True)
        except (EOFError, KeyboardInterrupt):
            click.echo(err=True)
            return


def _obey(chat: "Conversation", line: str, quiet: bool) -> bool:
    """Do what a line with a slash says -> whether the chat is over."""
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word in ("/save", "/load") and not rest:
        raise UsageError(f"{word} needs the name of a file")
    if word == "/exit":
        return True
    if word == "/help":
        click.echo(_HELP, err=True)
    elif word == "/system":
        chat.set_system(rest)
    elif word == "/undo":
        click.echo(f"forgotten: {chat.undo()}", err=True)
    elif word == "/regen":
        _show(chat, chat.again(), quiet)
    elif word == "/save":
        chat.save(_file(rest))
        click.echo(f"{len(chat.messages)} messages in {rest}", err=True)
    elif word == "/load":
        chat.load(_file(rest))
        click.echo(f"{len(chat.messages)} messages from {rest}", err=True)
    else:
        raise UsageError(f"there is no {word}", "/help shows what there is")
    return False


def _file(name: str) -> Path:
    """Raises UsageError for what can be no file."""
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # there is no such user
        raise UsageError(f"there is no {name}") from error
    if path.name in ("", "..") or "\0" in name:
        raise UsageError(f"{name!r} is no name of a file")
    return path


def _show(chat: "Conversation", pieces: Iterator[str], quiet: bool) -> None:
    """Print an answer as it comes; Ctrl-C ends it."""
    if chat.dropped and not quiet:
        click.secho(f"(the oldest {chat.dropped} turns do not fit any more)", dim=True, err=True)
    started = perf_counter()
    try:
        for piece in pieces:
            click.echo(piece, nl=False)
            sys.stdout.flush()
    except KeyboardInterrupt:
        click.secho(" (stopped)", dim=True, err=True, nl=False)
    click.echo()
    if not quiet and chat.answer is not None:
        seconds = perf_counter() - started
        tokens = len(chat.answer.ids)
        click.secho(f"({tokens} tokens, {tokens / seconds:.1f} tokens/s)", dim=True, err=True)
