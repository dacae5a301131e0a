"""How fast this machine is, measured in a tenth of a second."""

import time
from collections.abc import Callable

import torch

from quantkit.core import durations, machines
from quantkit.core.durations import Speed
from quantkit.core.machines import Gpu
from quantkit.runtime.kernels import support

_SIDE, _REPEATS = 384, 24  # a millisecond each: some of them are not disturbed
_GPU_SIDE = 8192
_SHARE = 0.6  # of these speeds that a run reaches: its matrices do not stay in the caches
_COLUMN = 2e-5  # seconds of Python and torch in one step of a column loop


def of_cpu(dtype: torch.dtype) -> Speed:
    """Of this CPU, when models run in ``dtype``, with as many threads as torch uses now."""
    half, single = (_SHARE * _products(kind) for kind in (dtype, torch.float32))
    return durations.of_cpu(half, single, _copied(1 << 24), _copied(1 << 19), _COLUMN)


def here() -> tuple[Gpu, int] | None:
    """The GPU of this machine and the bytes that are free on it; None where there is none. One that
    is not in the table has its name and memory only, and speeds of 0."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    capability = (properties.major, properties.minor)
    found = machines.known(properties.name)
    return found or Gpu(properties.name, properties.name, total / 2**30, 0, 0, 0, capability), free


def of_gpu(gpu: Gpu) -> Speed | None:
    """Of a GPU, as far as its figures are known."""
    if not gpu.half:
        return None
    kernels = gpu.capability >= support.LEAST
    return durations.of_gpu(gpu.half, gpu.single, gpu.bandwidth, kernels)


def products(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second in square products, of a size that suits the device."""
    if device.type != "cuda":
        return _products(dtype)
    a = torch.randn(_GPU_SIDE, _GPU_SIDE, device=device).to(dtype)  # equal numbers take less power

    def work() -> None:
        torch.mm(a, a)
        torch.cuda.synchronize(device)

    return 2 * _GPU_SIDE**3 / _fastest(work)


def _products(dtype: torch.dtype) -> float:
    """Floating-point operations a second in square products on a CPU."""
    a = torch.ones(_SIDE, _SIDE, dtype=dtype)
    return 2 * _SIDE**3 / _fastest(lambda: a @ a)


def _copied(size: int) -> float:
    """Bytes a second, read or written, when ``size`` bytes are copied."""
    source = torch.ones(size, dtype=torch.uint8)
    into = torch.empty_like(source)
    return 2 * size / _fastest(lambda: into.copy_(source))


def _fastest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
