"""Several processes that work on one model: what ``torchrun`` starts, and how they agree.

Every process is a *rank* with a device of its own (GPU number LOCAL_RANK, or the CPU), and runs the
same program over its own part of the rows. There is one code path: a process that runs alone is the
only rank of :data:`ALONE`, for which all of this does nothing.

    ranks = join()                        # from torchrun's environment
    device = ranks.connect("auto")
    part = hidden[ranks.part(len(hidden))]
    ranks.merge([(stats, owners)])        # sums over all tokens
    weight = ranks.share(weight, owner)   # bit for bit the same everywhere

Two things connect ranks. Collectives carry tensors: NCCL those on GPUs, gloo all others, so that
nobody waits for a GPU to exchange a few numbers. They end in an error when a rank is lost, or after
TIMEOUT. A store of short notes, which torchrun keeps, is for waiting without a limit while one rank
works for all, and for telling whose error is shown.
"""

import io
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from quantkit.core.profile import phase
from quantkit.core.stats import InputStats
from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime.device import pick_device

T = TypeVar("T")
# torch's name for it, and the older one, of which 2.13 warns
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# A rank may have to wait while another one solves its part of a block on a slow CPU. A process that
# has ended is noticed at once; this is for hosts that do not answer any more.
TIMEOUT = timedelta(minutes=30)
_POLL_SECONDS = 0.05
_TOLD = "told"
_SHORT, _SAYS = 16 << 10, 8  # bytes of a message that is short, and of what says how long it is
_SMALL, _BUNDLE = 1 << 20, 16 << 20  # bytes of a tensor that is sent with others, and of them all


