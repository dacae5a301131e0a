"""Several processes in a test, as torchrun would start them: forks of this one, that has imported
everything already, with gloo between them."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from quantkit.runtime import ranks

_SECONDS = 120


class Started:
    """``size`` processes that each call ``work(rank)``. What they print is in ``folder``, a file
    for each and stream."""

    def __init__(self, size: int, work: Callable[[int], Any], folder: Path) -> None:
        self.folder = folder
        fork = multiprocessing.get_context("fork")
        self._pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = fork.Pipe()
            process = fork.Process(target=_begin, args=(rank, size, work, theirs, folder))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)
        # as torchrun does, so that it outlives whoever is lost; and not before the last fork, since
        # what its threads hold locked then would stay locked in the child
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for pipe in self._pipes:
            pipe.send(self._store.port)

    def kill(self, rank: int) -> None:
        os.kill(self.processes[rank].pid, signal.SIGKILL)

    def wait(self, seconds: float = _SECONDS) -> list[int]:
        """Exit codes. What has not ended by then is ended, and its code is that of SIGKILL."""
        self.results = [_received(pipe, seconds) for pipe in self._pipes]
        for process in self.processes:
            process.join(seconds)
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    def said(self, stream: str = "err") -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"*.{stream}")))


def together(size: int, work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What ``work(rank)`` returns in each of ``size`` processes."""
    started = Started(size, work, folder)
    codes = started.wait()
    assert codes == [0] * size, started.said()
    return started.results


def _received(pipe: Any, seconds: float) -> Any:
    if pipe.poll(seconds):
        with contextlib.suppress(EOFError):
            return pickle.loads(pipe.recv_bytes())
    return None


def _begin(rank: int, size: int, work: Callable[[int], Any], pipe: Any, folder: Path) -> None:
    port = pipe.recv()
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{stream}", os.O_CREAT | os.O_WRONLY), number)
    # not what pytest has put in their places
    sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    ranks.join.cache_clear()
    # the first use of torch's pool of threads after a fork makes it anew; of two threads that come
    # to it at once, one finds none ("Invalid thread pool")
    torch.set_num_threads(torch.get_num_threads())
    code = 1
    try:
        # as bytes: torch would send a handle to memory that ends with this process
        pipe.send_bytes(pickle.dumps(work(rank)))
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
