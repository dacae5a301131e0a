"""How fast the kernels for quantized linears are on this GPU.

    python benchmarks/kernels_gpu.py [--tokens 1,8,16,32,64] [--gptqmodel FOLDER]
    python benchmarks/kernels_gpu.py --search [--seconds 240]
    python benchmarks/kernels_gpu.py --turns

Correctness comes first: every kernel against the float32 product with the dequantized weight. Then
times: the four linears of one block of a 10B GPT-NeoX (hidden 4864, feed-forward 19456), 4 bits in
groups of 128, each launch of a CUDA graph on another copy of the weights, so no cache flatters; one
after the other, and all four in turn as in a model. cuBLAS with 16-bit weights and torch's own int4
kernel (tinygemm) run under the same conditions: by turns, each after a pause, since a GPU that has
been busy for a while is slower, and after a replay that is not timed, since an idle one is, too.
--gptqmodel takes GPTQModel's Marlin and ExLlamaV2 in, where it is installed, on a GPTQ folder with
one block of such a model: one copy, so of its linears one by one some may come from a cache; of all
four in turn, which are larger than it, little. ExLlamaV2 launches outside of the captured stream:
it is measured without a graph.
--search looks for the best division of the work of the Triton kernel. --turns measures what the
costs in hopper_ways.py are made of: full turns of all processors, by shape and cluster.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import torch
import triton
from torch import Tensor, nn

from quantkit.core.qweight import QWeight, Scheme
from quantkit.runtime.kernels import choose, fragments, hopper, skinny
from quantkit.runtime.kernels.hopper_ways import INPUTS, LARGE, ROWS, SIZES, Kind, Shape, Way

SHAPES = [(14592, 4864), (4864, 4864), (19456, 4864), (4864, 19456)]  # (out, in)
TURN = 300e6  # bytes in a round of copies: several times the L2 cache
GPU = torch.device("cuda")


def random_weight(out: int, width: int, scheme: Scheme, kind: str = "") -> QWeight:
    """A weight of random codes; ``kind`` of an asymmetric one is zero or minimum."""
    groups = scheme.groups(width)
    codes = torch.randint(0, scheme.max_code + 1, (out, width), dtype=torch.uint8, device=GPU)
    scale = (torch.rand(out, groups, device=GPU) + 0.5).half() * 0.005
    zero = minimum = None
    if kind == "zero":
        zero = torch.randint(0, scheme.max_code + 1, (out, groups), dtype=torch.uint8, device=GPU)
    if kind == "minimum":
        minimum = (torch.randn(out, groups, device=GPU) * 0.02).half()
    return QWeight(scheme, codes, scale, zero, minimum=minimum)


Launches = list[Callable[[], object]]


def captured(launches: Launches) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for launch in launches:
            launch()
    return graph


def compared(contenders: list[Launches], repeats: int, pause: float) -> list[float]:
    """Median seconds of all launches of each, divided by their number; all by turns, after a pause
    of so many seconds each time."""
    graphs = [captured(launches) for launches in contenders]
    found: list[list[float]] = [[] for _ in graphs]
    for _ in range(repeats + 1):
        for graph, times in zip(graphs, found, strict=True):
            torch.cuda.synchronize()
            time.sleep(pause)
            graph.replay()
            start, end = torch.cuda.Event(True), torch.cuda.Event(True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
    return [
        statistics.median(times[1:]) / len(launches)
        for times, launches in zip(found, contenders, strict=True)
    ]


def seconds(launches: Launches, repeats: int = 9) -> float:
    """Median time of all launches in one CUDA graph, divided by their number."""
    return compared([launches], repeats, 0)[0]


def check() -> None:
    print("relative error against float32 (Triton; as chosen here); identical when repeated")
    cases = [
        (Scheme(4), "", torch.float16),
        (Scheme(4), "", torch.bfloat16),
        (Scheme(4, symmetric=False), "zero", torch.float16),
        (Scheme(4, symmetric=False), "zero", torch.bfloat16),
        (Scheme(4, 32, symmetric=False), "minimum", torch.bfloat16),
        (Scheme(8), "", torch.float16),
        (Scheme(8), "", torch.bfloat16),
        (Scheme(3, -1), "", torch.float16),
    ]
    for scheme, kind, dtype in cases:
        q = random_weight(4864 + 120, 1536, scheme, kind)
        weight = fragments.arrange(q)
        reference = q.dequantize()
        scratch = counters(weight.out)
        errors = []
        few = skinny.Config(1, 2, 64, parts=4)
        many = skinny.Config(1, 2, 64, warps=4, tokens=16)
        for tokens, config in product((1, 29), (few, many)):
            config = replace(config, step=min(64, weight.group & -weight.group))
            if not config.fits(weight):
                print("  does not fit", config)
                continue
            x = torch.randn(tokens, 1536, device=GPU).to(dtype)
            bias = torch.randn(weight.out, device=GPU).to(dtype)
            meant = x.float() @ reference.T + bias.float()
            early = tokens > 1
            found = skinny.matmul(x, weight, bias, scratch, config, early=early)
            again = skinny.matmul(x, weight, bias, scratch, config, early=early)
            assert torch.equal(found, again), "not deterministic"
            errors.append(float((found.float() - meant).norm() / meant.norm()))
        here = arranged(q)
        chosen_errors = []
        for tokens in (1, 13, 64, 300, 1500):
            x = torch.randn(tokens, 1536, device=GPU).to(dtype)
            meant = x.float() @ reference.T
            found, again = (choose.product(x, here[0], None, here[1]) for _ in range(2))
            assert torch.equal(found, again), "not deterministic"
            chosen_errors.append(float((found.float() - meant).norm() / meant.norm()))
        errors.append(max(chosen_errors))
        name = f"{scheme} {kind} {str(dtype).removeprefix('torch.')}"
        print(
            f"  {name:55s} {max(errors[:-1], default=0):.2e} {errors[-1]:.2e}  "
            f"{'ok' if max(errors) < 3e-3 else 'WRONG'}",
            flush=True,
        )


def arranged(q: QWeight) -> tuple[fragments.Fragments, Tensor]:
    """As a model has it on this GPU."""
    held = fragments.arrange(q, blocked=choose.blocked(q, GPU))
    return held, torch.zeros(choose.counters(held), dtype=torch.int32, device=GPU)


def counters(out: int) -> Tensor:
    return torch.zeros(out * 8, dtype=torch.int32, device=GPU)


def copies(out: int, width: int, dtype_bytes: float) -> int:
    return max(2, round(TURN / (out * width * dtype_bytes)))


# for every shape, what launches it on one copy of the weight after the other
Contender = dict[tuple[int, int], Launches]


def dense_weights(dtype: torch.dtype) -> dict[tuple[int, int], list[Tensor]]:
    return {
        (out, width): [
            torch.randn(out, width, device=GPU, dtype=dtype) for _ in range(copies(out, width, 2))
        ]
        for out, width in SHAPES
    }


def random_inputs(tokens: int, dtype: torch.dtype) -> dict[int, Tensor]:
    widths = {width for _, width in SHAPES}
    return {width: torch.randn(tokens, width, device=GPU, dtype=dtype) for width in widths}


def cublas(weights: dict[tuple[int, int], list[Tensor]], inputs: dict[int, Tensor]) -> Contender:
    def launch(weight: Tensor) -> Callable[[], object]:
        return lambda: inputs[weight.shape[1]] @ weight.T

    return {shape: [launch(weight) for weight in held] for shape, held in weights.items()}


def tinygemm(tokens: int) -> Contender:
    found: Contender = {}
    for out, width in SHAPES:
        x = torch.randn(tokens, width, device=GPU, dtype=torch.bfloat16)
        found[out, width] = []
        for _ in range(copies(out, width, 0.5)):
            packed = torch.randint(0, 256, (out, width // 2), dtype=torch.uint8, device=GPU)
            packed = torch._convert_weight_to_int4pack(packed, 8)
            scales = torch.rand(width // 128, out, 2, device=GPU, dtype=torch.bfloat16)
            found[out, width].append(
                lambda x=x, p=packed, s=scales: torch._weight_int4pack_mm(x, p, 128, s)
            )
    return found


def quantkit(held: "Held", inputs: dict[int, Tensor]) -> Contender:
    """What a model gets, the kernels as ``choose`` picks them."""

    def launch(weight, scratch):
        return lambda: choose.product(inputs[weight.width], weight, None, scratch)

    return {shape: [launch(*one) for one in weights] for shape, weights in held.items()}


def gptqmodel(folder: str, backend: str) -> dict[tuple[int, int], nn.Module]:
    """GPTQModel's linears of the folder's block, by shape."""
    from gptqmodel import BACKEND, GPTQModel

    loaded = GPTQModel.load(folder, device="cuda:0", backend=BACKEND(backend))
    found = {
        (module.out_features, module.in_features): module
        for name, module in loaded.model.named_modules()
        if type(module).__module__.startswith("gptqmodel") and ".layers.0." in name
        if hasattr(module, "in_features")
    }
    kinds = {type(module).__name__ for module in found.values()}
    assert set(found) == set(SHAPES), found
    print(f"GPTQModel's {backend}: {', '.join(kinds)}", flush=True)
    return found


def theirs(linears: dict[tuple[int, int], nn.Module], inputs: dict[int, Tensor]) -> Contender:
    """Modules of another toolkit, of which there is one copy."""

    def launch(shape: tuple[int, int], linear: nn.Module) -> Callable[[], object]:
        return lambda: linear(inputs[shape[1]])

    return {shape: [launch(shape, linear)] * 4 for shape, linear in linears.items()}


def launched(launches: Launches, repeats: int, pause: float) -> float:
    """Median seconds of all launches, one after the other without a graph, divided by their
    number: no less than what launching takes."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        time.sleep(pause)
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        for launch in launches:
            launch()
        start.record()
        for launch in launches:
            launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times[1:]) / len(launches)


