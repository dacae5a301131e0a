"""Which inputs of a linear matter: their mean squares while calibration text runs through the
original model, one decoder block at a time."""

import time

from torch import Tensor

from quantkit.core.checkpoint import Checkpoint
from quantkit.core.progress import Progress, Step
from quantkit.core.source import Source
from quantkit.runtime import gather
from quantkit.runtime.device import pick_device, pick_dtype
from quantkit.runtime.kernels import cpu_attention
from quantkit.runtime.skeleton import Skeleton
from quantkit.runtime.states import States
from quantkit.runtime.tokenizer import load_tokenizer
from quantkit.runtime.walk import Walk
from quantkit.workflows.calibrate import batches, calibrate, longest_row

_TOKENS = 2048  # in a micro-batch


def importance(
    source: Source,
    *,
    calib: list[str],
    calib_rows: int,
    calib_seqlen: int,
    seed: int,
    device: str,
    dtype: str,
    progress: Progress,
) -> tuple[dict[str, Tensor], int, int]:
    """The mean square of every input, float32 [in] on the CPU, of each linear that text reaches, by
    its prefix in files; and how many rows of at most how many tokens that took."""
    on = pick_device(device)
    skeleton = Skeleton(source, Checkpoint(source.folder), on, pick_dtype(dtype, on))
    rows = calibrate(
        source,
        load_tokenizer(source),
        calib,
        rows=calib_rows,
        seqlen=calib_seqlen,
        longest=longest_row(skeleton),
        seed=seed,
        device=on,
        progress=progress,
    )
    for text in rows.notes + rows.short:
        progress.note(text)
    cpu_attention.use(skeleton.model)
    walk = Walk(skeleton)
    hidden = States(walk.embed(batches(rows.rows, _TOKENS)))
    found: dict[str, Tensor] = {}
    progress.begin("looking at activations", len(walk))
    for index in range(len(walk)):
        started = time.perf_counter()
        part = walk.block_name(index)
        with walk.block(index) as block:
            groups = block.trace(hidden[0], ends=False)
            for group, squares in gather.mean_squares(block, hidden, groups).items():
                for name in group.names:
                    disk = skeleton.disk_names[f"{part}.{name}.weight"]
                    found[disk.removesuffix(".weight")] = squares.cpu()
        progress.step(Step(index + 1, len(walk), part, None, time.perf_counter() - started))
    progress.end()
    return found, len(rows.rows), max(len(row) for row in rows.rows)
