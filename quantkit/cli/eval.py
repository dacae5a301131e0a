"""``quantkit eval MODEL``"""

import json
from typing import Any

import click

from quantkit.cli import options


@click.command("eval")
@click.argument("model")
@click.option(
    "--tasks",
    required=True,
    metavar="NAME,...",
    help="What lm-eval calls them: hellaswag,jcommonsenseqa.",
)
@click.option("--limit", type=int, help="Only so many questions of each task.")
@click.option("--batch-size", type=int, default=1, show_default=True, help="Questions at a time.")
@click.option(
    "--num-fewshot", type=int, help="Examples in front of each; default: what the task says."
)
@click.option("--include-path", metavar="FOLDER", help="Tasks of your own, as YAML files.")
@options.running
@options.as_json
def command(as_json: bool, **options: Any) -> None:
    """Score MODEL on tasks by lm-evaluation-harness (pip install 'quantkit[eval]').

    MODEL may be of any format that quantkit loads. Scores are shown and not written anywhere:
    what was lost, only a comparison with the original tells (quantkit verify).
    """
    from quantkit.cli.console import stdout
    from quantkit.cli.tables import score_table
    from quantkit.workflows.evaluate import evaluate
    from quantkit.workflows.verdict import plain

    found = evaluate(**options).described()
    if as_json:
        click.echo(json.dumps(plain(found), indent=2, ensure_ascii=False))
    else:
        stdout().print(score_table(found))