def in_turn(contender: Contender, rounds: int) -> Launches:
    """All linears one after the other, as in a model."""
    return [
        contender[shape][turn % len(contender[shape])] for turn in range(rounds) for shape in SHAPES
    ]


def full_turns() -> None:
    """Microseconds of turns of all processors, as many clusters as run at once in each."""
    torch.zeros(1, device=GPU)  # who asks how many run at once needs a context
    kind = Kind(bfloat=False, step=128, scale=2, zeros=False, middle=Scheme(4).midpoint)
    for shape in (shape for shape in LARGE if shape.tokens in (96, 128, 192, 256)):
        kernel = hopper._kernel(shape, kind, GPU.index or 0)
        for size in SIZES:
            room = kernel.at_once(size)
            for count in (1, 2, 4) if size == 1 else (1,):
                took = [seconds_of(shape, size, room * count, steps) for steps in (8, 16, 38)]
                what = f"{shape.tokens} tokens, clusters of {size}, {room} at once, {count} turns"
                times = " ".join(f"{one * 1e6:.1f}" for one in took)
                print(f"  {what} of 8, 16, 38 steps: {times}", flush=True)


def seconds_of(shape: Shape, size: int, clusters: int, steps: int) -> float:
    weight, _ = arranged(random_weight(clusters * ROWS, steps * INPUTS, Scheme(4)))
    x = torch.randn(shape.tokens, steps * INPUTS, device=GPU, dtype=torch.float16)
    out = torch.empty(shape.tokens, clusters * ROWS, device=GPU, dtype=torch.float16)
    way = Way(shape, ((clusters, size),))
    return compared([[lambda: hopper.matmul(x, weight, None, way, out)] * 8], 5, 0.02)[0]


