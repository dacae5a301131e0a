"""``quantkit rtn MODEL``"""

from pathlib import Path
from typing import Any

import click

from quantkit.cli import options, process
from quantkit.cli.published import publishing


@click.command("rtn")
@click.argument("model")
@click.option("--out", "-o", metavar="FOLDER", help="Where to; default: NAME-rtn-4bit-128g here.")
@click.option("--bits", "-b", type=int, help="2, 3, 4 or 8.  [default: 4, or what the type has]")
@click.option(
    "--group",
    "-g",
    type=int,
    help="Inputs that share one scale, or -1 for the whole row.  [default: 128, in GGUF 32]",
)
@click.option(
    "--sym/--asym", default=None, help="Symmetric codes or not.  [default: sym, in mlx asym]"
)
@click.option(
    "--format",
    default="auto",
    show_default=True,
    help="gptq, gptq_v2, awq, compressed-tensors, mlx, or gguf:TYPE with the types q4_0, q4_1, "
    "q5_0, q5_1, q8_0. auto: gptq when symmetric, else gptq_v2.",
)
@options.shard
@options.pre_tokenizer
@options.carrying
@options.low_disk
@options.quiet
@publishing
def command(quiet: bool, **settings: Any) -> Path | None:
    """Round MODEL to nearest, without calibration: quick, and the baseline for every method.

    Only the linears inside the decoder blocks are quantized; embeddings and head stay as they are
    (in mlx too, where mlx_lm.convert would quantize them).
    """
    from quantkit.cli.console import Drawn, stdout
    from quantkit.cli.written import say_quantized
    from quantkit.workflows.rtn import quantize_rtn

    process.return_memory()
    progress = Drawn(quiet)
    try:
        result = quantize_rtn(progress=progress, **settings)
    finally:
        progress.end()
    if not quiet:
        say_quantized(stdout(), result, settings["model"])
    return result.folder if result.written else None