class Ranks:
    """One of ``size`` processes, the ``rank``-th of all and the ``local``-th of its ``host``."""

    def __init__(
        self, rank: int = 0, size: int = 1, local: int = 0, host: int = 0, store: Any = None
    ) -> None:
        self.rank, self.size, self.local, self.host = rank, size, local, host
        self._store = store
        self._device = torch.device("cpu")
        self._connected = self._turns = 0
        self._asked, self._asking = False, threading.Lock()
        # of its own: the other one may be waiting for something
        self._notes: Any = store.clone() if store else None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes, and that people hear from."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """This rank's own, once it is connected."""
        return self._device

    def connect(self, name: str) -> torch.device:
        """The device that ``name`` means for this rank, and the way to the others' devices. Raises
        UsageError when ranks would have to share a GPU, QuantkitError when there is no way."""
        if self.size == 1:
            return pick_device(name)
        self._device = device = self._own(pick_device(name), name)
        if dist.is_initialized():
            return device
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        self._connected += 1
        try:
            with phase("exchange"):
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                    store=PrefixStore(f"connection {self._connected}", self._store),
                    rank=self.rank,
                    world_size=self.size,
                    timeout=TIMEOUT,
                    device_id=device if on_gpu else None,
                )
        except RuntimeError as error:
            raise _unreachable(
                error,
                "one of them may have ended; on several hosts, GLOO_SOCKET_IFNAME and "
                "NCCL_SOCKET_IFNAME name the network between them",
            ) from error
        return device

    def _own(self, device: torch.device, name: str) -> torch.device:
        if device.type != "cuda":
            return device
        if device.index is not None:
            raise UsageError(
                f"{self.size} processes cannot all run on {name}",
                "leave out --device: every process takes a GPU of its own",
            )
        if self.local >= torch.cuda.device_count():
            raise UsageError(
                f"this machine has {torch.cuda.device_count()} GPUs, and more processes than that",
                "start one process for every GPU: torchrun --nproc-per-node gpu",
            )
        return torch.device("cuda", self.local)

    def leave(self) -> None:
        """The end of what :meth:`connect` began."""
        if self._connected and dist.is_initialized():
            with self._together():
                dist.barrier()
            dist.destroy_process_group()

    def part(self, count: int) -> slice:
        """This rank's part of ``count`` things: neighbours, so that all parts together are in the
        old order."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def share(self, value: T | None, owner: int = 0) -> T:
        """The ``owner``'s value on every rank, with the tensors in it bit by bit the same; a tensor
        is on the GPU of each rank if it was on the owner's."""
        if self.size == 1:
            return value  # type: ignore[return-value]
        tensors: list[Tensor] = []
        with self._together():
            own = _packed(value, tensors) if self.rank == owner else b""
            message = self._messages(own)[owner]
            return self._received(message, owner, value, tensors)  # type: ignore[no-any-return]

    def everyone(self, value: T) -> list[T]:
        """The values of all ranks, in their order; tensors as in :meth:`share`."""
        if self.size == 1:
            return [value]
        tensors: list[Tensor] = []
        with self._together():
            messages = self._messages(_packed(value, tensors))
            return [
                self._received(message, rank, value, tensors)
                for rank, message in enumerate(messages)
            ]

    def _received(self, message: bytes, owner: int, own: Any, tensors: list[Tensor]) -> Any:
        """What the ``owner`` says in a message, with the tensors that belong to it, which are sent
        now. ``own``, ``tensors``: this rank's, if it is the owner."""
        if self.rank != owner:
            tensors = []
            own = _unpacked(message, self._device, tensors)
        for some in _bundles(tensors):
            self._broadcast_together(some, owner)
        return own

    def _messages(self, own: bytes) -> list[bytes]:
        """Those of all ranks: in one exchange, but for the rest of long ones."""
        own_first = len(own).to_bytes(_SAYS, "little") + own[:_SHORT].ljust(_SHORT, b"\0")
        first = _buffer(own_first)
        firsts = [torch.empty_like(first) for _ in range(self.size)]
        dist.all_gather(firsts, first)
        messages = []
        for rank, found in enumerate(each.numpy().tobytes() for each in firsts):
            length = int.from_bytes(found[:_SAYS], "little")
            message = found[_SAYS : _SAYS + length]
            if missing := length - len(message):
                mine = rank == self.rank
                rest = _buffer(own[_SHORT:] if mine else bytes(missing))
                message += self._broadcast(rest, rank).numpy().tobytes()
            messages.append(message)
        return messages

    def _broadcast_together(self, tensors: list[Tensor], owner: int) -> None:
        """All of them become the owner's, in place: in one piece, unless it is one."""
        if len(tensors) == 1:
            self._broadcast(tensors[0], owner)
            return
        parts = [_as_bytes(tensor) for tensor in tensors]
        whole = self._broadcast(torch.cat(parts), owner)
        if self.rank != owner:
            torch._foreach_copy_(parts, list(whole.split([len(part) for part in parts])))

    def _broadcast(self, tensor: Tensor, owner: int) -> Tensor:
        """``tensor`` becomes the owner's, in place, as bytes; others' are contiguous."""
        if tensor.numel():
            dist.broadcast(_as_bytes(tensor), owner)
        return tensor

    def merge(self, parts: Iterable[tuple[InputStats, Sequence[int]]]) -> None:
        """Statistics of this rank's tokens become those of all tokens, on their owners; on other
        ranks they are of no use any more. All ranks give the same inputs in the same order."""
        if self.size == 1:
            return
        pairs = list(parts)
        found = self.everyone([(stats.count, stats.shift) for stats, _ in pairs])
        for (stats, owners), told in zip(pairs, zip(*found)):
            # the first rank that has seen any: not all tokens reach every expert
            shift = next((shift for _, shift in told if shift is not None), None)
            if shift is None:
                continue
            stats.move(shift)
            with self._together():
                for sums in stats.sums:
                    whole = sums.contiguous()
                    if len(owners) == 1:
                        dist.reduce(whole, owners[0])
                    else:
                        dist.all_reduce(whole)
                    if whole is not sums:
                        sums.copy_(whole)
            stats.count = sum(count for count, _ in told)

    def stacked(self, rows: Tensor) -> Tensor:
        """As many rows [n, ...] of each rank, where the ranks' tensors are: [size n, ...]."""
        if self.size == 1:
            return rows
        rows = rows.contiguous()
        found = rows.new_empty(self.size * len(rows), *rows.shape[1:])
        with self._together():
            _gather(found, rows)
        return found

    def here(self) -> int:
        """How many processes share this machine; all ranks ask."""
        return self.everyone(self.host).count(self.host)

    def from_first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns on the first rank; the others wait for as long as it takes."""
        value = work() if self.first else None
        self._wait_for("the first", self.first)
        return self.share(value)

    def first_on_host(self, work: Callable[[], T]) -> T:
        """``work`` on every rank; one on each host does it before the others begin."""
        if self.local:
            self._wait_for(f"host {self.host}", False)
            return work()
        value = work()
        self._wait_for(f"host {self.host}", True)
        return value

    def _wait_for(self, whom: str, it_is_me: bool) -> None:
        """Returns as soon as the one that is waited for calls this too; however long it takes."""
        if self.size == 1:
            return
        self._turns += 1
        key = f"turn {self._turns} of {whom}"
        with self._together():
            if it_is_me:
                self._store.set(key, "done")
                return
            while not self._store.check([key]):
                if self._store.check([_TOLD]):
                    raise self._lost()
                time.sleep(_POLL_SECONDS)

    def tells(self) -> bool:
        """Whether this is the one process that tells why the run ends. An error that all have in
        common is told once, and what follows from it on other ranks not at all."""
        if self.size == 1:
            return True
        with self._asking:
            asked, self._asked = self._asked, True
            if asked:
                return False
            try:
                teller = self._notes.compare_set(_TOLD, "", str(self.rank))
            except RuntimeError:  # the store is gone with the process that kept it
                return True
            return bool(teller == str(self.rank).encode())

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What collectives raise when a rank is lost, as a sentence."""
        try:
            with phase("exchange"):
                yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise self._lost() from error

    def _lost(self) -> QuantkitError:
        return QuantkitError(
            f"one of the {self.size} processes has ended, or does not answer any more",
            "run the same command again to go on from here, with as many processes as you like",
        )


