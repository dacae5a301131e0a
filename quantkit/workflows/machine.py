"""The machine that is planned for: this one, or one with a GPU of the table."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from quantkit.core.durations import Speed
from quantkit.core.machines import GPUS
from quantkit.core.sizes import size_in_bytes
from quantkit.errors import UsageError
from quantkit.runtime import speed
from quantkit.runtime.device import pick_dtype

HERE = ("auto", "cpu")


@dataclass(frozen=True)
class Machine:
    """``device``: bytes that can be used on its GPU, None without one; ``ram`` and ``disk``: bytes,
    None where nobody said; ``speed``: None where it is not known."""

    name: str
    cuda: bool
    dtype: torch.dtype
    device: int | None
    ram: int | None
    disk: int | None
    speed: Speed | None


def machine(gpu: str, ram: str | None) -> Machine:
    """``gpu``: a name of the table; ``cpu``: this machine without its GPU; ``auto``: with it.
    ``ram``: how much memory it has, by default what is free here, and unknown for another machine.
    Raises UsageError for names and sizes that make no sense."""
    room = None if ram is None else size_in_bytes(ram)
    if gpu in GPUS:
        other = GPUS[gpu]
        dtype = torch.bfloat16 if other.bfloat16 else torch.float16
        return Machine(other.name, True, dtype, other.bytes, room, None, speed.of_gpu(other))
    if gpu not in HERE:
        raise UsageError(f"'{gpu}' is not a GPU that quantkit knows", f"use {_names()}")
    room = psutil.virtual_memory().available if room is None else room
    disk = shutil.disk_usage(Path.cwd()).free
    found = speed.here() if gpu == "auto" else None
    if found is None:
        dtype = pick_dtype("auto", torch.device("cpu"))
        return Machine("this CPU", False, dtype, None, room, disk, speed.of_cpu(dtype))
    own, free = found
    dtype = pick_dtype("auto", torch.device("cuda"))
    return Machine(own.name, True, dtype, free, room, disk, speed.of_gpu(own))


def _names() -> str:
    return f"{', '.join([*HERE, *list(GPUS)[:-1]])} or {list(GPUS)[-1]}"
