"""``quantkit``: finds the command, and turns errors into a sentence, a hint and an exit code."""

import importlib
import sys
import warnings
from difflib import get_close_matches
from typing import NoReturn

import click

from quantkit import __version__
from quantkit.cli import misuse, process
from quantkit.errors import QuantkitError, QuantkitWarning, UsageError
from quantkit.workflows import several

# one file per command; the help is here so that showing it imports nothing
_COMMANDS = {
    "plan": "Say what a model will take, before it is downloaded.",
    "gptq": "Quantize a model to GPTQ.",
    "awq": "Quantize a model by AWQ.",
    "rtn": "Round a model to nearest, without calibration.",
    "bnb": "Quantize a model to bitsandbytes' NF4, FP4 or int8.",
    "gguf": "Quantize a model to a GGUF file for llama.cpp.",
    "convert": "Convert between formats, without loss where possible.",
    "inspect": "Show what a model's folder holds.",
    "verify": "Measure a quantized model against its original.",
    "compare": "Rank several models by what they lost.",
    "eval": "Score a model on tasks of lm-evaluation-harness.",
    "push": "Publish a quantized model on the Hub.",
    "generate": "Continue or answer a prompt.",
    "chat": "Talk with a model.",
    "bench": "Measure how fast a model runs.",
    "cache": "Show or clear what quantkit keeps for this machine.",
    "serve": "Serve models to OpenAI's clients, and a page to try them on.",
    "env": "Show what is installed, and which kernels are used.",
    "run": "Run a recipe: commands and their options in a file.",
}

_RESUMING = ("gptq", "awq", "rtn", "bnb", "gguf", "convert", "push", "run")


class _Lazy(click.Group):
    """Imports a command's file when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"quantkit.cli.{name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in _COMMANDS and not ctx.resilient_parsing:
            near = get_close_matches(args[0], _COMMANDS, 1)
            hint = f"did you mean {near[0]}?" if near else "see 'quantkit --help'"
            raise UsageError(f"there is no command '{args[0]}'", hint)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="quantkit")
def cli() -> None:
    """Quantize a language model, prove that it is still good, and run it.

    MODEL is a folder, a Hub repository (owner/name or owner/name@revision), or 'demo', a small
    model that comes with quantkit.
    """


def run() -> NoReturn:
    """The ``quantkit`` command: the command line in a process of its own."""
    process.prepare()
    process.stoppable(lambda: _say("stopped", None))
    try:
        several.begin(sys.argv[1:], _say)
        main()
    except SystemExit as end:
        process.leave(int(end.code or 0))
    process.leave(0)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; always ends in SystemExit."""
    warnings.showwarning = _warn
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments and arguments[0] in _COMMANDS else ""
    try:
        sys.exit(cli.main(arguments, "quantkit", standalone_mode=False) or 0)
    except (click.Abort, KeyboardInterrupt):  # click turns the one into the other
        resumes = command in _RESUMING or (command == "generate" and "--in" in arguments)
        _say("stopped", "run the same command again to go on from here" if resumes else None)
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        wrong = misuse.told(error, f"quantkit {command}".rstrip())
        _say(wrong.message, wrong.hint)
        sys.exit(error.exit_code)
    except QuantkitError as error:
        _say(error.message, error.hint)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno is None:  # none of the system's: torch and others make use of the class
            raise
        _say(f"{error.filename or 'the output'}: {error.strerror}", None)
        sys.exit(1)


def _warn(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Warnings as sentences, without the line of code that they came from."""
    name = "" if issubclass(category, QuantkitWarning) else f"{category.__name__}: "
    click.secho("warning: ", fg="yellow", bold=True, err=True, nl=False)
    click.echo(f"{name}{message}", err=True)


def _say(message: str, hint: str | None) -> None:
    if not several.tells():
        return
    click.secho("error: ", fg="red", bold=True, err=True, nl=False)
    click.echo(message, err=True)
    if hint:
        click.secho(" hint: ", fg="cyan", err=True, nl=False)
        click.echo(hint, err=True)