Measured = dict[tuple[int, int], tuple[float, skinny.Config]]
Held = dict[tuple[int, int], list[tuple[fragments.Fragments, Tensor]]]
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24)


def candidates(tokens: int) -> list[skinny.Config]:
    """Ways to divide the work that are worth a try."""
    found = []
    if tokens <= 32:
        n = max(8, 1 << (tokens - 1).bit_length())
        for parts, step in product((1, 2, 4, 8), (64, 128)):
            limits = (0, 80, 96) if n == 8 else (0,)
            found += [skinny.Config(1, 1, step, parts, 1, n, True, limit) for limit in limits]
        if n == 8:
            found += [skinny.Config(1, 1, 128, parts, 1, n, False) for parts in (1, 4)]
    if tokens >= 16:
        n = min(64, 1 << (tokens - 1).bit_length())
        for warps, step, ahead in product((4, 8), (64, 128), (True, False)):
            found.append(skinny.Config(1, 1, step, 1, warps, n, ahead))
        if tokens >= 128:
            found += [
                skinny.Config(1, 1, s, 1, w, 128, False) for s, w in product((64, 128), (4, 8))
            ]
    return found


def search(tokens: int, dtype: torch.dtype, held: Held, until: float) -> Measured:
    """The best configuration of every shape."""
    best: Measured = {}
    configs = candidates(tokens)
    inputs = {w: torch.randn(tokens, w, device=GPU, dtype=dtype) for w in (4864, 19456)}

    def launch(weight, scratch, config, early=True):
        x = inputs[weight.width]
        return lambda: skinny.matmul(x, weight, None, scratch, config, early=early)

    def built(job: tuple[tuple[int, int], skinny.Config, bool]) -> None:
        shape, config, early = job
        for split in (1, 2):
            one = replace(config, split=split)
            if one.fits(held[shape][0][0]):
                launch(*held[shape][0], one, early)()

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(built, product(((4864, 4864), (4864, 19456)), configs, (True,))))
    torch.cuda.synchronize()
    for shape in SHAPES:
        weights = held[shape]
        rows = []
        for config, split in product(configs, SPLITS):
            config = replace(config, split=split)
            if not config.fits(weights[0][0]) or time.time() > until:
                continue
            rows.append((seconds([launch(w, s, config) for w, s in weights], 5), config))
        if not rows:
            continue
        rows.sort(key=lambda row: row[0])
        took, config = rows[0]
        plain = seconds([launch(w, s, config, False) for w, s in weights])
        best[shape] = rows[0]
        print(
            f"    {shape!s:15s} {took * 1e6:6.1f} us  {weights[0][0].nbytes / took / 1e12:.2f} TB/s"
            f"  without early start {plain * 1e6:6.1f} us  {config}"
        )
        kinds = {replace(row[1], split=1): row for row in reversed(rows)}
        for other, w in sorted(kinds.values(), key=lambda row: row[0])[:7]:
            print(
                f"          {other * 1e6:6.1f}  parts {w.parts} warps {w.warps} split {w.split:2d} "
                f"step {w.step} tokens {w.tokens} ahead {w.ahead:d} registers {w.registers}"
            )
    return best


