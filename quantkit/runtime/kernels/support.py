"""Which weights the GPU kernels can take, and why not others; imports no kernel."""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

from quantkit.core.qweight import Scheme
from quantkit.runtime.kernels.fragments import INPUTS

NO_GPU = "no GPU is used"
LEAST = (8, 0)  # compute capability: Ampere, whose tensor cores the kernels are written for


@dataclass(frozen=True)
class GPU:
    """What a choice of kernels depends on."""

    name: str
    processors: int
    capability: tuple[int, int]


@cache
def gpu(index: int) -> GPU:
    found = torch.cuda.get_device_properties(index)
    return GPU(found.name, found.multi_processor_count, (found.major, found.minor))


def of(device: torch.device) -> GPU:
    """The GPU that ``device`` names."""
    return gpu(torch.cuda.current_device() if device.index is None else device.index)


def early(device: torch.device) -> bool:
    """Whether a kernel on this device may be launched while the one before it still runs, and wait
    for it itself (programmatic dependent launch: Hopper and later)."""
    return device.type == "cuda" and of(device).capability >= (9, 0)


def gpu_why_not(found: GPU) -> str | None:
    """Why the kernels do not run on this GPU, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if found.capability < LEAST:
        return f"quantkit's kernels need compute capability {LEAST[0]}.{LEAST[1]} (Ampere) or later"
    return None


def device_why_not(device: torch.device) -> str | None:
    """Why the kernels do not run on this device, or None."""
    return NO_GPU if device.type != "cuda" else gpu_why_not(of(device))


def scheme_why_not(scheme: Scheme, width: int) -> str | None:
    """Why the kernels do not compute with a weight of ``width`` inputs, or None."""
    if scheme.grid != "int":
        return f"they compute with evenly spaced levels, not {scheme.grid}"
    if scheme.width(width) % INPUTS:
        return f"groups of {scheme.width(width)} inputs are not multiples of {INPUTS}"
    return None


def why_not(width: int, scheme: Scheme, device: torch.device) -> str | None:
    """Why no kernel computes with such a weight on this device, or None."""
    return scheme_why_not(scheme, width) or gpu_why_not(of(device))
