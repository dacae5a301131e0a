"""``quantkit plan``: what quantizing, measuring and running a model will take, and whether it fits.

Only the configuration and the headers of weight files are read. Where something does not fit,
changes are tried in turn, and those that help are told.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantkit.core.headers import look
from quantkit.core.machines import GPUS
from quantkit.errors import UsageError
from quantkit.workflows.machine import Machine, machine
from quantkit.workflows.needs import Need, Needs, Subject, Wish

TASKS = ("quantize", "verify", "generate", "serve")
_RUNNING = TASKS[2:]


@dataclass(frozen=True)
class Forecast:
    """``original`` and ``result``: bytes of the files before and after; ``bits_per_weight`` of the
    weights that will be quantized, None where none are; ``exact``: see footprint.Shapes;
    ``notes``: where it is not for what was asked for."""

    name: str
    machine: Machine
    parameters: int
    original: int
    result: int
    bits_per_weight: float | None
    exact: bool
    needs: list[Need]
    notes: list[str]

    @property
    def fits(self) -> bool:
        return all(need.fits for need in self.needs)

    def described(self) -> dict[str, Any]:
        """For JSON, in bytes and seconds."""
        on = self.machine
        return {
            "model": self.name,
            "parameters": self.parameters,
            "original_bytes": self.original,
            "result_bytes": self.result,
            "bits_per_weight": self.bits_per_weight,
            "exact": self.exact,
            "machine": {"name": on.name, "device": on.device, "ram": on.ram, "disk": on.disk},
            "fits": self.fits,
            "notes": self.notes,
            "tasks": [need.described() for need in self.needs],
        }


def forecast(
    model: str,
    *,
    tasks: Sequence[str] = (),
    gpu: str = "auto",
    ram: str | None = None,
    revision: str | None = None,
    **wishes: Any,
) -> Forecast:
    """Plan ``tasks`` (of quantize, verify, generate and serve; by default all that apply) for
    ``model`` on the machine that ``gpu`` and ``ram`` name (see machine.py). ``wishes`` are fields
    of :class:`Wish`. A model that is quantized already is run as it is, as with ``method="none"``.

    Raises UsageError for options that make no sense, QuantkitError for a model that cannot be
    planned with. No weights are read, and none come here from the Hub.
    """
    wish = Wish(**wishes)
    for task in tasks:
        if task not in TASKS:
            raise UsageError(f"there is no task '{task}'", f"use {', '.join(TASKS)}")
    on = machine(gpu, ram)
    subject = Subject(*look(model, revision))
    if subject.quantized:
        wish = replace(wish, method="none")
    possible = _RUNNING if wish.method == "none" else TASKS
    for task in tasks:
        if task not in possible:
            why = "quantized already" if subject.quantized else "not to be quantized"
            raise UsageError(
                f"{subject.source.name} is {why}, so that there is nothing to {task}",
                f"plan with --for {' or --for '.join(possible)}",
            )
    needs = Needs(subject, wish, on)
    found = [needs.of(task) for task in possible if not tasks or task in tasks]
    notes = [note for need in found for note in needs.notes(need.task)]
    return Forecast(
        subject.source.name,
        on,
        needs.shapes.numbers,
        subject.tensors.nbytes,
        needs.result,
        needs.bits_per_weight,
        needs.shapes.exact,
        [n if n.fits else replace(n, changes=tuple(_changes(needs, n, ram))) for n in found],
        list(dict.fromkeys(_left_out(subject, tasks) + notes)),
    )


def _left_out(subject: Subject, tasks: Sequence[str]) -> list[str]:
    """Why there are fewer tasks than usual, where nobody has said which."""
    if tasks or not subject.quantized:
        return []
    return [f"{subject.source.name} is quantized already: it is planned as it is run"]


# What is tried where a task does not fit, what costs least first; the first that helps is told.
_ROWS: tuple[dict[str, Any], ...] = (
    {"calib_rows": 64},
    {"calib_rows": 32},
    {"calib_rows": 32, "calib_seqlen": 512},
)
_SHORTER = tuple({"context": tokens} for tokens in (8192, 4096, 2048, 1024, 512))
_FEWER = tuple({"sequences": count} for count in (4, 2, 1))
_SMALLER = ({"bits": 3}, {"bits": 2})
_CHANGES: dict[str, tuple[dict[str, Any], ...]] = {
    "quantize": ({"fast": True}, *_ROWS, *({"fast": True, **r} for r in _ROWS), {"method": "rtn"}),
    "verify": ({"rows": 4}, *_SMALLER),
    "generate": (*_SHORTER, *_SMALLER),
    "serve": (*_FEWER, *_SHORTER, *_SMALLER, *({"sequences": 1, **s} for s in _SHORTER)),
}


def _changes(needs: Needs, need: Need, ram: str | None) -> Iterator[str]:
    """Options with which the task would fit: the first change that helps, and the smallest GPU."""
    for change in _CHANGES[need.task]:
        if _lessens(needs, change):
            other = Needs(needs.subject, replace(needs.wish, **change), needs.machine)
            if other.of(need.task).fits:
                yield " ".join(_option(name, value) for name, value in change.items())
                break
    if need.lacking != ("GPU memory",) and needs.machine.cuda:
        return
    for name in sorted(GPUS, key=lambda name: GPUS[name].memory):
        if Needs(needs.subject, needs.wish, machine(name, ram)).of(need.task).fits:
            yield f"--gpu {name}"
            break


def _lessens(needs: Needs, change: dict[str, Any]) -> bool:
    """Whether the change asks for less than what is wished."""
    if "bits" in change and not needs.quantizes:
        return False
    wished = {name: getattr(needs.wish, name) for name in change}
    return change != wished and all(
        value < wished[name] for name, value in change.items() if name not in ("fast", "method")
    )


def _option(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag} {value}"