def chain(tokens: int, dtype: torch.dtype, held: Held, best: Measured) -> None:
    """The four linears one after the other, as in a block."""

    def launch(shape, turn, early):
        weight, scratch = held[shape][turn % len(held[shape])]
        x = torch.randn(tokens, shape[1], device=GPU, dtype=dtype)
        return lambda: skinny.matmul(x, weight, None, scratch, best[shape][1], early=early)

    for early in (False, True):
        launches = [launch(shape, turn, early) for turn in range(4) for shape in SHAPES]
        took = seconds(launches) * len(SHAPES)
        print(f"    a block, early start {early}: {took * 1e6:.1f} us", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", default="1,4,8,16,32,64,128,256,512,1024,4096")
    parser.add_argument("--pause", type=float, default=0.02, help="seconds before each")
    parser.add_argument("--gptqmodel", metavar="FOLDER", help="one block in GPTQ's format")
    parser.add_argument("--search", action="store_true", help="try many ways to divide the work")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--turns", action="store_true", help="measure full turns, and nothing else")
    arguments = parser.parse_args()
    until = time.time() + arguments.seconds
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    if arguments.turns:
        full_turns()
        return
    check()
    sizes = [int(text) for text in arguments.tokens.split(",")]
    print("microseconds of the four linears", SHAPES)
    held: Held = {}
    started = time.time()
    for out, width in SHAPES:
        held[out, width] = [
            arranged(random_weight(out, width, Scheme(4))) for _ in range(copies(out, width, 0.53))
        ]
    torch.cuda.synchronize()
    print(f"arranged in {time.time() - started:.2f} s")
    backends = ("gptq_marlin", "gptq_exllama_v2") if arguments.gptqmodel else ()
    others = {backend: gptqmodel(arguments.gptqmodel, backend) for backend in backends}
    dtypes = (torch.float16, torch.bfloat16)
    weights = {dtype: dense_weights(dtype) for dtype in dtypes}
    for tokens in sizes:
        contenders: dict[str, Contender] = {}
        for dtype in dtypes:
            name, inputs = str(dtype).removeprefix("torch."), random_inputs(tokens, dtype)
            contenders[f"cuBLAS {name}"] = cublas(weights[dtype], inputs)
            contenders[f"quantkit {name}"] = quantkit(held, inputs)
        if tokens <= 16:
            contenders["tinygemm bfloat16"] = tinygemm(tokens)
        if others:
            half = random_inputs(tokens, torch.float16)
            contenders["Marlin float16"] = theirs(others["gptq_marlin"], half)
        each = [
            compared([found[shape] for found in contenders.values()], 5, arguments.pause)
            for shape in SHAPES
        ]
        rounds = 6 if tokens < 256 else 3
        turns = [in_turn(found, rounds) for found in contenders.values()]
        blocks = compared(turns, 7, arguments.pause)
        for i, (name, block) in enumerate(zip(contenders, blocks, strict=True)):
            own = [times[i] for times in each]
            print(
                f"  {tokens:4d} tokens  {name:18s} "
                + " ".join(f"{one * 1e6:7.1f}" for one in own)
                + f"  sum {sum(own) * 1e6:7.1f}  in turn {block * len(SHAPES) * 1e6:7.1f}"
                + f"  of cuBLAS float16 {block / blocks[0]:.3f}",
                flush=True,
            )
        if others:
            launches = in_turn(theirs(others["gptq_exllama_v2"], half), rounds)
            block = launched(launches, 7, arguments.pause)
            print(
                f"  {tokens:4d} tokens  ExLlamaV2 float16, not in a graph: "
                f"in turn {block * len(SHAPES) * 1e6:7.1f}",
                flush=True,
            )
    for tokens in sizes if arguments.search else ():
        if tokens > 256:
            continue
        plain: Held = {
            (out, width): [
                (fragments.arrange(fragments.restore(weight)), counters(out))
                for weight, _ in held[out, width]
            ]
            for out, width in SHAPES
        }
        for dtype in (torch.bfloat16, torch.float16) if tokens == 1 else (torch.bfloat16,):
            print(f"  {tokens} tokens, {str(dtype).removeprefix('torch.')}")
            best = search(tokens, dtype, plain, until)
            print(f"    sum {sum(row[0] for row in best.values()) * 1e6:.1f} us")
            if len(best) == len(SHAPES):
                chain(tokens, dtype, plain, best)


if __name__ == "__main__":
    main()
