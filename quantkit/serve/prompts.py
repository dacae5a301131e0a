"""Text to token ids and back, with a model's own tokenizer and chat template."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError

from quantkit.errors import QuantkitError

_LONG = 4096  # characters: from here on encoding is left to a thread, the event loop goes on
T = TypeVar("T")


class Vocabulary:
    """``tokenizer`` is one of transformers'. ``size``: ids below it have an embedding.

    Encoding takes place in one thread of its own, one text at a time."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    @property
    def template(self) -> str | None:
        found: str | None = self.tokenizer.chat_template
        return found or None

    async def encode(self, text: str) -> list[int]:
        """Ids as the model wants a text to begin."""
        return await self._run(len(text), lambda: list(self.tokenizer.encode(text)))

    async def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of ``messages`` in the chat template, up to where the answer begins. Raises
        QuantkitError when the model has no template, or the template refuses them."""
        if self.template is None:
            raise QuantkitError("this model has no chat template", "use /v1/completions")
        size = sum(len(message["content"]) for message in messages)
        return await self._run(size, lambda: self._rendered(messages))

    def piece(self, token: int) -> str:
        """The token alone, special ones by their name; half a character is U+FFFD."""
        text: str = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text

    def close(self) -> None:
        self._thread.shutdown()

    def _rendered(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise QuantkitError(f"the model's chat template refuses this ({error})") from error
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    async def _run(self, characters: int, work: Callable[[], T]) -> T:
        if characters < _LONG:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
