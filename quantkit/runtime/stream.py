"""Text that appears while it is generated, in whole characters."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

_BROKEN = "\ufffd"


class Detokenizer:
    """Token ids in, new text out.

    A Japanese character is often several tokens; while one is incomplete, nothing is given out.
    Text is always decoded together with some tokens before it, since tokenizers treat the first
    token of a text in their own way.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # decoding starts here
        self._given = 0  # tokens before this one have been given out

    def push(self, token: int) -> str:
        """The text that this token completes, possibly none."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._given])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or now.endswith(_BROKEN):
            return ""
        self._start, self._given = self._given, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """What is left at the end; a character that was cut off is not shown."""
        before = self._decode(self._ids[self._start : self._given])
        now = self._decode(self._ids[self._start :])
        self._start = self._given = len(self._ids)
        return now[len(before) :].rstrip(_BROKEN)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class Streamer:
    """What ``model.generate(streamer=...)`` wants: passes new text on, leaves the prompt out."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._write = write
        self._prompt_seen = False

    def put(self, ids: Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in ids.reshape(-1).tolist():
            text = self._detokenizer.push(token)
            if text:
                self._write(text)

    def end(self) -> None:
        text = self._detokenizer.rest()
        if text:
            self._write(text)
