"""The YAML at the top of a model card, read and written by huggingface_hub's own classes."""

from pathlib import Path
from typing import Any

CARD = "README.md"
_INHERITED = ("license", "license_name", "license_link", "language")


def read(folder: Path) -> dict[str, Any]:
    """What the card in ``folder`` says of itself; {} when there is none, or it cannot be read."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(folder / CARD)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def inherited(folder: Path) -> dict[str, Any]:
    """What a quantized model takes over from the card of its original: licence and languages."""
    found = read(folder)
    return {key: found[key] for key in _INHERITED if _plain(found.get(key))}


def _plain(value: Any) -> bool:
    """A text or a list of texts, as anybody's card may or may not have."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(one, str) for one in value)
    return isinstance(value, str) and bool(value)


def front_matter(**content: Any) -> str:
    """The block between two lines of dashes; keys without a value are left out."""
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**content).to_yaml().strip()}\n---"
