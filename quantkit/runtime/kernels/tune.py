"""Into how many shares a product's inputs are best divided on this GPU: measured once, and kept.

The kernel is the same for every number of shares, so a search compiles nothing and takes a few
milliseconds for a shape. Weights are read from memory, not from a cache that still has them from
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
_FLUSH = 256 << 20  # bytes: several times any L2 cache
_REPEATS = 7


def tuned(
    weight: Fragments,
    config: Config,
    dtype: torch.dtype,
    gpu: str,
    run: Callable[[Config], object],
) -> Config:
    """``config`` with the number of shares that is the fastest on the GPU of that name; ``run``
    launches the product. While a graph is captured nothing can be measured, and ``config`` stays as
    it is, unless it was measured before."""
    known, key = _known(gpu), _key(weight, config, dtype)
    if key not in known:
        if torch.cuda.is_current_stream_capturing():
            return config
        known[key] = fastest(around(config, weight), run, seconds).split
        cache.write(KIND, _file(gpu), json.dumps(known, indent=1, sort_keys=True).encode())
    return replace(config, split=known[key])


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
    found = []
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
def _known(gpu: str) -> dict[str, int]:
    """What was measured before, by this process or another one."""
    content = cache.read(KIND, _file(gpu))
    try:
        found = json.loads(content or b"{}")
    except ValueError:  # half of a file: measured again
        return {}
    plain = isinstance(found, dict) and all(
        isinstance(split, int) and split > 0 for split in found.values()
    )
    return found if plain else {}


def _key(weight: Fragments, config: Config, dtype: torch.dtype) -> str:
    """Everything that the answer depends on, but for the GPU."""
    shape = f"{weight.out}x{weight.width} {weight.bits} bits {weight.group} {weight.kind} {dtype}"
    kept = {name: value for name, value in asdict(config).items() if name != "split"}
    return f"{shape} {' '.join(f'{name}={value}' for name, value in kept.items())}"


def _file(gpu: str) -> str:
    return re.sub(r"[^\w]+", "-", gpu).strip("-") + ".json"
