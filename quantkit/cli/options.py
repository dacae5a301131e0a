"""Options that several commands share."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from quantkit.errors import UsageError

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]


class Limit(click.ParamType[str]):
    """A number, or SET=NUMBER, for ``what`` of workflows/gate.py."""

    name = "limit"

    def __init__(self, what: str) -> None:
        self._what = what

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from quantkit.workflows import gate

        gate.limit(self._what, value)
        return value


def sized(prefix: str, rows: int, seqlen: int, of: str = "") -> Decorator:
    """How much text: ``--rows`` and ``--seqlen`` behind a prefix, their defaults; ``of`` what."""

    def decorate(command: Command) -> Command:
        for name, least, default, help in (
            ("seqlen", 2, seqlen, f"Tokens in a row{of}."),
            ("rows", 1, rows, f"Rows{of} at most."),
        ):
            number = click.IntRange(min=least)
            command = click.option(
                f"--{prefix}{name}", type=number, default=default, show_default=True, help=help
            )(command)
        return command

    return decorate


calibration_size = sized("calib-", rows=128, seqlen=2048)
shard = click.option("--max-shard-size", default="5GB", show_default=True, help="Largest file.")
pre_tokenizer = click.option(
    "--pre-tokenizer", metavar="NAME", help="GGUF's name for how the tokenizer cuts text."
)
template = click.option(
    "--template",
    metavar="NAME|FILE",
    help="Prompt format in the place of the model's own chat template: weblab, alpaca-ja, "
    "llama-2, deepseek, synthia, qa, or a file (.jinja, or text with {system} and {prompt}).",
)


def in_a_folder(context: click.Context, option: click.Parameter, file: str | None) -> str | None:
    """A file that can be written in the end, said before anything is measured."""
    if file and not Path(file).absolute().parent.is_dir():
        raise UsageError(f"there is no folder for {file}")
    if file and Path(file).is_dir():
        raise UsageError(f"{file} is a folder", "give the name of a file")
    return file


def running(command: Command) -> Command:
    """Which revision of a model runs, where and in which precision."""
    revision = click.option(
        "--revision", metavar="REV", help="Branch, tag or commit of a repository."
    )
    return computing(revision(command))


def computing(command: Command) -> Command:
    """Where and in which precision a model runs."""
    for option in (
        click.option(
            "--dtype",
            default="auto",
            show_default=True,
            help="Precision to run in: auto, bfloat16, float16 or float32.",
        ),
        click.option(
            "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
        ),
    ):
        command = option(command)
    return command


def talking(command: Command) -> Command:
    """How a model answers: prompt, length, sampling, and which program computes."""
    for option in (
        click.option(
            "--engine",
            default="auto",
            show_default=True,
            help="torch or llama.cpp; auto: llama.cpp for GGUF files on a CPU, where it is "
            "installed.",
        ),
        click.option("--seed", type=int, help="For the same text again."),
        click.option("--repetition-penalty", type=float, help="Above 1 discourages repeating."),
        click.option(
            "--min-p", type=float, help="Leave out tokens below this share of the likeliest."
        ),
        click.option("--top-k", type=int, help="Sample from this many tokens."),
        click.option(
            "--top-p", type=float, help="Sample from the likeliest tokens of this total share."
        ),
        click.option("--temperature", "-t", type=float, help="0 always takes the likeliest token."),
        click.option(
            "--until-eos",
            is_flag=True,
            help="Go on past --max-new-tokens until the model ends the text itself.",
        ),
        click.option(
            "--max-new-tokens",
            "-n",
            type=int,
            default=256,
            show_default=True,
            help="Tokens of an answer, at most.",
        ),
        click.option(
            "--stop", multiple=True, help="Stop before this text, and leave it out; repeatable."
        ),
        template,
        click.option("--system", help="System message: what the model should be, or do."),
    ):
        command = option(command)
    return command


def calibrating(command: Command) -> Command:
    """The text that a method looks at, and its order."""
    seed = click.option(
        "--seed", type=int, default=0, show_default=True, help="For shuffling the text."
    )
    return calibration_text(seed(command))


def calibration_text(command: Command) -> Command:
    """The text that a method looks at."""
    text = click.option(
        "--calib",
        "-c",
        multiple=True,
        default=("bundled",),
        show_default=True,
        help="Calibration text, repeatable: bundled, bundled:ja=64,en=64, FILE "
        "(.txt .jsonl .csv .parquet), FILE:column, hf:DATASET:CONFIG:SPLIT:COLUMN, wikitext2, "
        "c4, c4-ja, wikipedia-ja, self; =N for N rows of it.",
    )
    return text(calibration_size(command))


def memory(command: Command) -> Command:
    """How much of it a quantization may use."""
    for option in (
        click.option(
            "--max-memory",
            metavar="SIZE",
            help="Use at most so much RAM, such as 4GB.  [default: what is free]",
        ),
        click.option(
            "--max-gpu-memory",
            metavar="SIZE",
            help="Use at most so much of the GPU's memory: what does not fit goes to RAM or to "
            "disk.  [default: what is free]",
        ),
    ):
        command = option(command)
    return command


def profiling(command: Command) -> Command:
    """``--profile``: the command is given what was measured, None where it was not asked for."""

    @click.option("--profile", is_flag=True, help="Show what the time went into.")
    @wraps(command)
    def measured(profile: bool, **options: Any) -> Any:
        from quantkit.core import profile as profiling

        if not profile:
            return command(**options)
        found = profiling.start()
        try:
            result = command(**options)
        finally:
            profiling.stop()
        _tell_phases(found.seconds, found.floor(), found.speed)
        return result

    return measured


def _tell_phases(seconds: dict[str, float], floor: dict[str, float], speed: float) -> None:
    """Seconds by phase, and the floor below them where it is known (core/profile.py)."""
    from quantkit.cli.console import stdout
    from quantkit.cli.tables import plain_table

    whole, least = sum(seconds.values()), sum(floor.values())
    rows = [
        [name, f"{spent:.2f}", _seconds(floor.get(name)), f"{100 * spent / whole:.0f} %"]
        for name, spent in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    header = ["phase", "seconds", "floor", "share"]
    stdout().print(plain_table("seconds by phase", header, rows))
    if least:
        stdout().print(
            f"The floor is {least:.3g} s, {100 * least / whole:.2g} % of these {whole:.2f} s: one "
            "forward pass, Hessians, their factors and one pass of rounding at the "
            f"{speed / 1e12:.3g} TFLOP/s that a large product reaches here."
        )


def _seconds(count: float | None) -> str:
    return "" if count is None else f"{count:.3g}"


def writing(command: Command) -> Command:
    """What is written, and when not."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Show the plan, write nothing."),
        click.option("--overwrite", is_flag=True, help="Replace an earlier output of quantkit."),
        click.option("--strict", is_flag=True, help="Fail where a fallback would be taken."),
        click.option(
            "--check/--no-check",
            default=True,
            show_default=True,
            help="Measure the result on held-out text along the way.",
        ),
        shard,
    ):
        command = option(command)
    return command


