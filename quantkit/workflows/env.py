"""``quantkit env``: what is installed here, what computes with a quantized weight and what makes
text, and why not something faster."""

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

from quantkit import __version__
from quantkit.core import cache
from quantkit.core.qweight import Scheme
from quantkit.runtime import token_loop
from quantkit.runtime.device import fast_bf16_on_cpu, pick_device, pick_dtype
from quantkit.runtime.kernels import cpu_int4, hopper, support

PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "cuda-bindings",
    "safetensors",
    "huggingface_hub",
    "gguf",
    "llama-cpp-python",
    "numba",
    "bitsandbytes",
    "vllm",
)
SCHEMES = (
    Scheme(2),
    Scheme(3),
    Scheme(4),
    Scheme(4, symmetric=False),
    Scheme(8),
    Scheme(4, 64, grid="nf4"),
)
_OUT, _WIDTH = 4096, 4096  # of a linear as models have it
_SLOWEST = "multiplied out by torch"


@dataclass(frozen=True)
class Choice:
    """scheme    what is computed with, or "decoding": one token after another
    kernel    how, in a few words
    reason    why nothing faster is used, or None"""

    scheme: str
    kernel: str
    reason: str | None


@dataclass(frozen=True)
class Environment:
    """versions   of quantkit, Python and every package, None for those that are not installed
    device     what ``--device auto`` is, with its name, memory in bytes and the dtype of ``auto``
    kernels    by scheme
    decoding   how the next token is computed
    """

    versions: dict[str, str | None]
    device: dict[str, Any]
    kernels: list[Choice]
    decoding: Choice
    cache: str

    def described(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def environment(device: str = "auto") -> Environment:
    """What ``quantkit env`` shows. Raises UsageError for a device that is not here."""
    found = pick_device(device)
    return Environment(
        _versions(),
        _device(found),
        [_choice(s, found) for s in SCHEMES],
        _decoding(found),
        str(cache.root()),
    )


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "quantkit": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cuda": torch.version.cuda,
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _device(device: torch.device) -> dict[str, Any]:
    dtype = str(pick_dtype("auto", device)).removeprefix("torch.")
    if device.type == "cuda":
        gpu = support.of(device)
        capability = ".".join(map(str, gpu.capability))
        return {
            "device": str(device),
            "name": gpu.name,
            "compute capability": capability,
            "memory": torch.cuda.get_device_properties(device).total_memory,
            "dtype": dtype,
        }
    return {
        "device": "cpu",
        "name": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "dtype": dtype,
    }


def _choice(scheme: Scheme, device: torch.device) -> Choice:
    if device.type == "cuda":
        return Choice(str(scheme), *_on_gpu(scheme, device))
    reason = _cpu_why_not(scheme)
    fast = "torch's int4 kernel for few tokens"
    return Choice(str(scheme), fast if reason is None else _SLOWEST, reason)


def _on_gpu(scheme: Scheme, device: torch.device) -> tuple[str, str | None]:
    """What kernels.choose takes for an ordinary weight, and why nothing faster."""
    reason = support.why_not(_WIDTH, scheme, device)
    if reason is not None:
        return _SLOWEST, reason
    reason = hopper.why_not(support.of(device))
    if reason is None and not hopper.fits(scheme, _OUT, _WIDTH, False):
        reason = "the kernels for Hopper compute with up to four bits"
    way = "Triton" if reason else "CUDA, for Hopper"
    return f"codes straight to the tensor cores ({way})", reason


def _decoding(device: torch.device) -> Choice:
    """Of models that ``runtime.decode``, or on a CPU ``runtime.decode_cpu``, has nothing else
    against."""
    if device.type == "cpu":
        reason = token_loop.why_not()
        fast = "one compiled function a token, of models built like Llama (numba)"
        return Choice("decoding", fast if reason is None else "calls of torch", reason)
    reason = support.device_why_not(device)
    fast = "a captured step, replayed (CUDA graph)"
    return Choice("decoding", fast if reason is None else "a call for every token", reason)


def _cpu_why_not(scheme: Scheme) -> str | None:
    if scheme.bits != 4 or scheme.grid != "int":
        return "torch's int4 kernel takes 4 bits of evenly spaced levels"
    if not cpu_int4.fits(_OUT, _WIDTH, scheme.width(_WIDTH)):
        return "torch's int4 kernel has another layout on this processor"
    if not fast_bf16_on_cpu():
        return "its int4 kernel is slow without bfloat16 arithmetic (AVX512-BF16 or AMX)"
    return None
