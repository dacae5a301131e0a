"""The output folder of a quantization: unfinished under OUT.partial, complete under OUT, never
anything in between."""

import errno
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from quantkit.core import ledger, provenance
from quantkit.core.checkpoint import sync_folder
from quantkit.core.source import DEMO, Source
from quantkit.errors import QuantkitError, UsageError

# what a model's folder holds beside config.json and weights, and what loaders will look for
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
    "NOTICE*",
)
_OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
CHOICE = "choice.json"  # see budget.py
_LOCK = "lock"  # in the partial folder; the system lets go of it when a process ends, however
_LEFT = (CHOICE, _LOCK, ledger.FILE)  # in the folder when it gets its name
_FILES = (".gguf", ".safetensors", ".bin", ".pt")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE: tuple[int, ...] = (errno.EACCES, errno.EROFS, errno.EPERM)
_UNWRITABLE += (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
_LOST = (errno.EIO, errno.ENOENT, errno.ESTALE)
_SLACK = 64 << 20  # for the small files, and so that the disk is not filled to the last byte


class Output:
    """``folder`` is where the result will be, ``partial`` where it is being made.

    Raises UsageError when ``folder`` exists and may not be replaced: without ``overwrite``, or when
    it is not something that quantkit wrote. ``option`` is how people name the folder.
    """

    def __init__(self, folder: Path, overwrite: bool, option: str = "--out") -> None:
        another = f"choose another {option}"
        if folder.name in ("", ".."):
            raise UsageError(f"{folder} is not a name for a new folder", another)
        if str(folder) == DEMO:
            raise UsageError(
                f"a folder called {DEMO} could not be named: that is the bundled model", another
            )
        if folder.suffix.lower() in _FILES and not folder.exists():
            raise UsageError(
                f"{folder} would be a folder, and is called like a file",
                f"leave out the {folder.suffix}: the file in the folder gets a name of its own",
            )
        if folder.is_symlink():  # what it leads to is replaced, and the link stays
            if not folder.exists():
                raise UsageError(f"{folder} is a link that leads nowhere", another)
            folder = folder.resolve()
        self.folder = folder
        self.partial = folder.with_name(folder.name + ".partial")
        # a name that nobody gives a folder of their own, as they do with ``.old``: it is removed
        self._replaced = folder.with_name(folder.name + ".partial.old")
        self.overwrite = overwrite
        self._lock: IO[bytes] | None = None
        self._option = option
        self._check_free()

    def _check_free(self) -> None:
        folder, another = self.folder, f"choose another {self._option}"
        with disk_errors(folder):
            if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
                return
            ours = folder.is_dir() and (folder / provenance.FILE).exists()
            if ours:
                # a run that was killed in its very last step left these behind
                for name in _LEFT:
                    (folder / name).unlink(missing_ok=True)
        if not ours:
            raise UsageError(
                f"{folder} already exists, and was not written by quantkit",
                f"it is not overwritten in any case; {another}",
            )
        if not self.overwrite:
            replacing = ", or use --overwrite" if self._option == "--out" else ""
            raise UsageError(f"{folder} already exists", another + replacing)

    def keep_apart(self, source: Source) -> None:
        """Raises UsageError when the result, or what is made on the way to it, would take the place
        of the model that is read, or of files that no run of quantkit has begun."""
        read = source.folder.resolve()
        if read.is_relative_to(self.scratch.resolve()):
            return  # made on the way, by this run (gguf.py)
        for taken in (self.folder, self.partial, self._replaced):
            if read.is_relative_to(taken.resolve()):
                raise UsageError(
                    f"{taken} holds the model that is read, and would be replaced",
                    "choose another --out",
                )
        if self._foreign():
            raise UsageError(
                f"{self.partial}, where the result is made, holds something else",
                "choose another --out",
            )

    def _foreign(self) -> bool:
        """Whether the partial folder holds what no run has left there: all of them begin with a
        ledger, behind what a target leaves (budget.py)."""
        with disk_errors(self.folder):
            if not self.partial.is_dir():
                return False
            names = {path.name for path in self.partial.iterdir() if path.suffix != ".tmp"}
        return ledger.FILE not in names and not names <= {CHOICE, _LOCK, self.scratch.name}

    def check_space(self, needed: int) -> None:
        """Raises QuantkitError when ``needed`` bytes do not fit on the disk."""
        parent = next(p for p in self.folder.absolute().parents if p.exists())
        kept = [*self.partial.glob("*.safetensors"), *self.partial.glob("*.gguf")]
        held = sum(f.stat().st_blocks * 512 for f in kept)
        free = shutil.disk_usage(parent).free + held
        if free < needed + _SLACK:
            raise QuantkitError(
                f"the output needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
                "make room, or choose an --out on another disk",
            )

    def begin(self) -> None:
        """Make the partial folder, or tidy up the one of an interrupted run. Raises QuantkitError
        while another one is at work there."""
        self.partial.mkdir(parents=True, exist_ok=True)
        self._claim()
        for leftover in self.partial.glob("*.tmp"):
            leftover.unlink()

    def discard(self) -> None:
        """Remove what an earlier run left unfinished. Raises QuantkitError while one is at work."""
        if self.partial.exists():
            self._claim()
            shutil.rmtree(self.partial)

    def _claim(self) -> None:
        """Keep other processes out of the partial folder, until this one ends; where the disk knows
        of no locks (some that lie in a network), as before: nobody is kept out."""
        if sys.platform == "win32":
            return
        import fcntl

        if self._lock is not None:
            self._lock.close()
        self._lock = (self.partial / _LOCK).open("wb")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return
            raise QuantkitError(
                f"another run is at work in {self.partial}",
                "wait until it ends, or choose another --out",
            ) from error

    def copy_companions(self, source: Source) -> None:
        """Tokenizer, generation settings, chat template and licence, as they are."""
        for path in companions(source):
            temporary = self.partial / (path.name + ".tmp")
            try:
                shutil.copyfile(path, temporary)
            except OSError as error:
                if error.filename != str(path) or error.errno in _FULL:  # it names the source
                    raise
                raise QuantkitError(
                    f"{path} cannot be read ({error.strerror})",
                    "make it readable, then run the same command again; it will go on from here",
                ) from error
            temporary.replace(self.partial / path.name)

    @property
    def scratch(self) -> Path:
        """For what is only needed on the way, in the partial folder."""
        return self.partial / "scratch"

    def complete(self) -> None:
        """The partial folder becomes the result, in one step. Raises QuantkitError when somebody
        has put something else in its place meanwhile."""
        try:
            self._check_free()
        except UsageError as error:
            raise QuantkitError(
                f"something came to be at {self.folder} meanwhile, which is not replaced",
                "move it away, then run the same command again; it will end at once",
            ) from error
        shutil.rmtree(self.scratch, ignore_errors=True)
        sync_folder(self.partial)
        if self.folder.exists():
            shutil.rmtree(self._replaced, ignore_errors=True)
            self.folder.rename(self._replaced)
        self.partial.rename(self.folder)
        sync_folder(self.folder.absolute().parent)
        shutil.rmtree(self._replaced, ignore_errors=True)
        for name in _LEFT:
            (self.folder / name).unlink(missing_ok=True)


def companions(source: Source) -> list[Path]:
    """The files that :meth:`Output.copy_companions` copies. Raises QuantkitError for those that
    cannot be, or would be in the way of readers."""
    found = [path for pattern in _COMPANIONS for path in source.folder.glob(pattern)]
    for path in found:
        if not path.exists():
            raise QuantkitError(f"{path} is a link that leads nowhere", "download the model again")
        if path.name in _OBJECTS:
            source.read_json(path.name)
    return [path for path in found if path.is_file()]


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """What may be wrong with a disk, as a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise QuantkitError(
                f"the disk is full while writing {folder}",
                "make room, then run the same command again; it will go on from here",
            ) from error
        if error.errno in _UNWRITABLE:
            raise QuantkitError(
                f"{error.filename or folder} cannot be written ({error.strerror})",
                "choose another --out",
            ) from error
        if error.errno == errno.EFBIG:
            raise QuantkitError(
                f"the disk of {folder} does not take files so large",
                "choose an --out on another disk, or a smaller --max-shard-size",
            ) from error
        if error.errno in _LOST:
            raise QuantkitError(
                f"{error.filename or folder} was lost on the way ({error.strerror})",
                "see that the disk is sound and nobody else uses the folder, then run the same "
                "command again",
            ) from error
        raise
