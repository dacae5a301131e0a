"""Progress and tables for people: drawn on a terminal, plain lines everywhere else."""

import time

import psutil
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from quantkit.core.progress import Progress, Step

_PLAIN_SECONDS = 5.0  # between lines about small steps where there is no bar


def stderr() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


def stdout() -> Console:
    return Console(highlight=False, soft_wrap=True)


def memory() -> str:
    """What this process has in memory now, and on the GPU if it uses one."""
    text = f"{psutil.Process().memory_info().rss / 1e9:.2f} GB"
    import torch

    if torch.cuda.is_initialized():
        text += f" + {torch.cuda.max_memory_reserved() / 1e9:.2f} GB GPU"
    return text


class Drawn(Progress):
    """Progress on standard error; ``quiet`` leaves out everything but warnings."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = stderr()
        self._quiet = quiet
        self._bar: Bar | None = None
        self._started = self._printed = 0.0

    def note(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self._console.print(f"[yellow]warning:[/] {escape(text)}")

    def begin(self, title: str, total: int) -> None:
        self._started = self._printed = time.perf_counter()
        if self._quiet or not self._console.is_terminal:
            return
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._bar.start()
        self._bar.add_task(title, total=total, detail="")

    def step(self, step: Step) -> None:
        if self._quiet:
            return
        loss = "" if step.loss is None else f"error {step.loss:.5f}  "
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                completed=step.index,
                detail=f"{step.name}  {loss}{memory()}",
            )
            return
        now = time.perf_counter()
        small = step.loss is None and step.index < step.total
        if small and now - self._printed < _PLAIN_SECONDS:
            return
        self._printed = now
        elapsed = now - self._started
        left = elapsed / step.index * (step.total - step.index)
        self._console.print(
            f"[dim]{step.index}/{step.total}[/] {step.name}  {loss}{step.seconds:.1f} s, "
            f"{left:.0f} s left, {memory()}"
        )

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