ALONE = Ranks()


@cache
def join() -> Ranks:
    """This process among those that torchrun (or whoever sets the same variables) has started;
    ALONE if it was not started so. Raises QuantkitError when the others cannot be reached."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    except (RuntimeError, ValueError) as error:
        raise _unreachable(error, "start them with torchrun") from error
    local, host = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "GROUP_RANK"))
    return Ranks(rank, size, local, host, store)


def _unreachable(error: Exception, hint: str) -> QuantkitError:
    said = str(error).partition("\n")[0]
    return QuantkitError(f"the other processes cannot be reached ({said})", hint)


def _bundles(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Those that are sent together: small ones of one kind of device, which take their time because
    each is sent. What is sent together is in memory twice, so that large ones go alone."""
    bundles: list[list[Tensor]] = []
    room: dict[bool, int] = {}  # in the last one of each kind
    last: dict[bool, list[Tensor]] = {}
    for tensor in tensors:
        kind, size = tensor.is_cuda, tensor.nbytes
        if size >= _SMALL:
            bundles.append([tensor])
            continue
        if size > room.get(kind, -1):
            last[kind], room[kind] = [], _BUNDLE
            bundles.append(last[kind])
        last[kind].append(tensor)
        room[kind] -= size
    return bundles


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _buffer(message: bytes) -> Tensor:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8)


class _Packer(pickle.Pickler):
    """Sets tensors aside, and notes where they were, and how large."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        tensor = value.detach()
        self._tensors.append(tensor)
        return tensor.dtype, tuple(tensor.shape), tensor.is_cuda


class _Unpacker(pickle.Unpickler):
    """Makes room for the tensors."""

    def __init__(self, file: io.BytesIO, device: torch.device, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._device, self._tensors = device, tensors

    def persistent_load(self, note: Any) -> Tensor:
        dtype, shape, on_gpu = note
        tensor = torch.empty(shape, dtype=dtype, device=self._device if on_gpu else "cpu")
        self._tensors.append(tensor)
        return tensor


def _packed(value: object, tensors: list[Tensor]) -> bytes:
    file = io.BytesIO()
    _Packer(file, tensors).dump(value)
    return file.getvalue()


def _unpacked(message: bytes, device: torch.device, tensors: list[Tensor]) -> Any:
    return _Unpacker(io.BytesIO(message), device, tensors).load()
