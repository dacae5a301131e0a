"""``quantkit generate MODEL PROMPT``"""

import sys
from typing import Any

import click

from quantkit.cli import options
from quantkit.errors import UsageError


@click.command("generate")
@click.argument("model")
@click.argument("prompt")
@click.option(
    "--chat/--raw",
    default=None,
    help="Put the prompt into the model's chat template, or not.  [default: if it has one]",
)
@click.option("--max-new-tokens", "-n", type=int, default=256, show_default=True)
@click.option("--temperature", "-t", type=float, help="0 always takes the likeliest token.")
@click.option("--top-p", type=float, help="Sample from the likeliest tokens of this total share.")
@click.option("--top-k", type=int, help="Sample from this many tokens.")
@click.option("--min-p", type=float, help="Leave out tokens below this share of the likeliest.")
@click.option("--repetition-penalty", type=float, help="Above 1 discourages repeating.")
@click.option("--stop", multiple=True, help="Stop after this text; repeatable.")
@click.option("--seed", type=int, help="For the same text again.")
@options.basename
@options.running
@options.quiet
def command(quiet: bool, **options: Any) -> None:
    """Continue PROMPT (- reads it from standard input), or answer it if the model can chat.

    Sampling settings that are not given are those of the model's generation_config.json.
    """
    from quantkit.workflows.generate import generate

    if options["prompt"] == "-":
        try:
            options["prompt"] = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UsageError("the prompt on standard input is not UTF-8 text") from error

    def write(text: str) -> None:
        click.echo(text, nl=False)
        sys.stdout.flush()

    result = generate(write=write, **options)
    click.echo()
    if not quiet:
        rate = result.tokens / result.seconds
        click.secho(
            f"{result.prompt_tokens} + {result.tokens} tokens, {result.seconds:.1f} s, "
            f"{rate:.1f} tokens/s",
            dim=True,
            err=True,
        )
