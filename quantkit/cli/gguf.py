"""``quantkit gguf MODEL``"""

from pathlib import Path
from typing import Any

import click

from quantkit.cli import options, process
from quantkit.cli.published import publishing


@click.command("gguf")
@click.argument("model")
@click.option("--out", "-o", metavar="FOLDER", help="Where to; default: NAME-gguf-q4_0 here.")
@click.option(
    "--type",
    "-t",
    default="q4_0",
    show_default=True,
    help="q4_0, q4_1, q5_0, q5_1, q8_0, f16, bf16, f32, or a K type such as q4_k_m, q5_k_m, q6_k "
    "(written by llama.cpp: pip install 'quantkit[llamacpp]').",
)
@click.option(
    "--calib",
    "-c",
    multiple=True,
    help="Calibration text, repeatable, as in 'quantkit gptq'; 'none' to go without. "
    "[default: bundled for q4_0, q4_1 and K types, none for others]",
)
@options.calibration_size
@click.option("--seed", type=int, default=0, show_default=True, help="For shuffling the text.")
@click.option("--fast", is_flag=True, help="GPTQ in one pass, without refinement.")
@click.option(
    "--check/--no-check",
    default=True,
    show_default=True,
    help="Measure GPTQ's result on held-out text along the way.",
)
@click.option(
    "--embedding-type",
    metavar="TYPE",
    help="What embeddings are stored as, such as q8_0.  [default: their 16 bits; in K types "
    "llama.cpp's choice, which is the type itself]",
)
@click.option(
    "--output-type",
    metavar="TYPE",
    help="What the head is stored as.  [default: its 16 bits; in K types Q6_K]",
)
@click.option(
    "--imatrix-out", metavar="FILE", help="Also write the importance matrix, for llama-quantize."
)
@options.pre_tokenizer
@options.carrying
@options.low_disk
@click.option("--dtype", default="auto", show_default=True, help="Precision to calibrate in.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@options.memory
@options.quiet
@publishing
def command(quiet: bool, calib: tuple[str, ...], **settings: Any) -> Path | None:
    """Quantize MODEL to a GGUF file, which llama.cpp runs.

    Q4_0, Q4_1 and Q8_0 are rounded by GPTQ when there is calibration text, in the file's own blocks
    of 32. K types are rounded by llama.cpp, with an importance matrix from the same text.
    """
    from quantkit.cli.console import Drawn, stdout
    from quantkit.cli.tables import comparison_table
    from quantkit.cli.written import say_quantized
    from quantkit.workflows.gguf import quantize_gguf

    process.return_memory()
    progress = Drawn(quiet)
    try:
        result = quantize_gguf(calib=list(calib), progress=progress, **settings)
    finally:
        progress.end()
    if not quiet:
        if result.written and result.measured is not None:
            stdout().print(comparison_table(result.measured, "of GPTQ, on held-out text"))
        say_quantized(stdout(), result, settings["model"])
    return result.folder if result.written else None
