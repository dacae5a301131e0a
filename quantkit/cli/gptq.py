"""``quantkit gptq MODEL``"""

from pathlib import Path
from typing import Any

import click

from quantkit.cli import options
from quantkit.cli.published import publishing


@click.command("gptq")
@click.argument("model")
@click.option(
    "--out", "-o", metavar="FOLDER", help="Where to write; default: NAME-gptq-4bit-128g here."
)
@click.option("--bits", "-b", type=int, default=4, show_default=True, help="2, 3, 4 or 8.")
@click.option(
    "--group",
    "-g",
    type=int,
    default=128,
    show_default=True,
    help="Inputs that share one scale: 16 to 1024, or -1 for the whole row.",
)
@click.option("--sym/--asym", default=True, show_default=True, help="Symmetric codes or not.")
@options.mixing
@click.option(
    "--act-order",
    type=click.Choice(["static", "none", "group"]),
    default="static",
    show_default=True,
    help="Order of rounding. static: by activation, groups stay contiguous (every reader); "
    "group: groups too follow the activation (needs g_idx).",
)
@click.option(
    "--damp",
    type=float,
    default=0.01,
    show_default=True,
    help="Added to the Hessian's diagonal, as a fraction of its mean.",
)
@click.option("--fast", is_flag=True, help="One pass, thinned statistics, no refinement.")
@click.option(
    "--align",
    type=float,
    help="How far to correct for earlier errors, 0 to 1.  [default: 0.5, with --fast 0]",
)
@click.option(
    "--refine", type=int, help="Rounds of scale refit and polish.  [default: 2, with --fast 0]"
)
@click.option(
    "--scale-search/--no-scale-search",
    default=True,
    show_default=True,
    help="Search scales under the Hessian, or take the range.",
)
@click.option(
    "--bias-correction/--no-bias-correction",
    default=True,
    show_default=True,
    help="Let biases take up the mean error.",
)
@click.option(
    "--lm-head", is_flag=True, help="Quantize the output head too; few programs read that."
)
@click.option(
    "--tokens-per-input",
    type=int,
    help="Tokens in the statistics per feature of the widest input.  "
    "[default: all, with --fast 10]",
)
@options.calibrating
@options.running
@options.memory
@click.option(
    "--format",
    type=click.Choice(["auto", "gptq", "gptq_v2", "awq", "compressed-tensors"]),
    default="auto",
    show_default=True,
    help="Of the files. auto: gptq when symmetric, else gptq_v2, which has all zero points.",
)
@options.writing
@options.low_disk
@options.legacy_name
@options.quiet
@options.profiling
@publishing
def command(quiet: bool, calib: tuple[str, ...], **options: Any) -> Path | None:
    """Quantize MODEL to GPTQ.

    Blocks are solved one at a time, so memory holds one of them, whatever the model's size. A
    stopped run goes on when the same command is repeated.
    """
    from quantkit.cli.console import Drawn
    from quantkit.cli.quantized import tell
    from quantkit.workflows.quantize import quantize

    progress = Drawn(quiet)
    try:
        report = quantize(calib=list(calib), progress=progress, **options)
    finally:
        progress.end()
    if not quiet:
        tell(report, options["model"])
    return report.folder if report.written else None
