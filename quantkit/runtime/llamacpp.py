"""A GGUF file run by llama.cpp (the package llama-cpp-python, the extra ``llamacpp``).

    model = LlamaCpp(path)
    ids = model.encode("昔々")
    for token in model.stream(ids, Sampling(temperature=0), 100): ...

llama.cpp computes the logits; which token follows is decided by core/sampling.py, as everywhere.
Keys and values of the last text stay in memory: what a new one begins with alike is not computed
again, which makes the next turn of a chat cheap.
"""

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.core.gguf_file import GgufFile
from quantkit.core.prefix import shared
from quantkit.core.sampling import Sampler, Sampling
from quantkit.errors import QuantkitError, UsageError

CONTEXT = 4096  # tokens, unless more are asked for: memory for keys and values is taken at once
_BATCH = 512  # tokens that are computed together


def installed() -> bool:
    """Whether llama-cpp-python is there."""
    return find_spec("llama_cpp") is not None


def refuse_missing() -> None:
    """Raises QuantkitError where llama-cpp-python is not there."""
    if not installed():
        raise QuantkitError("llama-cpp-python is not installed", "pip install 'quantkit[llamacpp]'")


class LlamaCpp:
    """The model in the GGUF file ``path``. Its context is ``context`` tokens long, or what the
    model was trained with, at most CONTEXT; ``threads`` compute, or torch's number of them.

    Raises QuantkitError when llama-cpp-python is missing, when the file is corrupt, or when
    llama.cpp does not open it.
    """

    def __init__(
        self, path: Path | str, *, context: int | None = None, threads: int | None = None
    ) -> None:
        if context is not None and context < 1:
            raise UsageError(f"a context of {context} tokens holds nothing")
        refuse_missing()
        import llama_cpp

        self._api: Any = llama_cpp
        threads = threads or torch.get_num_threads()
        self.path = Path(path)
        metadata = GgufFile(
            self.path
        ).metadata  # says what is wrong with a file; llama.cpp does not
        trained = _trained_context(metadata)
        self.token_bytes = _token_bytes(metadata)
        try:
            self._llama: Any = llama_cpp.Llama(
                os.fspath(path),
                n_ctx=context or trained,
                n_batch=_BATCH,
                n_threads=threads,
                n_threads_batch=threads,
                verbose=False,
            )
        except ValueError as error:  # all that it raises, whatever is wrong
            raise QuantkitError(
                f"llama.cpp does not open {path}", "see what is in it: quantkit inspect"
            ) from error
        self.context: int = self._llama.n_ctx()
        self.vocabulary: int = self._llama.n_vocab()
        self._held: list[int] = []  # the tokens whose keys and values are in memory

    @property
    def chat_template(self) -> str | None:
        """The Jinja template in the file."""
        found: str | None = self._llama.metadata.get("tokenizer.chat_template")
        return found

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """``bos_token`` and ``eos_token`` as text, for chat templates; "" for what is not there."""
        ids = {"bos_token": self._llama.token_bos(), "eos_token": self._llama.token_eos()}
        return {name: self.piece(token) if token >= 0 else "" for name, token in ids.items()}

    @property
    def own_settings(self) -> Mapping[str, object]:
        """Nothing: GGUF has no place for what generation_config.json says."""
        return {}

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a text or a turn."""
        vocabulary = self._api.llama_model_get_vocab(self._llama.model)
        ends = self._api.llama_vocab_is_eog
        return frozenset(i for i in range(self.vocabulary) if ends(vocabulary, i))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of ``text``. With ``special``, as the model wants a text to begin (and end);
        names of special tokens in the text, as chat templates write them, are always these tokens.
        """
        found: list[int] = self._llama.tokenize(text.encode(), add_bos=special, special=True)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens; half a character at an end is U+FFFD."""
        pieces: bytes = self._llama.detokenize(list(ids))
        return pieces.decode("utf-8", "replace")

    def piece(self, token: int) -> str:
        """The text of a token alone, special ones too; half a character is U+FFFD."""
        piece: bytes = self._llama.detokenize([token], special=True)
        return piece.decode("utf-8", "replace")

    def logits(self, ids: Sequence[int]) -> Tensor:
        """float32 [tokens, vocab]: at each of ``ids``, what follows. Raises UsageError when they
        are none or more than the context holds."""
        self._forget(0)
        return self._computed(ids, every=True)

    def stream(self, ids: Sequence[int], sampling: Sampling, max_new_tokens: int) -> Iterator[int]:
        """Tokens that follow ``ids``, one by one: up to ``max_new_tokens``, up to the end of the
        context, or up to one of ``end_ids``, which is given out too."""
        sampler = Sampler(sampling, ids)
        self._forget(shared(self._held, ids[:-1]))
        logits = self._computed(ids[len(self._held) :], every=False)
        for count in range(1, max_new_tokens + 1):
            token = sampler.next(logits[0])
            yield token
            if token in self.end_ids or count == max_new_tokens or len(self._held) >= self.context:
                return
            logits = self._computed([token], every=False)

    def close(self) -> None:
        """Give the memory back."""
        self._llama.close()

    def _computed(self, ids: Sequence[int], every: bool) -> Tensor:
        """Run ``ids`` behind what is held -> logits at each of them, or at the last one alone."""
        if not ids:
            raise UsageError("there are no tokens to compute")
        if len(self._held) + len(ids) > self.context:
            raise UsageError(
                f"{len(self._held) + len(ids)} tokens do not fit into a context of {self.context}",
                "shorten the text, or load the model with a larger context",
            )
        found = []
        for start in range(0, len(ids), _BATCH):
            part = list(ids[start : start + _BATCH])
            batch = self._llama._batch
            batch.set_batch(part, len(self._held), logits_all=every)
            self._decode(batch)
            self._held += part
            if every:
                found.append(self._read(len(part)))
        return torch.cat(found) if every else self._read(1)

    def _decode(self, batch: Any) -> None:
        try:
            self._llama._ctx.decode(batch)
        except RuntimeError as error:
            self._forget(0)
            raise QuantkitError(f"llama.cpp failed to compute ({error})") from error

    def _read(self, rows: int) -> Tensor:
        """A copy of the last ``rows`` rows of logits."""
        parts = [self._api.llama_get_logits_ith(self._llama.ctx, row - rows) for row in range(rows)]
        kind = ctypes.c_float * self.vocabulary
        rows_of = [kind.from_address(ctypes.addressof(part.contents)) for part in parts]
        return torch.stack([torch.frombuffer(row, dtype=torch.float32) for row in rows_of])

    def _forget(self, keep: int) -> None:
        """Drop keys and values behind the first ``keep`` tokens; all of them where the model's
        state cannot be cut (recurrent ones)."""
        memory = self._api.llama_get_memory(self._llama.ctx)
        if keep and not self._api.llama_memory_seq_rm(memory, 0, keep, -1):
            keep = 0
        if not keep:
            self._api.llama_memory_clear(memory, True)
        del self._held[keep:]


def _trained_context(metadata: dict[str, Any]) -> int:
    """Tokens of a context that the model knows, at most CONTEXT."""
    trained = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return min(trained, CONTEXT) if isinstance(trained, int) and trained > 0 else CONTEXT


def _token_bytes(metadata: dict[str, Any]) -> int:
    """Memory for keys and values of a token: float16, unless llama.cpp is told otherwise."""
    kind = metadata.get("general.architecture")
    names = ("block_count", "attention.head_count", "embedding_length")
    blocks, heads, width = (metadata.get(f"{kind}.{name}") for name in names)
    shared = metadata.get(f"{kind}.attention.head_count_kv", heads)
    counts = [n for n in (blocks, heads, width, shared) if isinstance(n, int) and n > 0]
    if len(counts) < 4:
        return 0  # heads that differ by block: llama.cpp knows
    blocks, heads, width, shared = counts
    return 2 * 2 * blocks * shared * width // heads
