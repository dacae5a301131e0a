"""What GPUs can do, as one table.

    memory     GiB that a program can use, as nvidia-smi shows them (ECC and drivers take the rest)
    half       TFLOP/s of dense float16 products with float32 sums, on tensor cores
    single     TFLOP/s of float32, outside of them (torch multiplies float32 there by default)
    bandwidth  GB/s of memory
    capability of CUDA; bfloat16 from 8.0 on

All from NVIDIA's own sheets: T4 (datasheet, 2019), L4 (datasheet, 2023), Ampere GA102 whitepaper
(GA106 scaled by its 112 tensor cores at 1.78 GHz), Ada whitepaper v2.0 appendix A, A100 datasheet
(2021), H100 datasheet (SXM, without sparsity), H200 datasheet.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU; units as in the module's text. ``model``: the words of its name that tell it from
    others."""

    name: str
    model: str
    memory: float
    half: float
    single: float
    bandwidth: float
    capability: tuple[int, int]

    @property
    def bfloat16(self) -> bool:
        return self.capability >= (8, 0)

    @property
    def bytes(self) -> int:
        return int(self.memory * 2**30)


GPUS = {
    "t4": Gpu("Tesla T4", "T4", 15.0, 65, 8.1, 320, (7, 5)),
    "l4": Gpu("L4", "L4", 22.5, 121, 30.3, 300, (8, 9)),
    "rtx3060": Gpu("GeForce RTX 3060", "3060", 12.0, 25.5, 12.7, 360, (8, 6)),
    "rtx4090": Gpu("GeForce RTX 4090", "4090", 24.0, 165.2, 82.6, 1008, (8, 9)),
    "a100": Gpu("A100 40GB", "A100 40GB", 40.0, 312, 19.5, 1555, (8, 0)),
    "h100": Gpu("H100 80GB", "H100", 79.6, 989, 67, 3350, (9, 0)),
    "h200": Gpu("H200", "H200", 139.8, 989, 67, 4800, (9, 0)),
}


def known(name: str) -> Gpu | None:
    """The entry of a GPU as drivers call it: ``Tesla T4``, ``NVIDIA A100-SXM4-40GB``."""
    words = name.replace("-", " ").split()
    return next((gpu for gpu in GPUS.values() if set(gpu.model.split()) <= set(words)), None)
