"""y = x W^T with a weight of 4 bits on Hopper's own instructions (hopper.cu).

Triton does not say which warp copies and which computes, and lets nothing run while a product does.
Here a warp fills a ring with weights, before the kernel in front has ended already, and tensor
cores multiply one batch while the next one is unpacked. The text is compiled by NVRTC, a part of
CUDA that comes with torch, at the first use of each kind; what comes out is kept (core/cache.py).

Weights are those of ``fragments``, blocked.
"""

import ctypes
import hashlib
from dataclasses import dataclass, replace
from functools import cache as once
from importlib.util import find_spec
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
_SHARED = 226 << 10  # bytes that a program may have: 227 KB, and barriers take some
_SCALES = {torch.float16: 2, torch.bfloat16: 3, torch.float32: 4}  # what hopper.cu calls them


@dataclass(frozen=True)
class Shape:
    """How a product with up to so many ``tokens`` at a time is computed; see hopper.cu.

    few         by clusters of small programs, or else by one or two large programs to a processor
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

    def beside(self, cluster: int) -> int:
        """Bytes beside the ring: for sums that other programs of a cluster of so many send, or for
        warps that turn their results round."""
        warps = self.rows // 16
        return -(-warps // cluster) * (cluster - 1) * 64 * self.tokens if self.few else warps * 768

    @property
    def most_beside(self) -> int:
        """Of any cluster."""
        return max(map(self.beside, range(1, CLUSTER + 1)))


SHAPES = (
    Shape(8, True, 5, 3, True),
    Shape(16, True, 5, 3, True),
    Shape(32, False, 4, 2, True),
    Shape(64, False, 4, 1, True),
    Shape(128, False, 3, 1, False),
)
CLUSTER = 8  # programs at most


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
    """The smallest that takes so many tokens at once, or else the largest."""
    return next((shape for shape in SHAPES if tokens <= shape.tokens), SHAPES[-1])


def product(x: Tensor, weight: Fragments, bias: Tensor | None, arrived: Tensor) -> Tensor:
    """x [tokens, in] in float16 or bfloat16 -> [tokens, out] in the same; ``arrived`` as for
    :func:`matmul`, for as many tokens as are then computed at once."""
    if x.data_ptr() % 16 or not x.is_contiguous():  # the copy engine wants it so
        x = x.clone(memory_format=torch.contiguous_format)
    if bias is not None:
        bias = bias.to(x.dtype)
    return matmul(x, weight, bias, arrived, shape_of(len(x)))


def counters(processors: int) -> int:
    """How many numbers ``arrived`` has: 16 for each of the pairs that may be shared."""
    return 2 * processors * 16


def matmul(
    x: Tensor,
    weight: Fragments,
    bias: Tensor | None,
    arrived: Tensor,
    shape: Shape,
    split: int = 0,
) -> Tensor:
    """x [tokens, in] in float16 or bfloat16, contiguous -> [tokens, out] in the same. ``bias``
    [out] in the same dtype; ``split``: programs of a cluster, 0 for what :func:`divided` says.

    arrived  int32 [counters], all 0 before and after. Two launches that may run at the same time
             need two of them.

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
    parts = _parts(x, weight, shape, split)
    out = torch.empty(len(x), weight.out, dtype=x.dtype, device=x.device)
    left = 0 if shape.few else parts.programs * shape.rows * shape.tokens
    shares = torch.empty(left, dtype=torch.float32, device=x.device)
    kernel.launch(
        parts.programs,
        parts.of_cluster,
        torch.cuda.current_stream(x.device).cuda_stream,
        _map(x, shape.tokens),
        weight.words.data_ptr(),
        weight.scale.data_ptr(),
        0 if weight.offset is None else weight.offset.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        shares.data_ptr(),
        arrived.data_ptr(),
        len(x),
        weight.out,
        len(weight.words),
        parts.pairs,
        parts.token_blocks,
        parts.steps,
        max(1, weight.group // INPUTS),
        parts.whole,
    )
    return out


@dataclass(frozen=True)
class _Parts:
    """How a product is divided among programs; see hopper.cu."""

    pairs: int
    token_blocks: int
    steps: int
    programs: int
    of_cluster: int
    whole: int


def _parts(x: Tensor, weight: Fragments, shape: Shape, split: int = 0) -> _Parts:
    token_blocks = -(-len(x) // shape.tokens)
    pairs = -(-len(weight.words) * _BLOCK_ROWS // shape.rows) * token_blocks
    steps, processors = weight.width // INPUTS, support.of(x.device).processors
    if shape.few:
        cluster = split or divided(pairs, steps, processors)
        return _Parts(pairs, token_blocks, steps, pairs * cluster, cluster, 0)
    programs = min(processors * shape.resident, pairs * steps)
    whole = max(0, pairs // programs - 1)
    return _Parts(pairs, token_blocks, steps, programs, 1, whole)


def divided(pairs: int, steps: int, processors: int) -> int:
    """Programs of a cluster: so that nearly three run on every processor, as far as there is work
    and a cluster may be large."""
    return max(1, min(3 * processors // pairs, CLUSTER, steps))


class _Kernel:
    """A compiled kernel on a device."""

    _KINDS = (ctypes.c_void_p,) * 7 + (ctypes.c_int,) * 8

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

    def launch(self, programs: int, cluster: int, stream: int, x: Any, *numbers: int) -> None:
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = programs, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self._shape.threads, 1, 1
        config.sharedMemBytes = self._ring + self._shape.beside(cluster)
        config.hStream = driver.CUstream(stream)
        attributes = [self._early]
        if cluster > 1:
            together = driver.CUlaunchAttribute()
            together.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            size = together.value.clusterDim
            size.x, size.y, size.z = cluster, 1, 1
            attributes.append(together)
        config.attrs, config.numAttrs = attributes, len(attributes)
        held = [kind(number) for kind, number in zip(self._KINDS, numbers, strict=True)]
        places = (ctypes.c_void_p * (1 + len(held)))(x.getPtr(), *map(ctypes.addressof, held))
        _checked(driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(places), 0))


@once
def _kernel(
    shape: Shape, bfloat: bool, step: int, scale: int, zeros: bool, middle: int, device: int
) -> _Kernel:
    scales = 32 * (INPUTS // step) * ((4 if scale == 4 else 2) + (2 if zeros else 0))
    tile = _TILE_ROWS * INPUTS // 2 + scales
    stage = shape.tokens * INPUTS * 2 + shape.rows // _TILE_ROWS * tile
    room = _SHARED // shape.resident - shape.most_beside
    shape = replace(shape, stages=min(shape.stages, room // stage))
    text = source(shape, bfloat, step, scale, zeros, middle)
    return _Kernel(_compiled(text), shape, shape.stages * stage, device)


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
