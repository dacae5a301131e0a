"""Reading ahead: the next block's tensors come from the disk to a GPU while this one computes."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from quantkit.runtime.skeleton import Skeleton


class Staging:
    """Blocks that are on their way to the skeleton's device, one at a time."""

    def __init__(self, skeleton: Skeleton, pool: ThreadPoolExecutor) -> None:
        self._skeleton, self._pool = skeleton, pool
        self._coming: tuple[str, Future[dict[str, Tensor]]] | None = None

    def begin(self, prefix: str) -> None:
        """Start to read the block ``prefix``."""
        self._coming = prefix, self._pool.submit(self._read, prefix)

    def arrived(self, prefix: str) -> None:
        """Wait until the block is there, and let go of the one before."""
        self._skeleton.staged = {}
        if self._coming and self._coming[0] == prefix:
            self._skeleton.staged = self._coming[1].result()
        self._coming = None

    def _read(self, prefix: str) -> dict[str, Tensor]:
        skeleton = self._skeleton
        stream = torch.cuda.Stream(skeleton.device)
        with torch.cuda.stream(stream):
            found = {
                name: skeleton.checkpoint.get(name).to(skeleton.device)
                for name in skeleton.names_below(prefix)
            }
        stream.synchronize()
        return found


@contextmanager
def staging(skeleton: Skeleton) -> Iterator[Staging | None]:
    """Nothing on a CPU, where weights are used where the disk's pages are."""
    if skeleton.device.type != "cuda":
        yield None
        return
    with ThreadPoolExecutor(1, thread_name_prefix="staging") as pool:
        try:
            yield Staging(skeleton, pool)
        finally:
            skeleton.staged = {}
