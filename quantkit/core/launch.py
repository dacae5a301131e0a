"""Triton launches kernels on the current device, wherever their tensors are."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def on_its_device(
    launching: Callable[Concatenate[Tensor, P], T],
) -> Callable[Concatenate[Tensor, P], T]:
    """While the function runs, the device of its first argument is the current one."""

    @wraps(launching)
    def there(tensor: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with torch.cuda.device_of(tensor):
            return launching(tensor, *args, **kwargs)

    return there
