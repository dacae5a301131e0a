"""The command line as one of several processes that ``torchrun`` has started (runtime/ranks.py).

People hear from one of them: the first one shows progress, results and warnings; why a run ends is
told by whichever comes to know it first. Where no process has told anything, torchrun is ending all
of them because one is gone; then the first that it asks to stop says so.
"""

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from quantkit.errors import QuantkitError, UsageError

if TYPE_CHECKING:
    from quantkit.runtime.ranks import Ranks

_COMMANDS = ("gptq", "awq")
_PATIENCE = 5.0  # seconds that a process has to stop by itself on Ctrl-C
_AGAIN = "run the same command again to go on from here, with as many processes as you like"
_ranks: "Ranks | None" = None

Say = Callable[[str, str | None], None]


def begin(arguments: list[str], say: Say) -> None:
    """Join the other processes, if there are any. Ends in SystemExit when they cannot be reached,
    or when the command is none that several processes can share."""
    global _ranks
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    from quantkit.runtime.ranks import join

    try:
        _ranks = join()
        if not _ranks.first:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
            warnings.simplefilter("ignore")
        _watch(say)
        command = next((word for word in arguments if not word.startswith("-")), None)
        if command is not None and command not in _COMMANDS:
            raise UsageError(
                f"'quantkit {command}' does not share its work among {_ranks.size} processes",
                f"start it without torchrun; {' and '.join(_COMMANDS)} can be started with it",
            )
    except QuantkitError as error:
        say(error.message, error.hint)
        sys.exit(error.exit_code)


def tells() -> bool:
    """Whether this process tells why it ends."""
    return _ranks is None or _ranks.tells()


def _watch(say: Say) -> None:
    """Answer SIGTERM at once, and Ctrl-C after a while, also when a call into the GPU's libraries
    does not return any more: Python's own handlers run between two lines of the main thread."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def answer() -> None:
        while True:
            number = os.read(reading, 1)[0]
            if number == signal.SIGTERM:
                say("one of the processes has ended, or was told to", _AGAIN)
                os._exit(1)
            if number == signal.SIGINT:
                time.sleep(_PATIENCE)
                os._exit(130)

    threading.Thread(target=answer, name="signals", daemon=True).start()
