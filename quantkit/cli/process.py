"""What a quantkit process sets for itself, being nobody's guest. Measured on a 30M GPT-NeoX, 128 x
512 tokens, two cores: 36 s before, 32 s after (with hidden states kept in place)."""

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from quantkit.core import outside

# of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def prepare() -> None:
    """Settings for a process that imports much and then moves large tensors."""
    _calm_libraries()
    # Importing torch and transformers makes a million objects that stay; looking through them again
    # and again takes a quarter of the start.
    gc.set_threshold(100_000, 50, 100)
    _keep_memory()


def stoppable(say: Callable[[], None]) -> None:
    """Let Ctrl-C end the process at once, after ``say``, while libraries are imported for the first
    time: an import that is broken off leaves halves of modules behind, and some swallow it. From
    then on, and where something else has to be ended first, it is a KeyboardInterrupt, as
    always."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # a shell has it ignored, for a job in the background

    def interrupted(number: int, frame: FrameType | None) -> None:
        if _importing(frame) and not _imported() and not outside.begun:
            say()
            leave(130)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupted)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _imported() -> bool:
    """Whether the last of the large libraries is there."""
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def leave(code: int) -> NoReturn:
    """Exit without taking apart all that was imported, which takes half a second."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:  # there is none where it was closed
                stream.flush()
        except OSError:  # of what was written before, and is told
            code = code or 1
    os._exit(code)


def _calm_libraries() -> None:
    """Settings that libraries read when they are imported."""
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # torch: large tensors in pages of 2 MB, where the system has them on request (Linux's
        # default): fewer page faults, which were a quarter of a conversion's time
        "THP_MEM_ALLOC_ENABLE": "1",
    }.items():
        os.environ.setdefault(name, value)


def _keep_memory() -> None:
    """Let glibc reuse the memory of activations of some megabytes instead of asking the system for
    zeroed pages each time, and keep it in one heap."""
    _tune({_M_ARENA_MAX: 1, _M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 256 << 20})


def return_memory() -> None:
    """For a command whose threads handle tensors of all sizes: holes in the one heap were 100 MB of
    a conversion, and nothing was gained by them."""
    _tune({_M_MMAP_THRESHOLD: 4 << 20})


def _tune(settings: dict[int, int]) -> None:
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    for name, value in settings.items():
        mallopt(name, value)
