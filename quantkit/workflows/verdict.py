"""What verify found, in quantkit.json and the model card of the folder that it is about."""

from math import isfinite
from pathlib import Path
from typing import Any

from quantkit.core import provenance
from quantkit.core.card_data import CARD
from quantkit.core.checkpoint import write_json, write_text
from quantkit.core.source import Source
from quantkit.workflows import card

# what is long, or about single places, stays in the report
_KEPT: tuple[str, ...] = ("against", "kl", "kl_error", "top1", "top5", "perplexity_ratio")
_KEPT += ("perplexity_ratio_error", "sets", "divergence", "nonfinite", "gate")


def write(found: dict[str, Any], source: Source, folder: Path, notes: list[str]) -> None:
    """Put the verdict (Verification.described) into ``folder``, where that is the whole model and
    quantkit made it. Each file is replaced at once; a card that somebody edited is left alone.
    What was not done, and would surprise, goes into ``notes``."""
    record = _own_record(source, folder)
    if record is None:
        return
    keys = ("rows", "seqlen", "texts", "dtype", "device", "versions")
    verdict = {key: found[key] for key in _KEPT}
    verdict["settings"] = {key: found["settings"][key] for key in keys}
    content = {**record, "verified": plain(verdict)}
    card_file = source.folder / CARD
    try:
        shown = card_file.read_text("utf-8") if card_file.is_file() else None
        write_json(source.folder / provenance.FILE, content)
        if shown is not None and card.is_ours(shown, record):
            write_text(card_file, card.model_card(content))
        elif shown is not None:
            notes.append(f"{CARD} is not as quantkit wrote it, so the verdict was not put there")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        notes.append(f"the verdict could not be written to {source.name} ({reason})")


def plain(value: Any) -> Any:
    """The same with null for what is no number, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _own_record(source: Source, folder: Path) -> dict[str, Any] | None:
    """quantkit.json, if ``folder`` is a quantized model that quantkit wrote."""
    downloaded = source.revision is not None
    if source.file or downloaded or source.folder != folder.expanduser():
        return None
    record = source.read_json(provenance.FILE) or {}
    versions = record.get("versions")
    ours = isinstance(versions, dict) and "quantkit" in versions
    return record if ours and ("method" in record or "conversion" in record) else None
