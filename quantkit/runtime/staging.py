"""Reading ahead: the next block's tensors come from the disk to a GPU while this one computes."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from quantkit.core import pinned
from quantkit.runtime.skeleton import Skeleton


class Staging:
    """Blocks that are on their way to the skeleton's device, one at a time."""

    def __init__(self, skeleton: Skeleton, pool: ThreadPoolExecutor) -> None:
        self._skeleton, self._pool = skeleton, pool
        # one for all blocks: freed memory goes back to the stream that took it
        cuda = skeleton.device.type == "cuda"
        self._stream = torch.cuda.Stream(skeleton.device) if cuda else None
        self._coming: tuple[str, Future[dict[str, Tensor]]] | None = None

    def begin(self, prefix: str) -> None:
        """Start to read the block ``prefix``."""
        self._coming = prefix, self._pool.submit(self._read, prefix)

    def arrived(self, prefix: str) -> None:
        """Wait until the block is there, and let go of the one before."""
        self._skeleton.staged = {}
        if self._coming and self._coming[0] == prefix:
            found = self._coming[1].result()
            if self._stream:
                for tensor in found.values():
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
            self._skeleton.staged = found
        self._coming = None

    def _read(self, prefix: str) -> dict[str, Tensor]:
        skeleton = self._skeleton
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            found = {
                name: pinned.carried(skeleton.checkpoint.get(name), skeleton.device)
                for name in skeleton.names_below(prefix)
            }
        return found


@contextmanager
def staging(skeleton: Skeleton, ahead: bool) -> Iterator[Staging | None]:
    """Nothing unless blocks are to be read ``ahead``."""
    if not ahead:
        yield None
        return
    with ThreadPoolExecutor(1, thread_name_prefix="staging") as pool:
        try:
            yield Staging(skeleton, pool)
        finally:
            skeleton.staged = {}
