"""Seconds of GPTQ's solver for the four linears of a block, by phase and by share of their rows.

    python benchmarks/solver_gpu.py [--shape 14592x4864 ...] [--rounds 0 --rounds 2] [--kernels 16]

Hessians are those of random inputs that depend on each other, without reading or running a model.
Half of the rows and a quarter of them are what one of two or four GPUs has to solve; what does not
shrink with them is what limits several. Everything is solved once before it is timed, so that
nothing is compiled then. --kernels lists the kernels that take longest.
"""

import argparse
import time

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from quantkit.core import profile
from quantkit.core.qweight import Scheme
from quantkit.methods import gptq

BLOCK = ["14592x4864", "4864x4864", "19456x4864", "4864x19456"]  # weblab-10b's: out x in
MOST_TOKENS = 22_000


def main() -> None:
    args = _arguments()
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shape or BLOCK]
    device = torch.device(args.device)
    torch.manual_seed(0)
    hessians = {width: hessian(width, device) for width in {width for _, width in shapes}}
    weights = [torch.randn(shape, device=device) * 0.02 for shape in shapes]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, 4 bits in groups of {args.group}")
    measured = profile.start()
    for rounds in args.rounds or [0, 2]:
        options = gptq.Options(rounds=rounds)
        for parts in (1, 2, 4):
            some = [weight[: max(1, len(weight) // parts)] for weight in weights]
            _solved(some, hessians, args.group, options)  # compiles
            before = dict(measured.seconds)
            took = _solved(some, hessians, args.group, options)
            spent = {n: round(s - before.get(n, 0.0), 4) for n, s in measured.seconds.items()}
            each = ", ".join(f"{seconds:.4f}" for seconds in took)
            print(f"{rounds} rounds, 1/{parts} of the rows: {sum(took):.3f} s ({each}) {spent}")
    if args.kernels:
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
            _solved(weights, hessians, args.group, gptq.Options())
        print(found.key_averages().table(sort_by="self_device_time_total", row_limit=args.kernels))


def hessian(width: int, device: torch.device) -> Tensor:
    mixing = torch.randn(width, width, device=device) * (0.5 / width**0.5)
    mixing.diagonal().add_(1)
    x = torch.randn(min(4 * width, MOST_TOKENS), width, device=device) @ mixing
    return x.T @ x / len(x)


def _solved(
    weights: list[Tensor], hessians: dict[int, Tensor], group: int, options: gptq.Options
) -> list[float]:
    """Seconds of each."""
    took = []
    for weight in weights:
        _wait(weight)
        began = time.perf_counter()
        gptq.solve(weight, hessians[weight.shape[1]], Scheme(4, group), options)
        _wait(weight)
        took.append(time.perf_counter() - began)
    return took


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", metavar="OUTxIN")
    parser.add_argument("--rounds", action="append", type=int)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--kernels", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
