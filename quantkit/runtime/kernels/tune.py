"""How the work of a product is best divided on this GPU: measured once, and kept.

The kernel is the same for every number of shares, so a search compiles little and takes a moment
for a shape. Weights are read from memory, not from a cache that still has them from
the launch before: as in a model, where all the others come between.
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache as once
from statistics import median

import torch

from quantkit.core import cache
from quantkit.runtime.kernels.fragments import Fragments
from quantkit.runtime.kernels.skinny import Config

KIND = "autotune"
VERSION = 1  # of the kernel: what was measured with another one does not count
_FLUSH = 256 << 20  # bytes: several times any L2 cache
_REPEATS = 7


def tuned(
    weight: Fragments,
    ways: list[Config],
    dtype: torch.dtype,
    gpu: str,
    run: Callable[[Config], object],
) -> Config:
    """The fastest of ``ways``, with other numbers of shares too, on the GPU of that name; ``run``
    launches the product. While a graph is captured nothing can be measured, and the answer is the
    first way, unless it was measured before."""
    known, key = _known(gpu), _key(weight, ways[0].tokens, dtype)
    if key not in known or not known[key].fits(weight):
        if torch.cuda.is_current_stream_capturing():
            return ways[0]
        several = [one for way in ways for one in around(way, weight)]
        best = fastest(several, run, seconds)
        known[key] = best
        _write(gpu, known)
    return known[key]


def around(config: Config, weight: Fragments) -> list[Config]:
    """The same with fewer and with more shares."""
    wanted = {max(1, round(config.split * by)) for by in (0.5, 0.7, 0.85, 1, 1.2, 1.5, 2)}
    found = [replace(config, split=split) for split in sorted(wanted)]
    return [one for one in found if one.fits(weight)]


def fastest(
    configs: list[Config],
    run: Callable[[Config], object],
    timed: Callable[[Callable[[], object]], float],
) -> Config:
    """The one that takes the least time."""
    return min(configs, key=lambda one: timed(lambda: run(one)))


def seconds(launch: Callable[[], object]) -> float:
    """Median time of a launch that finds nothing in the cache."""
    flush = torch.empty(_FLUSH, dtype=torch.uint8, device="cuda")
    launch()  # compiled, if it was not yet
    found: list[float] = []
    for _ in range(_REPEATS):
        flush.zero_()  # the GPU is busy with it while the launch is prepared
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launch()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e-3)
    return median(found)


@once
def _known(gpu: str) -> dict[str, Config]:
    """What was measured before, by this process or another one."""
    content = cache.read(KIND, _file(gpu))
    try:
        return {key: Config(**held) for key, held in json.loads(content or b"{}").items()}
    except (ValueError, TypeError, AttributeError):  # spoiled, or of another version
        return {}


def _write(gpu: str, known: dict[str, Config]) -> None:
    plain = {key: asdict(config) for key, config in sorted(known.items())}
    cache.write(KIND, _file(gpu), json.dumps(plain, indent=1).encode())


def _key(weight: Fragments, tokens: int, dtype: torch.dtype) -> str:
    """Everything that the answer depends on, but for the GPU and the kernel."""
    shape = f"{weight.out}x{weight.width} {weight.bits} bits, groups of {weight.group}"
    return f"v{VERSION} {shape}, {weight.kind} {dtype}, {tokens} tokens"


def _file(gpu: str) -> str:
    return re.sub(r"[^\w]+", "-", gpu).strip("-") + ".json"
