"""``quantkit plan MODEL``"""

import json
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli import options

if TYPE_CHECKING:
    from quantkit.workflows.forecast import Forecast
    from quantkit.workflows.needs import Need

_DOES_NOT_FIT = 3


@click.command("plan")
@click.argument("model")
@click.option(
    "--for",
    "tasks",
    type=click.Choice(["quantize", "verify", "generate", "serve"]),
    multiple=True,
    help="What to plan, repeatable; default: all.",
)
@click.option(
    "--gpu",
    default="auto",
    show_default=True,
    help="t4, l4, rtx3060, rtx4090, a100 (40 GB), h100 or h200; auto is this machine, cpu this "
    "machine without its GPU.",
)
@click.option("--ram", metavar="SIZE", help="Memory: 12GB.  [default: what is free here]")
@click.option(
    "--method",
    type=click.Choice(["gptq", "awq", "rtn", "none"]),
    default="gptq",
    show_default=True,
    help="How it is to be quantized; none: it is run as it is.",
)
@click.option("--bits", "-b", type=int, default=4, show_default=True, help="2, 3, 4 or 8.")
@click.option(
    "--group", "-g", type=int, default=128, show_default=True, help="Inputs that share one scale."
)
@click.option("--sym/--asym", default=True, show_default=True, help="Symmetric codes or not.")
@click.option("--fast", is_flag=True, help="Quantize in one pass, as gptq --fast does.")
@options.calibration_text
@options.sized("", rows=16, seqlen=512, of=" of each text of verify")
@click.option(
    "--context",
    type=int,
    default=2048,
    show_default=True,
    help="Tokens of a text that is generated or served, prompt included.",
)
@click.option(
    "--sequences", type=int, default=8, show_default=True, help="Texts that are served at once."
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a repository.")
@options.as_json
def command(as_json: bool, **options: Any) -> None:
    """Say what MODEL will take before anything is downloaded: GPU memory, RAM, disk and time of
    quantizing, verifying, generating and serving it, and what to change where it does not fit.

    Reads the configuration and the headers of weight files, over the network too; no weights.
    Figures are estimates (docs/plan.md). Exits with 0 when everything fits, with 3 when something
    does not.
    """
    from quantkit.workflows.forecast import forecast

    found = forecast(**options)
    if as_json:
        click.echo(json.dumps(found.described(), indent=2, ensure_ascii=False))
    else:
        _print(found)
    if not found.fits:
        raise click.exceptions.Exit(_DOES_NOT_FIT)


def _print(found: "Forecast") -> None:
    from rich.markup import escape

    from quantkit.cli.console import stdout
    from quantkit.cli.tables import plain_table

    console, on = stdout(), found.machine
    bits = f", {found.bits_per_weight:.2f} bits a weight" if found.bits_per_weight else ""
    console.print(
        f"{found.name}: {found.parameters / 1e6:,.1f} M parameters, {_gb(found.original)} in "
        f"files; what is run has {_gb(found.result)}{bits}",
        markup=False,
    )
    has = [("GPU memory", on.device), ("RAM", on.ram), ("free disk", on.disk)]
    there = ", ".join(f"{_gb(size)} {name}" for name, size in has if size is not None)
    console.print(f"on {on.name}: {there or 'RAM and disk not given'}", markup=False)
    titles = ["", "GPU memory", "RAM", "disk", "time", "fits"]
    console.print(plain_table("", titles, [_row(need) for need in found.needs]))
    for note in found.notes:
        console.print(f"[yellow]note:[/] {escape(note)}")
    if not found.exact:
        console.print("[yellow]guessed:[/] the model does not run on shapes alone")
    for need in found.needs:
        if need.fits:
            continue
        console.print(f"[yellow]{need.task}:[/] not enough {' and '.join(need.lacking)}")
        changes = need.changes or ("nothing that was tried makes it fit",)
        for change in changes:
            fitting = "fits with " if need.changes else ""
            console.print(f"  {fitting}{escape(change)}")


def _row(need: "Need") -> list[str]:
    device = "" if need.device is None else _gb(need.device)
    disk = _gb(need.disk) if need.disk else ""
    rate = "" if need.rate is None else f", then {_rate(need.rate)} tokens/s"
    time = "unknown" if need.seconds is None else f"{_time(need.seconds)}{rate}"
    return [need.task, device, _gb(need.ram), disk, time, "yes" if need.fits else "no"]


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _time(seconds: float) -> str:
    return f"{seconds / 60:,.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
