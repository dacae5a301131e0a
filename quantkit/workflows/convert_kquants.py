"""GGUF's K types as a target of ``quantkit convert``: llama.cpp's own quantizer does the rounding.

The model goes into a plain GGUF file first, and from there through ``llama_model_quantize``, which
also decides which tensors get a better type (Q4_K_M keeps some in Q6_K). What that cost is measured
linear by linear on the result.
"""

import ctypes
from pathlib import Path

from torch import Tensor

from quantkit.core.progress import Progress
from quantkit.core.qweight import QWeight
from quantkit.core.source import Source
from quantkit.errors import QuantkitError
from quantkit.methods import fit
from quantkit.runtime.gguf_opened import GgufOpened
from quantkit.runtime.opened import Opened
from quantkit.workflows.convert_gguf import GgufTarget
from quantkit.workflows.convert_targets import Moved

# enum llama_ftype of llama.cpp's include/llama.h
TYPES = {
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
}


class KQuantTarget:
    """``kind`` is one of TYPES. The source may be plain weights, or codes that are rounded a second
    time."""

    requantizes = True

    def __init__(self, opened: Opened, kind: str, pre_tokenizer: str | None) -> None:
        self.opened, self.kind = opened, kind
        self.plain = GgufTarget(opened, "f32", False, pre_tokenizer)

    @property
    def nbytes(self) -> int:
        """Of both files; they are there together for a moment."""
        return self.plain.nbytes + self.plain.nbytes * 7 // 32

    def survey(self, progress: Progress) -> list[str]:
        _library()
        return self.plain.survey(progress)

    def begin(self, folder: Path, shard: int) -> bool:
        return self.plain.begin(folder, shard)

    def fitted(self, q: QWeight) -> fit.Fitted:
        return self.plain.fitted(q)

    def error(self, q: QWeight, fitted: QWeight) -> float:
        return self.plain.error(q, fitted)

    def put(self, prefix: str, q: QWeight) -> None:
        self.plain.put(prefix, q)

    def put_dense(self, name: str, tensor: Tensor) -> dict[str, Moved]:
        return self.plain.put_dense(name, tensor)

    def sync(self) -> None:
        self.plain.sync()

    def close(self, folder: Path, by: str) -> None:
        """Let llama.cpp quantize the plain file, and remove it."""
        self.plain.close(folder, by)
        library = _library()
        params = library.llama_model_quantize_default_params()
        params.ftype = TYPES[self.kind]
        plain, made = folder / self.plain.file, folder / self._file
        failed = library.llama_model_quantize(
            str(plain).encode(), str(made).encode(), ctypes.byref(params)
        )
        if failed:
            raise QuantkitError(
                f"llama.cpp could not quantize the model to {self.kind}",
                "its own messages above say why; rows must be multiples of 256",
            )
        plain.unlink()

    def abandon(self) -> None:
        self.plain.abandon()

    @property
    def _file(self) -> str:
        return f"{self.opened.source.short_name}-{self.kind}.gguf"

    def reopened(self, folder: Path) -> Opened:
        return GgufOpened(folder / self._file, Source(folder.name, folder, file=self._file))


def _library():  # type: ignore[no-untyped-def]  # llama_cpp has no stubs
    """llama.cpp's functions, silent but for errors."""
    try:
        import llama_cpp
    except ImportError as error:
        raise QuantkitError(
            "K types are written by llama.cpp, and llama-cpp-python is not installed",
            "pip install 'quantkit[llamacpp]', or choose gguf:q4_0, q4_1, q5_0, q5_1, q8_0",
        ) from error
    return llama_cpp
