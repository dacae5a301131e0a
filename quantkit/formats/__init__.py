"""On-disk formats: where the numbers of a QWeight lie in named tensors. Layout only.

A file of this folder is a format, and its name is the format's name (``compressed_tensors`` is
written ``compressed-tensors`` by users). All of them offer what ``Format`` lists. They never meet
each other: what converts between them is ``QWeight``. GGUF is a container of its own, see gguf.py.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from quantkit.core.checkpoint import TensorSpec
from quantkit.core.form import Form
from quantkit.core.qweight import QWeight, Scheme

# Asked in this order which linears are theirs.
SAFETENSORS = ("gptq", "awq", "compressed_tensors", "bnb", "mlx")
# gptq_v2 is gptq with another zero-point convention, and only ever a target
TARGETS = ("gptq", "gptq_v2", "awq", "compressed_tensors", "mlx")
CONFIG_FILES = ("quantize_config.json", "quant_config.json")

ReadJson = Callable[[str], dict[str, Any] | None]


class Tensors(Protocol):
    """Named tensors, as core.checkpoint.Checkpoint has them."""

    def __contains__(self, name: str) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...
    def spec(self, name: str) -> TensorSpec: ...
    def get(self, name: str) -> Tensor: ...


class Format(Protocol):
    """What every format file offers. ``prefix`` is a linear's name in files, ``config`` what the
    checkpoint says of its quantization (or {}); the tensors may know better, and then they win.
    A linear's bias is never a part of its packed tensors.

    FORM  what numbers it can hold
    """

    FORM: Form

    def linears(self, tensors: Tensors, config: Mapping[str, Any]) -> list[str]:
        """Prefixes of the packed linears, by names and shapes."""

    def names(self, tensors: Tensors, prefix: str) -> list[str]:
        """The tensors of a packed linear."""

    def describe(
        self, tensors: Tensors, prefix: str, config: Mapping[str, Any]
    ) -> tuple[int, int, Scheme]:
        """(out, in, scheme) of a linear from names and shapes alone, no data read. Raises
        QuantkitError, naming the linear, when they make no sense. Symmetric as declared."""

    def read(
        self, tensors: Tensors, prefix: str, config: Mapping[str, Any], codes: bool = True
    ) -> QWeight:
        """A linear; without ``codes`` those are :func:`unread`, which is quick. Raises
        QuantkitError, naming it, when its tensors do not fit together. Where every stored zero
        point is the midpoint, the weight is symmetric."""

    def refusal(self, out: int, width: int, scheme: Scheme) -> str | None:
        """Why a weight of this kind cannot be stored, as the end of a sentence; None if it can."""

    def specs(
        self, out: int, width: int, scheme: Scheme, scale: torch.dtype
    ) -> dict[str, TensorSpec]:
        """What ``pack`` will return, by suffix, for scales of the dtype ``scale``."""

    def pack(self, q: QWeight) -> dict[str, Tensor]:
        """The tensors of a linear by suffix. Never rounds: raises ValueError, with the reason, for
        numbers that the format cannot hold."""

    def configuration(
        self,
        scheme: Scheme,
        dense: list[str],
        by: str,
        *,
        own: Mapping[str, Scheme] | None = None,
        act_order: str | None = None,
        damp: float | None = None,
        lm_head: bool = False,
    ) -> dict[str, Any]:
        """Keys to set in config.json. ``dense`` names linears that were left as they were, ``by``
        who wrote the checkpoint, ``own`` all quantized linears with their schemes where these are
        not one and the same (only for a FORM that is ``mixed``). How columns were ordered
        (``group``: they are in groups of their own, g_idx) and the damping are written down where
        they are known and there is a key. ``lm_head``: the output head is quantized too."""

    def beside(self, config: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
        """Further JSON files of a checkpoint with this config.json, of the model ``name``."""


def unread(out: int, width: int) -> Tensor:
    """Codes that nobody looked at: all 0, in no memory."""
    return torch.zeros(1, 1, dtype=torch.uint8).expand(out, width)


def by_name(name: str) -> Format:
    """The format called ``name``."""
    return cast(Format, importlib.import_module(f"quantkit.formats.{name}"))


def declared(read_json: ReadJson) -> dict[str, Any]:
    """What the files of a checkpoint say of its quantization, {} for nothing. config.json goes
    first, then what older tools put beside it."""
    config = read_json("config.json") or {}
    found = config.get("quantization_config") or config.get("quantization")
    for file in CONFIG_FILES:
        found = found or read_json(file)
    return found if isinstance(found, dict) else {}
