"""A model's tokenizer, through transformers."""

from typing import Any

from quantkit.core.source import Source
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
