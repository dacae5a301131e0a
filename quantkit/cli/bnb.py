"""``quantkit bnb MODEL``"""

from pathlib import Path
from typing import Any

import click

from quantkit.cli import options, process
from quantkit.cli.published import publishing


@click.command("bnb")
@click.argument("model")
@click.option("--out", "-o", metavar="FOLDER", help="Where to; default: NAME-bnb-nf4 here.")
@click.option(
    "--type",
    type=click.Choice(["nf4", "fp4", "int8"]),
    default="nf4",
    show_default=True,
    help="What weights are rounded to.",
)
@click.option(
    "--double-quant/--no-double-quant",
    default=None,
    help="Store the scales of 4-bit blocks in 8 bits.  [default: double-quant]",
)
@click.option(
    "--compute-dtype",
    type=click.Choice(["auto", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="What 4-bit matmuls compute in. auto: bf16 where the model is stored in it, else fp16; a "
    "T4 has no bf16.",
)
@options.shard
@options.carrying
@options.low_disk
@options.quiet
@publishing
def command(quiet: bool, **settings: Any) -> Path | None:
    """Quantize MODEL to what bitsandbytes loads, without a GPU and bit for bit as it does.

    No calibration; one linear is in memory at a time.
    """
    from quantkit.cli.console import Drawn, stdout
    from quantkit.cli.written import say_quantized
    from quantkit.workflows.bnb import quantize_bnb

    process.return_memory()
    progress = Drawn(quiet)
    try:
        result = quantize_bnb(progress=progress, **settings)
    finally:
        progress.end()
    if not quiet:
        say_quantized(stdout(), result, settings["model"])
    return result.folder if result.written else None
