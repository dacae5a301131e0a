"""y = x W^T with a weight of 4 bits on Hopper's own instructions (hopper.cu).

Triton does not say which warp copies and which computes, and lets nothing run while a product does.
Here a warp fills a ring with weights, before the kernel in front has ended already, and tensor
cores multiply one batch while the next one is unpacked. The text is compiled by NVRTC, a part of
CUDA that comes with torch, at the first use of each kind; what comes out is kept (core/cache.py).

Weights are those of ``fragments``, blocked.
"""

import ctypes
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache as once
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.core import cache
from quantkit.core.qweight import Scheme
from quantkit.runtime.kernels import fragments, support
from quantkit.runtime.kernels.fragments import Fragments, container
from quantkit.runtime.kernels.support import GPU

KIND = "cubin"
CAPABILITY = (9, 0)
INPUTS = fragments.STEP  # of a stage
_TILE_ROWS = 32
_BLOCK_ROWS = _TILE_ROWS * fragments.BLOCK
_SHARED, _OWN = 228 << 10, 2 << 10  # bytes of a processor; of a program for itself and its barriers
_SCALES = {torch.float16: 2, torch.bfloat16: 3, torch.float32: 4}  # what hopper.cu calls them


@dataclass(frozen=True)
class Shape:
    """How a product with up to so many ``tokens`` at a time is computed; see hopper.cu.

    few         by warps, or else by warpgroups
    stages      of the ring of codes and inputs, at most
    resident    programs that a processor has room for
    exact       sums are scaled, not weights, which would be rounded
    """

    tokens: int
    few: bool
    stages: int
    resident: int
    exact: bool

    @property
    def rows(self) -> int:
        return 128 if self.few else 256 // self.resident

    @property
    def threads(self) -> int:
        return 2 * self.rows + (32 if self.few else 128)

    def sent(self, cluster: int) -> int:
        """Bytes of the sums that a program gets from the others of a cluster of so many."""
        return -(-self.rows // 16 // cluster) * (cluster - 1) * 64 * self.tokens

    def beside(self, cluster: int) -> int:
        """Bytes beside the ring: for these sums, or, where they come into the ring, for warps that
        turn their results round."""
        return self.sent(cluster) if self.few else self.rows // 16 * 768

    @property
    def most_beside(self) -> int:
        """In any cluster."""
        return max(map(self.beside, SIZES))

    def ring(self, step: int, scale: int, zeros: bool) -> tuple[int, int]:
        """Stages of the ring and bytes of one; the arguments are those of :func:`source`."""
        scales = 32 * (INPUTS // step) * ((4 if scale == 4 else 2) + (2 if zeros else 0))
        tile = _TILE_ROWS * INPUTS // 2 + scales
        stage = self.tokens * INPUTS * 2 + self.rows // _TILE_ROWS * tile
        room = _SHARED // self.resident - _OWN - self.most_beside
        return min(self.stages, room // stage), stage


SHAPES = (
    Shape(8, True, 5, 3, True),
    Shape(16, True, 5, 3, True),
    Shape(32, False, 4, 2, True),
    Shape(64, False, 4, 2, True),
    Shape(96, False, 3, 1, False),
    Shape(128, False, 3, 1, False),
)
SIZES = (1, 2, 3, 4, 5, 6, 8)  # programs of a cluster; the sums of seven do not fit three times
_AROUND = 8  # steps that a program could multiply while it begins and ends
_SECOND = 0.95  # of the time that a product may take with a second launch, at most


def why_not(gpu: GPU) -> str | None:
    """Why these kernels do not run on this GPU, or None."""
    if gpu.capability != CAPABILITY:
        return "it is not a GPU of the Hopper generation"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "cuda-bindings is not installed (pip install cuda-bindings)"
    return None


def fits(scheme: Scheme, out: int, width: int, minimum: bool) -> bool:
    """Whether the kernels take a weight [out, width] of this scheme; ``minimum``: its groups have
    minimums, not zero points."""
    group = scheme.width(width)
    return (
        support.scheme_why_not(scheme, width) is None
        and container(scheme) == 4
        and not minimum
        and width % INPUTS == 0
        and out % 8 == 0
        and (group % INPUTS == 0 or group in (32, 64))
    )


def shape_of(tokens: int) -> Shape:
    """That of which the fewest programs, side by side, take so many tokens; and the smallest."""
    return min(SHAPES, key=lambda shape: (-(-tokens // shape.tokens), shape.tokens))


def product(x: Tensor, weight: Fragments, bias: Tensor | None) -> Tensor:
    """x [tokens, in] in float16 or bfloat16 -> [tokens, out] in the same."""
    if x.data_ptr() % 16 or not x.is_contiguous():  # the copy engine wants it so
        x = x.clone(memory_format=torch.contiguous_format)
    if bias is not None:
        bias = bias.to(x.dtype)
    return matmul(x, weight, bias, shape_of(len(x)))


def matmul(
    x: Tensor, weight: Fragments, bias: Tensor | None, shape: Shape, size: int = 0
) -> Tensor:
    """x [tokens, in] in float16 or bfloat16, contiguous -> [tokens, out] in the same. ``bias``
    [out] in the same dtype; ``size``: programs of a cluster, 0 for what :func:`divided` says.

    The kernel begins before the one in front of it has ended, and reads weights at once: they must
    have been there before that one was launched.
    """
    kernel = _kernel(
        shape,
        x.dtype == torch.bfloat16,
        min(weight.group, INPUTS),
        _SCALES[weight.scale.dtype],
        weight.offset is not None,
        weight.scheme.midpoint,
        x.get_device(),
    )
    across, steps = -(-len(x) // shape.tokens), weight.width // INPUTS
    clusters = -(-len(weight.words) * _BLOCK_ROWS // shape.rows) * across
    out = torch.empty(len(x), weight.out, dtype=x.dtype, device=x.device)
    places = _map(x, shape.tokens)
    first = 0
    for count, programs in [(clusters, size)] if size else kernel.divided(clusters, steps):
        kernel.launch(
            count,
            programs,
            torch.cuda.current_stream(x.device).cuda_stream,
            places,
            weight.words.data_ptr(),
            weight.scale.data_ptr(),
            0 if weight.offset is None else weight.offset.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            first,
            len(x),
            weight.out,
            len(weight.words),
            across,
            steps,
            max(1, weight.group // INPUTS),
        )
        first += count
    return out


Launch = tuple[int, int]  # clusters, and programs of each


def divided(clusters: int, steps: int, at_once: Callable[[int], int]) -> list[Launch]:
    """The launches with which ``clusters`` are done the soonest, where ``at_once(size)`` of them
    run at the same time (0: none can): all alike, or as many turns as are full, and smaller shares
    of the work for the rest, if that is worth a second launch."""
    sizes = [size for size in SIZES if size <= steps and at_once(size)]

    def last(count: int, size: int) -> float:
        return -(-count // at_once(size)) * (-(-steps // size) + _AROUND)

    alike = min(sizes, key=lambda size: last(clusters, size))
    best, found = last(clusters, alike) * _SECOND, [(clusters, alike)]
    for few, many in combinations(sizes, 2):
        full = clusters // at_once(few) * at_once(few)
        parts = [(full, few), (clusters - full, many)]
        took = sum(last(*part) for part in parts)
        if full and took < best:
            best, found = took, parts
    return found


class _Kernel:
    """A compiled kernel on a device."""

    _KINDS = (ctypes.c_void_p,) * 5 + (ctypes.c_int,) * 7

    def __init__(self, cubin: bytes, shape: Shape, ring: int, device: int) -> None:
        from cuda.bindings import driver

        self._driver, self._shape, self._ring = driver, shape, ring
        none: list[Any] = []
        self._library = _checked(driver.cuLibraryLoadData(cubin, none, none, 0, none, none, 0))
        kernel = _checked(driver.cuLibraryGetKernel(self._library, b"product"))
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        on = _checked(driver.cuDeviceGet(device))
        _checked(driver.cuKernelSetAttribute(most, ring + shape.most_beside, kernel, on))
        self._function = driver.CUfunction(int(kernel))
        early = driver.CUlaunchAttribute()
        kinds = driver.CUlaunchAttributeID
        early.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        self._early = early
        self._divided: dict[tuple[int, int], list[Launch]] = {}
        self._configs: dict[tuple[int, int, int], Any] = {}

    def divided(self, clusters: int, steps: int) -> list[Launch]:
        """What :func:`divided` says on this device."""
        key = clusters, steps
        if key not in self._divided:
            room = {size: self._at_once(size) for size in SIZES}
            self._divided[key] = divided(clusters, steps, room.__getitem__)
        return self._divided[key]

    def _at_once(self, size: int) -> int:
        """Clusters of so many programs that the device runs at the same time."""
        config = self._configured(max(SIZES), size, 0)
        found: int = _checked(self._driver.cuOccupancyMaxActiveClusters(self._function, config))
        return found

    def _configured(self, clusters: int, size: int, stream: int) -> Any:
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = clusters * size, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self._shape.threads, 1, 1
        config.sharedMemBytes = self._ring + self._shape.beside(size)
        config.hStream = driver.CUstream(stream)
        together = driver.CUlaunchAttribute()
        together.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dim = together.value.clusterDim
        dim.x, dim.y, dim.z = size, 1, 1
        config.attrs, config.numAttrs = [together, self._early], 2
        return config

    def launch(self, clusters: int, size: int, stream: int, x: Any, *numbers: int) -> None:
        key = clusters, size, stream
        if key not in self._configs:
            self._configs[key] = self._configured(*key)
        held = [kind(number) for kind, number in zip(self._KINDS, numbers, strict=True)]
        places = (ctypes.c_void_p * (1 + len(held)))(x.getPtr(), *map(ctypes.addressof, held))
        _checked(
            self._driver.cuLaunchKernelEx(
                self._configs[key], self._function, ctypes.addressof(places), 0
            )
        )


@once
def _kernel(
    shape: Shape, bfloat: bool, step: int, scale: int, zeros: bool, middle: int, device: int
) -> _Kernel:
    stages, stage = shape.ring(step, scale, zeros)
    shape = replace(shape, stages=stages)
    text = source(shape, bfloat, step, scale, zeros, middle)
    return _Kernel(_compiled(text), shape, stages * stage, device)


def source(shape: Shape, bfloat: bool, step: int, scale: int, zeros: bool, middle: int) -> str:
    """The text of a kernel; what the names mean, hopper.cu says."""
    defined = {
        "N": shape.tokens,
        "FEW": int(shape.few),
        "STAGES": shape.stages,
        "RESIDENT": shape.resident,
        "STEP": step,
        "EXACT": int(shape.exact),
        "BFLOAT": int(bfloat),
        "SCALE": scale,
        "ZEROS": int(zeros),
        "MIDDLE": f"{middle}.0f",
    }
    if not shape.few:
        defined["WGMMA(d, a, b, keep)"] = _wgmma(shape.tokens, "bf16" if bfloat else "f16")
    lines = [f"#define {name} {value}\n" for name, value in defined.items()]
    return "".join(lines) + Path(__file__).with_suffix(".cu").read_text("utf-8")


def _wgmma(tokens: int, kind: str) -> str:
    """PTX: sums d of 64 outputs x ``tokens``, plus a (in registers) times b (in shared memory)."""
    count = tokens // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    left = ", ".join(f"%{count + i}" for i in range(4))
    instruction = f"wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{kind}.{kind}"
    lines = [
        "{",
        ".reg .pred kept;",
        f"setp.ne.b32 kept, %{count + 5}, 0;",
        f"{instruction} {{{sums}}}, {{{left}}}, %{count + 4}, kept, 1, 1, 0;",
        "}",
    ]
    changed = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    read = ", ".join(f'"r"(a[{i}])' for i in range(4))
    text = "\\n".join(lines)
    return f'asm volatile("{text}" : {changed} : {read}, "l"(b), "r"((int)(keep)))'


def _compiled(text: str) -> bytes:
    """The machine code, from the cache or by NVRTC."""
    from cuda.bindings import nvrtc

    version = ".".join(map(str, _checked(nvrtc.nvrtcVersion())))
    name = hashlib.sha256(f"{version}\n{text}".encode()).hexdigest()
    kept = cache.read(KIND, name)
    if kept is not None:
        return kept
    none: list[bytes] = []
    program = _checked(nvrtc.nvrtcCreateProgram(text.encode(), b"hopper.cu", 0, none, none))
    options = [b"--gpu-architecture=sm_90a"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(status):
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"hopper.cu does not compile: {log.decode(errors='replace')}")
    cubin: bytes = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    cache.write(KIND, name, cubin)
    return cubin


def _map(x: Tensor, tokens: int) -> Any:
    """How the copy engine finds 128 inputs of ``tokens`` tokens in x, in two halves; what lies
    behind its end is read as 0."""
    from cuda.bindings import driver

    kind = driver.CUtensorMapDataType
    rows, width = x.shape
    long, short = driver.cuuint64_t, driver.cuuint32_t
    half = x.dtype == torch.float16
    return _checked(
        driver.cuTensorMapEncodeTiled(
            kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if half else kind.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            3,
            x.data_ptr(),
            [long(64), long(rows), long(width // 64)],
            [long(width * x.element_size()), long(64 * x.element_size())],
            [short(64), short(tokens), short(2)],
            [short(1), short(1), short(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def _checked(answer: tuple[Any, ...]) -> Any:
    """What a call of CUDA returned behind its status. Raises RuntimeError."""
    status, *found = answer
    if int(status):
        raise RuntimeError(f"CUDA says {getattr(status, 'name', status)}")
    return found[0] if len(found) == 1 else tuple(found)
