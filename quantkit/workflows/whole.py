"""What needs a whole model in memory, one at a time: continuations of prompts, for the most part.

Everything else that is measured has a block of each model in memory, so this is what a machine may
be too small for.
"""

from typing import Any

import psutil
import torch

from quantkit.runtime.load import put_together
from quantkit.runtime.opened import Opened
from quantkit.runtime.skeleton import Skeleton
from quantkit.workflows import divergence

_SPARE = 1.2  # a model computes in more than its weights


def continued(
    called: str, opened: Opened, size: int, tokenizer: Any, skeleton: Skeleton
) -> list[list[int]] | str:
    """The greedy continuations of divergence.PROMPTS by a model of about ``size`` bytes that is
    ``called`` so, on the device and in the dtype of ``skeleton``; where it does not fit, the
    sentence that says it."""
    free = room(skeleton.device)
    if free < _SPARE * size:
        return (
            f"no continuations: {called} needs {_SPARE * size / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free"
        )
    model: Any = put_together(opened, skeleton.device, skeleton.dtype)
    return divergence.continued(divergence.greedy(model, tokenizer), tokenizer)


def room(device: torch.device) -> int:
    """Bytes that are free where ``device`` computes."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return int(psutil.virtual_memory().available)
