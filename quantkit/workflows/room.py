"""The memory that a run may use, and what it does when that turns out to be too little.

Then it is walked again from its first block in a smaller mode (core/footprint.py): blocks that are
finished are in the output and are only run, like those of an interrupted run. So nothing needs to
be undone, wherever the memory ended, and the numbers are the same. Only a smaller micro-batch
changes them, as far as the order of float32 sums does.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import psutil
import torch

from quantkit.core import footprint
from quantkit.core.calibration import Calibration
from quantkit.core.footprint import CUDA_CONTEXT, Place, Room
from quantkit.core.progress import Progress
from quantkit.core.sizes import size_in_bytes
from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime.ranks import ALONE, Ranks
from quantkit.workflows.plan import Plan
from quantkit.workflows.task import Report

T = TypeVar("T")
_NAMES = {"device": "GPU memory", "ram": "RAM"}
# What libraries say when memory is short, and torch has no exception of its own for it.
_COMPLAINTS = ("STATUS_ALLOC_FAILED", "CUDA error: out of memory", "can't allocate memory")
_IN_RAM = ("can't allocate memory", "of RAM")


def room(
    device: torch.device, max_gpu_memory: str | None, max_memory: str | None, ranks: Ranks = ALONE
) -> Room:
    """The limits of each process, or what it has and its part of what is free, where that is less.
    Raises UsageError for what is not a size, and for a limit of GPU memory on a CPU."""
    ram = psutil.virtual_memory().available // ranks.here() + psutil.Process().memory_info().rss
    if max_memory is not None:
        ram = min(ram, size_in_bytes(max_memory))
    limit = _gpu_limit(device, max_gpu_memory)
    if device.type != "cuda":
        return Room(None, ram)
    free = torch.cuda.mem_get_info(device)[0] + CUDA_CONTEXT
    return Room(free if limit is None else min(free, limit), ram)


@contextmanager
def limited(device: torch.device, max_gpu_memory: str | None) -> Iterator[None]:
    """While open, torch takes no more of the GPU than that."""
    limit = _gpu_limit(device, max_gpu_memory)
    if limit is None:
        yield
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    share = (limit - CUDA_CONTEXT) / torch.cuda.mem_get_info(index)[1]
    torch.cuda.empty_cache()  # what is held already counts
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def _gpu_limit(device: torch.device, max_gpu_memory: str | None) -> int | None:
    if max_gpu_memory is None:
        return None
    limit = size_in_bytes(max_gpu_memory)
    if device.type != "cuda":
        raise UsageError(
            "--max-gpu-memory is for a GPU, and this runs on the CPU",
            "use --max-memory to limit RAM",
        )
    if limit <= CUDA_CONTEXT:
        raise UsageError(
            f"CUDA alone takes {CUDA_CONTEXT / 1e9:.1f} GB of GPU memory",
            "raise --max-gpu-memory, or use --device cpu",
        )
    return limit


def placed(plan: Plan, room: Room, rows: Calibration, tokens: int | None, ranks: Ranks) -> Plan:
    """The plan in the fastest mode in which all ranks have room: one that runs as many ``tokens``
    at once as the first rank says, if there is one."""
    tokens = ranks.share(tokens)
    found = ranks.everyone(plan.within(room, rows, tokens).way)
    known = footprint.modes(plan.cuda, plan.method.aligned)
    return replace(plan, mode=max(found, key=known.index))


def too_little(plan: Plan, room: Room, rows: Calibration) -> str | None:
    """What there is too little of, as far as it can be told before the first block, in words."""
    phases = plan.memory(rows)
    limits: tuple[tuple[Place, int | None], ...] = (("device", room.device), ("ram", room.ram))
    for place, limit in limits:
        most = footprint.peak(phases, place).bytes(place)
        if limit is not None and most > limit:
            return (
                f"this takes about {most / 1e9:.1f} GB of {_NAMES[place]}, and {limit / 1e9:.1f} "
                "GB are free or allowed: fewer or shorter rows take less (--calib-rows)"
            )
    return None


def backing_off(report: Report, progress: Progress, work: Callable[[Plan], T]) -> T:
    """``work`` with the report's plan; when memory is short, again with the plan of the next mode
    that takes less of what was short. Every such step is told and goes into the report. Raises
    QuantkitError when there is no smaller mode, and on several ranks, where others are waiting for
    this one."""
    before = len(report.fallbacks)
    while True:
        plan = report.plan
        try:
            return work(plan)
        except (RuntimeError, MemoryError) as error:
            place = lacking(error, plan.cuda)
            if place is None:
                raise
        # only here: the error holds on to all that was in memory when it was raised
        progress.end()
        _let_go(plan.cuda)
        if plan.ranks > 1:
            raise QuantkitError(
                f"{_NAMES[place]} ran out on one of {plan.ranks} processes, with {plan.way}",
                "run the same command again with less --max-gpu-memory or --max-memory, to go on "
                "in a smaller mode",
            )
        smaller = plan.smaller(report.calibration, place)
        if smaller is None:
            raise QuantkitError(
                f"there is not enough {_NAMES[place]} to go on, even with {plan.way}",
                "use fewer or shorter rows (--calib-rows, --calib-seqlen) or --fast; "
                "'quantkit plan' says what fits",
            )
        text = f"{_NAMES[place]} ran out with {plan.way}: going on with {smaller.way}"
        progress.warn(text)
        del report.fallbacks[before:]  # blocks are walked again, and tell theirs again
        report.backoffs.append(text)
        report.plan = smaller


def lacking(error: BaseException, cuda: bool) -> Place | None:
    """Which memory was short; None when the error is about something else."""
    text = str(error)
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(
        complaint in text for complaint in _COMPLAINTS
    ):
        return None
    in_ram = isinstance(error, MemoryError) or any(part in text for part in _IN_RAM)
    return "ram" if in_ram or not cuda else "device"


def _let_go(cuda: bool) -> None:
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
