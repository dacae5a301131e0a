"""``quantkit generate MODEL [PROMPT]``"""

import sys
from pathlib import Path
from typing import Any

import click

from quantkit.cli import options
from quantkit.errors import UsageError


class _Asked(click.Command):
    """Needs a prompt or a file of them; recipes are checked by this too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        prompt, questions, out = (ctx.params.get(name) for name in ("prompt", "in", "answers"))
        if questions is not None and out is None:
            raise UsageError("--in has no file for the answers", "add --out FILE.csv")
        if questions is None and out is not None:
            raise UsageError("--out is for the answers to a file's rows", "add --in FILE.csv")
        if prompt is None and questions is None:
            raise UsageError(
                "there is no prompt", "give one in quotes, or --in FILE and --out FILE"
            )
        if prompt is not None and questions is not None:
            raise UsageError("both a prompt and --in were given", "leave one of them out")
        return rest


@click.command("generate", cls=_Asked)
@click.argument("model")
@click.argument("prompt", required=False)
@options.talking
@click.option(
    "--chat/--raw",
    default=None,
    help="Put the prompt into the model's chat template, or not.  [default: if it has one]",
)
@click.option(
    "--in",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Answer every row of this .csv, .tsv, .jsonl or .txt file (one question a line).",
)
@click.option(
    "--out",
    "-o",
    "answers",  # "out" is a folder with a model in recipes, for the next step to work on
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the answers go, beside the rows: .csv, .tsv or .jsonl.",
)
@click.option("--column", metavar="NAME", help="The column with the question.")
@click.option("--batch", type=int, default=8, show_default=True, help="Rows at a time.")
@click.option("--encoding", default="auto", show_default=True, help="Of --in: utf-8, cp932, ...")
@click.option("--overwrite", is_flag=True, help="Begin --out again.")
@options.basename
@options.running
@options.quiet
def command(
    prompt: str | None,
    quiet: bool,
    answers: Path | None,
    column: str | None,
    batch: int,
    encoding: str,
    overwrite: bool,
    **options: Any,
) -> None:
    """Continue PROMPT (- reads it from standard input), or answer it if the model can chat.

    Sampling settings that are not given are those of the model's generation_config.json. With --in
    and --out every row of a file is answered; a run that was stopped goes on where it was.
    """
    questions = options.pop("in")  # a word of Python's
    from quantkit.cli.console import Drawn

    progress = Drawn(quiet)
    if prompt is not None or answers is None:
        _print_answer(prompt, quiet, note=progress.note, **options)
        return
    from quantkit.workflows.answers import answer_file

    done = answer_file(
        questions=questions,
        out=answers,
        column=column,
        batch=batch,
        encoding=encoding,
        overwrite=overwrite,
        progress=progress,
        **options,
    )
    progress.note(f"{done.rows} rows, {done.failed} without an answer: {answers}")


def _print_answer(prompt: str | None, quiet: bool, **options: Any) -> None:
    from quantkit.workflows.generate import generate

    if prompt == "-":
        if sys.stdin is None:
            raise UsageError("standard input is closed")
        try:
            prompt = sys.stdin.read()
            prompt = prompt.removesuffix("\n").removesuffix("\r")  # as echo ends it
        except UnicodeDecodeError as error:
            raise UsageError("the prompt on standard input is not UTF-8 text") from error

    def write(text: str) -> None:
        click.echo(text, nl=False)
        sys.stdout.flush()

    result = generate(prompt=prompt or "", write=write, **options)
    click.echo()
    if not quiet:
        rate = result.tokens / result.seconds
        ended = {"length": ", cut off", "context": ", the context is full"}
        click.secho(
            f"{result.prompt_tokens} + {result.tokens} tokens, {result.seconds:.1f} s, "
            f"{rate:.1f} tokens/s{ended.get(result.reason or '', '')}",
            dim=True,
            err=True,
        )
