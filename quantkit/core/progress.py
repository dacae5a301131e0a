"""What a long job tells whoever watches it. The base class is silent; the command line has one
that draws."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One finished part of a job.

    index, total  the part's place, from 1
    name          what it was, such as ``model.layers.3``
    loss          relative error of what was done, or None when it was only replayed
    seconds       how long this part took
    """

    index: int
    total: int
    name: str
    loss: float | None
    seconds: float


class Progress:
    """Receives what happens; does nothing with it."""

    def note(self, text: str) -> None:
        """One line of information."""

    def warn(self, text: str) -> None:
        """One line that the user should not miss."""

    def begin(self, title: str, total: int) -> None:
        """A job of ``total`` steps starts."""

    def step(self, step: Step) -> None:
        """One of them is done."""

    def end(self) -> None:
        """The job is done, or was given up."""