def carrying(command: Command) -> Command:
    """What is carried over, and when not."""
    for option in (
        click.option("--revision", metavar="REV", help="Branch, tag or commit of a repository."),
        click.option("--dry-run", is_flag=True, help="Show the plan, write nothing."),
        click.option("--overwrite", is_flag=True, help="Replace an earlier output of quantkit."),
    ):
        command = option(command)
    return command


legacy_name = click.option(
    "--legacy-name",
    metavar="NAME",
    help="Also name the weight file as AutoGPTQ did: gptq_model-4bit-128g (its model_basename).",
)
low_disk = click.option(
    "--low-disk",
    is_flag=True,
    help="Leave the weights on the Hub and read them tensor by tensor: no disk for the original.",
)
quiet = click.option("-q", "--quiet", is_flag=True, help="Say nothing but warnings.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
basename = click.option(
    "--model-basename", metavar="NAME", help="The weight file, without its ending, of several."
)


def mixing(command: Command) -> Command:
    """Other bits for some linears."""
    for option in (
        click.option(
            "--target-size",
            metavar="SIZE",
            help="The same, with a folder of at most this size: 6.0GB.",
        ),
        click.option(
            "--target-bits",
            type=float,
            help="Choose bits for every part of the model so that it loses the least with so many "
            "bits a weight on average, such as 4.25.",
        ),
        click.option(
            "--rule",
            multiple=True,
            metavar="RULE",
            help="Other settings for some linears, repeatable, the last one wins: "
            "'*.mlp.down_proj: bits=8,group=64', '*.layers.0.*: skip', '*.o_proj: method=rtn'.",
        ),
    ):
        command = option(command)
    return command


def measuring(command: Command) -> Command:
    """On which text models are compared, and how."""
    for option in (
        click.option(
            "--engine",
            type=click.Choice(["torch", "llama.cpp"]),
            default="torch",
            show_default=True,
            help="What computes a GGUF file's predictions (llama.cpp: quantkit[llamacpp]).",
        ),
        click.option(
            "--samples/--no-samples",
            default=True,
            show_default=True,
            help="Continue a few prompts too.",
        ),
        sized("", rows=16, seqlen=512, of=" of each text"),
        click.option(
            "--text",
            multiple=True,
            metavar="SOURCE",
            help="Text to measure on, repeatable: FILE, FILE:column, hf:..., wikitext2; default: "
            "the bundled held-out sets.",
        ),
    ):
        command = option(command)
    return command


def judging(command: Command) -> Command:
    """Limits."""
    for option in (
        click.option(
            "--gate",
            is_flag=True,
            help="Hold it to what is usual for its bits too (see docs/verify.md).",
        ),
        click.option(
            "--max-ppl-ratio",
            type=Limit("perplexity_ratio"),
            multiple=True,
            help="The same for the perplexity divided by the original's.",
        ),
        click.option(
            "--min-top1",
            type=Limit("top1"),
            multiple=True,
            help="Exit with 3 when the share of equal next tokens is below this.",
        ),
        click.option(
            "--max-kl",
            type=Limit("kl"),
            multiple=True,
            help="Exit with 3 when the mean KL is above this; ja=0.2 limits one text, repeatable.",
        ),
    ):
        command = option(command)
    return command


def reporting(command: Command) -> Command:
    """A page to look at."""
    lang = click.option(
        "--lang",
        type=click.Choice(["en", "ja"]),
        default="en",
        show_default=True,
        help="The report's language.",
    )
    report = click.option(
        "--report",
        metavar="FILE",
        callback=in_a_folder,
        help="Write a report to look at, one HTML file.",
    )
    return report(lang(command))
