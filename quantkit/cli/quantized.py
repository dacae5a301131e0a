"""What a quantization has come to, and what to do next."""

from typing import TYPE_CHECKING

from rich.markup import escape

from quantkit.cli.console import stdout
from quantkit.cli.tables import comparison_table, plain_table
from quantkit.cli.written import say_next
from quantkit.workflows.budget import table

if TYPE_CHECKING:
    from quantkit.workflows.task import Report


def tell(report: "Report", model: str) -> None:
    """Print it. ``model`` is the argument that was given."""
    console = stdout()
    if report.budget:
        title = f"bits and group size, {report.budget['bits_per_weight']:.3f} bits a weight in all"
        console.print(plain_table(title, *table(report.budget["parts"])))
    if not report.written:
        return
    if report.measured is not None:
        console.print(comparison_table(report.measured.described(), "on held-out text"))
    for line in report.pairs():
        console.print(line, markup=False)
    for text in report.fallbacks:
        console.print(f"[yellow]fallback:[/] {escape(text)}")
    for text in report.backoffs:
        console.print(f"[yellow]memory:[/] {escape(text)}")
    size, seconds = report.plan.output_bytes / 1e6, sum(report.seconds.values())
    folder = escape(str(report.folder))
    console.print(f"wrote [bold]{folder}[/], {size:,.1f} MB, in {seconds:.0f} s")
    say_next(console, report.folder, model)
