"""What a conversion or a rounding says at its end."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from quantkit.workflows.convert_record import Conversion


def say_exactness(console: Console, result: "Conversion") -> None:
    """Whether numbers were changed to fit the format, and how much."""
    if result.exact:
        digest = f"; digest {result.digest}" if result.digest else ""
        console.print(f"every number is the same{digest}")
    elif result.errors:
        name, error = result.worst or ("", 0.0)
        average = sum(result.errors.values()) / len(result.errors)
        console.print(
            f"{len(result.errors)} of {result.linears} linears were rounded: relative error "
            f"{average:.2e} on average, {error:.2e} at most ({escape(name)})"
        )
    if result.dense:
        console.print(f"other tensors were rounded: relative error {result.dense:.2e} at most")


def say_planned(console: Console, result: "Conversion") -> None:
    linears = f" with {result.linears} quantized linears" if result.linears else ""
    console.print(f"the result{linears} would take {result.bytes / 1e6:,.1f} MB")


def say_written(console: Console, result: "Conversion") -> None:
    console.print(
        f"wrote [bold]{escape(str(result.folder))}[/], {result.bytes / 1e6:,.1f} MB, in "
        f"{result.seconds:.1f} s"
    )


def say_quantized(console: Console, result: "Conversion", model: str) -> None:
    """The end of a quantization: how far the weights moved where that is known, and what next."""
    if not result.written:
        say_planned(console, result)
        return
    if layers := result.layers:
        name = max(layers, key=lambda name: layers[name])
        average = sum(layers.values()) / len(layers)
        console.print(
            f"{len(layers)} linears: relative error of the weights {average:.2e} on average, "
            f"{layers[name]:.2e} at most ({escape(name)})"
        )
    if result.dense:
        console.print(f"other tensors were rounded: relative error {result.dense:.2e} at most")
    say_written(console, result)
    say_next(console, result.folder, model)


def say_next(console: Console, folder: Path, model: str) -> None:
    """What to do with a quantized ``folder``, made from the argument ``model``."""
    name = escape(shlex.quote(str(folder)))
    original = Path(model).expanduser()
    # the path of a folder is not recorded in what may be published
    against = f" --against {escape(shlex.quote(str(original)))}" if original.is_dir() else ""
    console.print(
        f"next: [bold]quantkit verify {name}{against}[/], [bold]quantkit generate {name} ...[/]"
    )
