"""A model's tokenizer, through transformers."""

from typing import Any

from transformers import AutoTokenizer

from quantkit.core.source import Source
from quantkit.errors import QuantkitError


def load_tokenizer(source: Source) -> Any:
    """The model's tokenizer. Raises QuantkitError when it has none."""
    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise QuantkitError(
            f"{source.name} has no tokenizer that transformers can load "
            f"({str(error).splitlines()[0]})",
            "put tokenizer.json (or tokenizer.model) and tokenizer_config.json beside config.json",
        ) from error
