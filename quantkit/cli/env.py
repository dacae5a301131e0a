"""``quantkit env``"""

import json
from typing import TYPE_CHECKING

import click

from quantkit.cli import options

if TYPE_CHECKING:
    from quantkit.workflows.env import Environment


@click.command("env")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1.")
@options.as_json
def command(device: str, as_json: bool) -> None:
    """Show what is installed, and which kernel computes with which quantized weight here.

    Where something faster exists and is not used, it says why. To be pasted into a bug report.
    """
    from quantkit.workflows.env import environment

    found = environment(device)
    if as_json:
        click.echo(json.dumps(found.described(), indent=2))
    else:
        _print(found)


def _print(found: "Environment") -> None:
    from quantkit.cli.console import stdout

    console = stdout()
    for name, version in found.versions.items():
        console.print(f"{name:18} {version or '[dim]not installed[/]'}")
    console.print()
    for name, value in found.device.items():
        text = f"{value / 1e9:.1f} GB" if name == "memory" else value
        console.print(f"{name:18} {text}", markup=False)
    console.print(f"{'cache':18} {found.cache}", markup=False)
    console.print()
    for choice in [*found.kernels, found.decoding]:
        console.print(f"{choice.scheme:42} {choice.kernel}", markup=False)
        if choice.reason:
            console.print(f"{'':42} [dim]{choice.reason}[/]")
