"""``quantkit convert MODEL --to FORMAT``"""

from typing import Any

import click

from quantkit.cli import options, process
from quantkit.errors import UsageError

# what --to may be, and the types of each: here, so that a recipe is checked without torch
FORMATS: dict[str, tuple[str, ...]] = {
    "gptq": (),
    "gptq_v2": (),
    "awq": (),
    "compressed-tensors": (),
    "mlx": (),
    "dense": ("f16", "bf16", "f32"),
}
FORMATS["gguf"] = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16", "bf16", "f32")
FORMATS["gguf"] += ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m")
FORMATS["gguf"] += ("q6_k",)


def _check_format(context: click.Context, option: click.Parameter, value: str) -> str:
    name, colon, kind = value.lower().partition(":")
    name = {"gptq-v2": "gptq_v2", "compressed_tensors": "compressed-tensors"}.get(name, name)
    if name not in FORMATS or (colon and not FORMATS[name]):
        known = ", ".join(name for name in FORMATS if name != "gguf")
        raise UsageError(f"'{value}' is no format to convert to", f"use {known} or gguf:TYPE")
    if kind not in FORMATS[name] and (colon or name == "gguf"):
        types = ", ".join(f"{name}:{kind}" for kind in FORMATS[name])
        raise UsageError(f"'{value}' is no type that is written", f"use {types}")
    return value


@click.command("convert")
@click.argument("model")
@click.option(
    "--to",
    required=True,
    metavar="FORMAT",
    callback=_check_format,
    help="gptq, gptq_v2, awq, compressed-tensors, mlx, dense[:f16|bf16|f32], or gguf:TYPE with the "
    "types q4_0, q4_1, q5_0, q5_1, q8_0, f16, bf16, f32, or K types such as q4_k_m.",
)
@click.option("--out", "-o", metavar="FOLDER", help="Where to.  [default: MODEL-FORMAT]")
@click.option("--lossy", is_flag=True, help="Round what does not fit, and measure the error.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest file.")
@click.option(
    "--pre-tokenizer", metavar="NAME", help="GGUF's name for how the tokenizer cuts text."
)
@options.basename
@options.legacy_name
@click.option("--overwrite", is_flag=True, help="Replace an earlier output of quantkit.")
@click.option("--dry-run", is_flag=True, help="See whether everything fits, write nothing.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a repository.")
@options.quiet
def command(quiet: bool, **settings: Any) -> None:
    """Convert MODEL to another format, exactly wherever the format can hold the numbers.

    What cannot be held is refused with the reason, unless --lossy. At the end everything is read
    back and compared.
    """
    from quantkit.cli import written
    from quantkit.cli.console import Drawn, stdout
    from quantkit.workflows.convert import convert

    process.return_memory()
    progress = Drawn(quiet)
    try:
        result = convert(progress=progress, **settings)
    finally:
        progress.end()
    if quiet:
        return
    console = stdout()
    if not result.written:
        written.say_planned(console, result)
        return
    written.say_exactness(console, result)
    written.say_written(console, result)
