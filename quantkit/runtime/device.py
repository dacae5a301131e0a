"""Which device computes, and in which precision."""

import torch
from torch import Tensor

from quantkit.errors import UsageError

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is a GPU where there is one. Raises UsageError for a device that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"'{name}' is not a device", "use auto, cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"quantkit does not run on '{name}' yet", "use auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "this PyTorch sees no CUDA GPU", "use --device cpu, or install PyTorch with CUDA"
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the hardware multiplies it fast, else float16 on a GPU and float32
    on a CPU."""
    if name != "auto":
        if name not in _DTYPES:
            raise UsageError(f"'{name}' is not a dtype", "use auto, bfloat16, float16 or float32")
        return _DTYPES[name]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    return torch.bfloat16 if fast_bf16_on_cpu() else torch.float32


def fast_bf16_on_cpu() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, which is on the CPU, on its way to ``device``: the host does not wait for it."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
