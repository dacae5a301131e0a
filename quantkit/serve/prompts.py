"""Prompts of requests as token ids, beside the event loop where that takes long."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from quantkit.errors import QuantkitError
from quantkit.runtime.engine import Tokenizing
from quantkit.runtime.prompts import Prompts
from quantkit.runtime.templates import Message

_LONG = 4096  # characters: from here on encoding is left to a thread, the event loop goes on
T = TypeVar("T")


class Named(Tokenizing, Protocol):
    """A tokenizer that has a name for every token."""

    def piece(self, token: int) -> str:
        """The text of a token alone, special ones too; half a character is U+FFFD."""


class Vocabulary:
    """``tokenizer`` is the engine's own, or one of transformers' (runtime/tokenizer.py). ``size``:
    ids below it have an embedding. ``template``: as in runtime/prompts.py.

    Encoding takes place in one thread of its own, one text at a time."""

    def __init__(self, tokenizer: Named, size: int, template: str | None = None) -> None:
        self.tokenizer, self.size = tokenizer, size
        self._prompts = Prompts(self.tokenizer, template)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    @property
    def template(self) -> str | None:
        """The text of the template that chats are put into."""
        found = self._prompts.template
        return None if found is None else found.source

    @property
    def stop(self) -> tuple[str, ...]:
        """What ends the answer in a chat, by the template."""
        return self._prompts.stop

    async def encode(self, text: str) -> list[int]:
        """Ids as the model wants a text to begin."""
        return await self._run(len(text), lambda: self.tokenizer.encode(text))

    async def chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of ``messages`` in the template, up to where the answer begins. Raises QuantkitError
        when there is no template, or it refuses them."""
        if self._prompts.template is None:
            raise QuantkitError("this model has no chat template", "use /v1/completions")
        size = sum(len(message["content"]) for message in messages)
        return await self._run(size, lambda: self._prompts.ids(messages))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens; half a character at an end is U+FFFD."""
        return self.tokenizer.decode(ids)

    def piece(self, token: int) -> str:
        """The token alone, special ones by their name; half a character is U+FFFD."""
        return self.tokenizer.piece(token)

    def close(self) -> None:
        self._thread.shutdown()

    async def _run(self, characters: int, work: Callable[[], T]) -> T:
        if characters < _LONG:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
