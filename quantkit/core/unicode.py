"""Texts that are none."""

from quantkit.errors import QuantkitError


def refuse_halves(text: str) -> None:
    """Raises QuantkitError for a text that is no Unicode, which no tokenizer takes: with halves of
    characters that JSON can spell, or what Python makes of bytes that are no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = text[:20].encode("utf-8", "replace").decode()
        raise QuantkitError(
            f"a text is no Unicode at character {error.start} ({shown!r}...)",
            "see that it is saved, or typed, as UTF-8",
        ) from error
