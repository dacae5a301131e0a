"""GGUF's K types as a target of ``quantkit convert``: llama.cpp's own quantizer does the rounding.

The model goes into a plain GGUF file first, and from there through ``llama_model_quantize``, which
also decides which tensors get a better type (Q4_K_M keeps some in Q6_K). What that cost is measured
linear by linear on the result.
"""

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from quantkit.core.progress import Progress
from quantkit.core.qweight import QWeight
from quantkit.core.source import Source
from quantkit.errors import QuantkitError
from quantkit.formats import gguf
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
# fields of llama_model_quantize_params
_FIELDS = {"token_embd.weight": "token_embedding_type", "output.weight": "output_tensor_type"}


class KQuantTarget:
    """``kind`` is one of TYPES. The source may be plain weights, or codes that are rounded a second
    time.

    types       of embedding and head (token_embd.weight, output.weight), where llama.cpp should not
                choose them itself
    importance  mean square of every input of a tensor, float32 [in], by names in GGUF: llama.cpp
                rounds with these weights
    """

    requantizes = True

    def __init__(
        self,
        opened: Opened,
        kind: str,
        pre_tokenizer: str | None,
        types: Mapping[str, str] | None = None,
        importance: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.opened, self.kind = opened, kind
        self.types, self.importance = dict(types or {}), dict(importance or {})
        self.plain = GgufTarget(opened, "f32", False, pre_tokenizer)

    @property
    def nbytes(self) -> int:
        """Of both files; they are there together for a moment."""
        plain = self.plain.nbytes
        return plain + plain * 7 // 32

    def survey(self, progress: Progress) -> list[str]:
        library = _library()
        if self.importance and not hasattr(library, "llama_model_imatrix_data"):
            raise QuantkitError(
                "this llama-cpp-python takes no importance matrix from other programs",
                "install 0.3.36 or newer, or use --calib none",
            )
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
        for name, field in _FIELDS.items():
            if name in self.types:
                setattr(params, field, gguf.TYPES[self.types[name]].id)
        held = _importance(library, self.importance)  # has to outlive the call
        if held:
            params.imatrix = held
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


def _importance(library: Any, matrix: Mapping[str, Tensor]) -> Any:
    """An array of llama.cpp's ``llama_model_imatrix_data``, ended by one without a name; None for
    an empty matrix."""
    if not matrix:
        return None
    entry = library.llama_model_imatrix_data
    entries = (entry * (len(matrix) + 1))()
    for place, (name, values) in zip(entries, matrix.items()):
        numbers = (ctypes.c_float * len(values))(*values.tolist())
        place.name, place.size = name.encode(), len(values)
        place.data = ctypes.cast(numbers, ctypes.POINTER(ctypes.c_float))
    return entries


def _library() -> Any:
    """llama.cpp's functions, silent but for errors; the package has no stubs."""
    try:
        import llama_cpp
    except ImportError as error:
        raise QuantkitError(
            "K types are written by llama.cpp, and llama-cpp-python is not installed",
            "pip install 'quantkit[llamacpp]', or choose a type that quantkit rounds itself: q4_0, "
            "q4_1, q5_0, q5_1, q8_0",
        ) from error
    return llama_cpp
