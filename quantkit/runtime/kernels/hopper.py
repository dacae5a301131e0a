"""y = x W^T with a weight of 4 bits on Hopper's own instructions (hopper.cu).

Triton does not say which warp copies and which computes, and lets nothing run while a product does.
Here a warp fills a ring with weights, before the kernel in front has ended already, and tensor
cores multiply one batch while the next one is unpacked. The text is compiled by NVRTC, a part of
CUDA that comes with torch, at the first use of each kind; what comes out is kept (core/cache.py).

Weights are those of ``fragments``, blocked.
"""

import ctypes
import hashlib
from dataclasses import replace
from functools import cache as once
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.core import cache
from quantkit.core.qweight import Scheme
from quantkit.runtime.kernels import support
from quantkit.runtime.kernels.fragments import Fragments, container
from quantkit.runtime.kernels.hopper_ways import (
    INPUTS,
    LARGE,
    SIZES,
    Kind,
    Shape,
    Way,
    chosen,
    shapes_for,
)
from quantkit.runtime.kernels.support import GPU

KIND = "cubin"
CAPABILITY = (9, 0)
MOST = 2048  # tokens at a time: x of more would not stay in the L2 cache for all rows of the weight
_SCALES = {torch.float16: 2, torch.bfloat16: 3, torch.float32: 4}  # what hopper.cu calls them


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


def product(x: Tensor, weight: Fragments, bias: Tensor | None) -> Tensor:
    """x [tokens, in] in float16 or bfloat16 -> [tokens, out] in the same."""
    if x.data_ptr() % 16 or not x.is_contiguous():  # the copy engine wants it so
        x = x.clone(memory_format=torch.contiguous_format)
    if bias is not None:
        bias = bias.to(x.dtype)
    out = torch.empty(len(x), weight.out, dtype=x.dtype, device=x.device)
    kind, steps = _kind(x, weight), weight.width // INPUTS
    for piece in pieces(len(x)):
        own = x[piece]
        way = _way(kind, x.get_device(), len(own), len(weight.words), steps)
        matmul(own, weight, bias, way, out[piece])
    return out


def pieces(tokens: int) -> list[slice]:
    """As few of up to MOST tokens as can be, and nearly equal."""
    count = -(-tokens // MOST)
    return [slice(tokens * i // count, tokens * (i + 1) // count) for i in range(count)]


def matmul(x: Tensor, weight: Fragments, bias: Tensor | None, way: Way, out: Tensor) -> None:
    """Fill ``out`` [tokens, out] with what x [tokens, in] gives; both in float16 or bfloat16 and
    contiguous. ``bias`` [out] in the same dtype.

    The kernel begins before the one in front of it has ended, and reads weights at once: they must
    have been there before that one was launched.
    """
    kernel = _kernel(way.shape, _kind(x, weight), x.get_device())
    places = _map(x, way.shape.tokens)
    first = 0
    for clusters, size in way.launches:
        kernel.launch(
            clusters,
            size,
            torch.cuda.current_stream(x.device).cuda_stream,
            places,
            weight.words.data_ptr(),
            weight.scale.data_ptr(),
            0 if weight.offset is None else weight.offset.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            first,
            first + clusters,
            len(x),
            weight.out,
            -(-len(x) // way.shape.tokens),
            weight.width // INPUTS,
            max(1, weight.group // INPUTS),
        )
        first += clusters


def _kind(x: Tensor, weight: Fragments) -> Kind:
    return Kind(
        x.dtype == torch.bfloat16,
        min(weight.group, INPUTS),
        _SCALES[weight.scale.dtype],
        weight.offset is not None,
        weight.scheme.midpoint,
    )


@once
def _way(kind: Kind, device: int, tokens: int, blocks: int, steps: int) -> Way:
    def at_once(shape: Shape, size: int) -> int:
        # those that fill a processor are alike in this
        shape = LARGE[-1] if shape in LARGE else shape
        return _kernel(shape, kind, device).at_once(size)

    return chosen(shapes_for(tokens, kind), tokens, blocks, steps, at_once)


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
        self._configs: dict[tuple[int, int, int], Any] = {}
        self._room: dict[int, int] = {}

    def at_once(self, size: int) -> int:
        """Clusters of so many programs that the device runs at the same time."""
        if size not in self._room:
            config = self._configured(max(SIZES), size, 0)
            found = self._driver.cuOccupancyMaxActiveClusters(self._function, config)
            self._room[size] = _checked(found)
        return self._room[size]

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
        if size == 1 and self._shape.resident == 1:  # they go on to others by themselves
            clusters = min(clusters, self.at_once(1))
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
def _kernel(shape: Shape, kind: Kind, device: int) -> _Kernel:
    stages, stage = shape.ring(kind)
    shape = replace(shape, stages=stages)
    return _Kernel(_compiled(source(shape, kind)), shape, stages * stage, device)


def source(shape: Shape, kind: Kind) -> str:
    """The text of a kernel."""
    defined = {
        "N": shape.tokens,
        "FEW": int(shape.few),
        "STAGES": shape.stages,
        "RESIDENT": shape.resident,
        "STEP": kind.step,
        "BFLOAT": int(kind.bfloat),
        "SCALE": kind.scale,
        "ZEROS": int(kind.zeros),
        "MIDDLE": f"{kind.middle}.0f",
    }
    if not shape.few:
        defined["WGMMA(d, a, b)"] = _wgmma(shape.tokens, "bf16" if kind.bfloat else "f16")
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
        ".reg .pred added;",
        "setp.ne.b32 added, 1, 0;",
        f"{instruction} {{{sums}}}, {{{left}}}, %{count + 4}, added, 1, 1, 0;",
        "}",
    ]
    changed = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    read = ", ".join(f'"r"(a[{i}])' for i in range(4))
    text = "\\n".join(lines)
    return f'asm volatile("{text}" : {changed} : {read}, "l"(b))'


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
