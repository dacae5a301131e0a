"""How many tokens may have their keys and values in memory."""

from typing import Any

import psutil
import torch

from quantkit.errors import UsageError
from quantkit.runtime.batch import bytes_per_token

_SHARE = {"cpu": 0.5, "cuda": 0.8}  # of the memory that the models left free


def tokens(model: Any, most: int, asked: int | None, models: int = 1) -> int:
    """Tokens that there is room for, ``most`` at most: as many as were ``asked`` for, or what fits
    into this model's part of the free memory, which ``models`` share."""
    if asked is not None:
        return min(asked, most)
    share = _SHARE[model.device.type] / models
    return min(int(free(model.device) * share) // bytes_per_token(model), most)


def refuse_more_than_fits(model: Any, tokens: int) -> None:
    """Raises UsageError when there is no memory for so many tokens."""
    needed, here = tokens * bytes_per_token(model), free(model.device)
    if needed > here:
        raise UsageError(
            f"keys and values of {tokens:,} tokens take {needed / 1e9:.1f} GB, and "
            f"{here / 1e9:.1f} GB are free",
            "choose a smaller --kv-tokens, --context or --max-batch",
        )


def free(device: torch.device) -> int:
    """Bytes that nothing uses."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading has left behind
        found, _ = torch.cuda.mem_get_info(device)
        return found
    available: int = psutil.virtual_memory().available
    return available
