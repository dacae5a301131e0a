"""Command lines that click refuses, told like every other error: a sentence and a hint."""

import click

from quantkit.errors import UsageError


def told(error: click.ClickException, command: str) -> UsageError:
    """What is wrong with the arguments of ``command`` (``quantkit gptq``), and what to do."""
    near: list[str] = getattr(error, "possibilities", None) or []  # of what does not exist
    message = error.message if near else error.format_message()
    hint = f"did you mean {' or '.join(near)}?" if near else f"see '{command} --help'"
    return UsageError(f"{message[:1].lower()}{message[1:]}".rstrip("."), hint)
