"""Kernels in Triton: where they run. They are launched on the current device, wherever their
tensors are.

The first launch on a machine compiles, which takes seconds for some. Other threads go on meanwhile,
so that it can be done ahead: what is launched while :func:`compiling` is only compiled.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
_threads = threading.local()
Kind = tuple[Any, ...]  # a kernel and its options
_compiling: dict[Kind, threading.Lock] = {}  # those that are being compiled ahead


def tensor_cores(tensor: Tensor) -> bool:
    """Whether it is on a GPU that multiplies bfloat16 and TF32, as those from Ampere on do. Older
    ones (a T4) compute in float32, by torch's own kernels."""
    return tensor.is_cuda and _capability(tensor.get_device()) >= (8, 0)


def compiles(tensor: Tensor) -> bool:
    """Whether kernels run where it is: on a GPU from Ampere on, if Triton is installed."""
    return tensor_cores(tensor) and _installed()


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def on_its_device(
    launching: Callable[Concatenate[Tensor, P], T],
) -> Callable[Concatenate[Tensor, P], T]:
    """While the function runs, the device of its first argument is the current one."""

    @wraps(launching)
    def there(tensor: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with torch.cuda.device_of(tensor):
            return launching(tensor, *args, **kwargs)

    return there


def launch(kernel: Any, programs: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run so many programs of a kernel; when it is compiled, if that was begun."""
    if getattr(_threads, "only_compiles", False):
        kind = _kind(kernel, options)
        try:
            with _compiling.setdefault(kind, threading.Lock()):
                kernel.warmup(*arguments, grid=programs, **options)
        finally:
            _compiling.pop(kind, None)
        return
    if _compiling and (begun := _compiling.get(_kind(kernel, options))):
        with begun:
            pass
    kernel[programs](*arguments, **options)


def _kind(kernel: Any, options: dict[str, Any]) -> Kind:
    return id(kernel), *options.items()


@contextmanager
def compiling() -> Iterator[None]:
    """While open, this thread's launches compile, and do nothing else."""
    _threads.only_compiles = True
    try:
        yield
    finally:
        _threads.only_compiles = False
