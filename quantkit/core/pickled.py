"""Weights that were saved by ``torch.save``: ``pytorch_model.bin``, and the ``.pt`` files of old
GPTQ repositories. Such a file is a zip of one pickle and raw data:

    archive/data.pkl     {"name": rebuild a tensor from storage "0", offset, shape, strides}, ...
    archive/data/0       the bytes of storage "0", not compressed
    archive/data/1       ...

A pickle is a program. torch runs this one in its restricted interpreter (``weights_only``), and it
gets there only after a look at the program has shown that nothing is called but what a plain
dictionary of tensors needs: torch's own list is longer, and some of it allocates as much memory as
the file asks for. The data is mapped into memory, never read ahead.
"""

import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import QuantkitError

SUFFIXES = (".bin", ".pt")
_HINT = "get the model as safetensors, or load and save it with transformers where you trust it"
# Real programs have some 130 bytes a tensor. Looking through this much takes a few seconds.
_MAX_PROGRAM = 1 << 20
_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_PROTOCOL = 2
NO_MAP = "unable to mmap"  # torch's words for a file that the system does not map
_MAX_TUPLE = 64  # dimensions of a tensor, or arguments of a call
_MARK = object()
# as pickletools shows them: module, space, name
_CALLED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in _STORAGES),
}
# What torch's interpreter, written in Python, raises over nonsense.
_NONSENSE = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    EOFError,
    struct.error,
    OSError,
)


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of the file, on the CPU, backed by the file.

    Raises QuantkitError, naming the file, for everything that is not a dictionary of plain tensors
    as torch has saved it since 1.6.
    """
    reason = _objection(path)
    if reason:
        raise QuantkitError(f"{path} {reason}", _HINT)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _NONSENSE as error:
        if NO_MAP in str(error):
            raise QuantkitError(
                f"{path} is larger than this machine's memory, and the system does not map it",
                "get the model as safetensors, or allow it: sysctl vm.overcommit_memory=1",
            ) from error
        # torch's own words are no help: they say how to switch its protection off
        raise QuantkitError(
            f"{path} is damaged: torch cannot rebuild its tensors", _HINT
        ) from error
    if not isinstance(found, dict):
        raise QuantkitError(f"{path} holds a {type(found).__name__}, not named tensors", _HINT)
    for name, value in found.items():
        if not isinstance(name, str):  # never shown: it may be anything, of any length
            raise QuantkitError(f"{path} has a name that is a {type(name).__name__}", _HINT)
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise QuantkitError(
                f"{path} holds {name!r:.60}, a {kind}, besides named tensors", _HINT
            )
        if value.nbytes > value.untyped_storage().nbytes():
            raise QuantkitError(f"tensor {name!r:.60} of {path} is larger than its data", _HINT)
    return {name: value.detach() for name, value in found.items()}


def _objection(path: Path) -> str | None:
    """Why the file is not even handed to torch, as the end of a sentence."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
                return "is a compressed archive, which torch does not write"
            if sum(e.file_size for e in entries) > path.stat().st_size:
                return "claims to hold more than the whole file"
            programs = [e for e in entries if e.filename.rpartition("/")[2] == "data.pkl"]
            if len(programs) != 1:
                return "is a zip archive, but not one of torch.save"
            if programs[0].file_size > _MAX_PROGRAM:
                return f"has a pickle of {programs[0].file_size >> 20} MiB; quantkit reads 1 MiB"
            return _called(archive.read(programs[0]))
    except (LookupError, TypeError) as error:  # of _called, over a stack that is too short
        return f"is damaged ({type(error).__name__} in its pickle)"
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError) as error:
        return f"is truncated, or in the format of torch before 1.6 ({error})"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _called(program: bytes) -> str | None:
    """What the program does that a dictionary of tensors does not need.

    Nothing is run. A stack is kept that knows tuples alone, each as (length, depth): keys and
    arguments are made of them, and tuples in tuples take forever, or the whole stack of the
    process, to hash; a call with one argument may copy it, and a program can say so very often.
    """
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    builds = 0
    for operation, argument, _ in pickletools.genops(program):
        name = operation.name
        if name == "PROTO" and argument != _PROTOCOL:
            return f"is a pickle of protocol {argument}, and torch.save writes {_PROTOCOL}"
        if name in ("GLOBAL", "INST") and argument not in _CALLED:
            called = str(argument).replace(" ", ".")
            return (
                f"asks for {called:.80}, which plain tensors do not need and which could run code"
            )
        taken = _take(stack, operation.stack_before)
        if name == "REDUCE" and (taken[1] is None or taken[1][0] in (1, 2)):
            return "makes a call that rebuilds no tensor"
        builds += name == "BUILD"  # it copies, too; a state dict has its _metadata
        if "TUPLE" in name:
            depth = 1 + max((item[1] for item in taken if item), default=0)
            if depth > 2 or len(taken) > _MAX_TUPLE:
                return "has tuples that no state dict has"
            stack.append((len(taken), depth))
        elif "GET" in name:
            stack.append(memo[str(argument)])
        elif "PUT" in name:
            memo[str(argument)] = stack[-1]
        elif name == "MARK":
            stack.append(_MARK)
        else:
            stack.extend(None for _ in operation.stack_after)
        if builds > 1:
            return "changes objects that are no tensors"
    return None


def _take(stack: list[Any], wanted: list[pickletools.StackObject]) -> list[Any]:
    """Pops what an instruction works on: so many values, or all above the last mark (and then so
    many below it, which are of no interest)."""
    if pickletools.markobject in wanted:
        taken: list[Any] = []
        while (item := stack.pop()) is not _MARK:
            taken.append(item)
        below = wanted.index(pickletools.markobject)
        del stack[len(stack) - below :]
        return taken
    return [stack.pop() for _ in wanted][::-1]
