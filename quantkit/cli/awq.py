"""``quantkit awq MODEL``"""

from pathlib import Path
from typing import Any

import click

from quantkit.cli import options
from quantkit.cli.published import publishing


@click.command("awq")
@click.argument("model")
@click.option(
    "--out", "-o", metavar="FOLDER", help="Where to write; default: NAME-awq-4bit-128g here."
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
@click.option("--sym/--asym", default=False, show_default=True, help="Symmetric codes or not.")
@options.mixing
@click.option(
    "--refine",
    type=click.Choice(["gptq", "none"]),
    default="gptq",
    show_default=True,
    help="How the scaled weights are rounded: by GPTQ, or to nearest in searched ranges (AWQ's).",
)
@click.option(
    "--align",
    type=float,
    help="How far GPTQ corrects for earlier errors, 0 to 1.  [default: 0.5, with --refine none 0]",
)
@click.option(
    "--damp",
    type=float,
    default=0.01,
    show_default=True,
    help="Added to the Hessian's diagonal, as a fraction of its mean.",
)
@options.calibrating
@options.running
@options.memory
@click.option(
    "--format",
    type=click.Choice(["auto", "gptq", "gptq_v2", "awq", "compressed-tensors"]),
    default="auto",
    show_default=True,
    help="Of the files. auto: awq for 4 bits, else gptq when symmetric, gptq_v2 when not.",
)
@options.writing
@options.low_disk
@options.quiet
@options.profiling
@publishing
def command(quiet: bool, calib: tuple[str, ...], **options: Any) -> Path | None:
    """Quantize MODEL by AWQ: inputs are scaled, then weights are rounded.

    Scales are folded into norms and linears where that changes nothing, and kept where the block's
    output gets better. Works block by block and goes on after a stop, as gptq does.
    """
    from quantkit.cli.console import Drawn
    from quantkit.cli.quantized import tell
    from quantkit.workflows.awq import quantize_awq

    progress = Drawn(quiet)
    try:
        report = quantize_awq(calib=list(calib), progress=progress, **options)
    finally:
        progress.end()
    if not quiet:
        tell(report, options["model"])
    return report.folder if report.written else None
