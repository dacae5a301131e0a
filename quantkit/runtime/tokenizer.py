"""A model's tokenizer, through transformers."""

from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.core.source import Source
from quantkit.core.unicode import refuse_halves
from quantkit.errors import QuantkitError


def load_tokenizer(source: Source) -> Any:
    """The model's tokenizer. Raises QuantkitError when it has none."""
    from transformers import AutoTokenizer  # seconds, which only those pay who need it

    hint = "put tokenizer.json (or tokenizer.model) and tokenizer_config.json beside config.json"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise QuantkitError(
            f"{source.name} has no tokenizer that transformers can load "
            f"({(str(error) or type(error).__name__).splitlines()[0]})",
            hint,
        ) from error
    if not tokenizer.encode("a", add_special_tokens=False):
        # without files transformers makes one up that knows no words
        raise QuantkitError(f"{source.name} has no tokenizer", hint)
    return tokenizer


class Tokenizer:
    """``tokenizer``, one of transformers', as quantkit uses it: engine.Tokenizing."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    def chat_template(self) -> str | None:
        """The model's own chat template, the default one where there are several."""
        if not self.tokenizer.chat_template:
            return None
        found: str = self.tokenizer.get_chat_template()
        return found

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The tokenizer's special tokens as text."""
        found = self.tokenizer.special_tokens_map
        return {name: text for name, text in found.items() if isinstance(text, str)}

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of ``text``. Raises QuantkitError for halves of characters, which no tokenizer
        takes."""
        refuse_halves(text)
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=special)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens; half a character at an end is U+FFFD."""
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def piece(self, token: int) -> str:
        """The text of a token alone, special ones too; half a character is U+FFFD."""
        text: str = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text


def end_ids(own: Mapping[str, object], tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text, by the model's generation_config.json and its tokenizer."""
    said = own.get("eos_token_id")
    found = set(said) if isinstance(said, list) else {said}
    return frozenset(i for i in (*found, tokenizer.eos_token_id) if isinstance(i, int))
