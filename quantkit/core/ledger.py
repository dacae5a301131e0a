"""What an interrupted run has finished, so that the same command can go on.

The ledger lives in the unfinished output folder. It holds a fingerprint of everything that decides
the output's bytes, and the report of every finished part; it is replaced atomically, after the
part's tensors are synced.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantkit.core.checkpoint import write_json
from quantkit.errors import UsageError

FILE = "ledger.json"
_DIGEST = re.compile(r"[0-9a-f]{40,}")


class Ledger:
    """Opens the ledger of ``folder`` or starts one. Raises UsageError, naming what differs, when
    the folder was begun with another fingerprint, or its ledger is damaged."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self._path = folder / FILE
        self._done: dict[str, Any] = {}
        # compared as they are stored
        self._fingerprint = json.loads(json.dumps(fingerprint))
        if self._path.exists():
            self._continue(folder)
        else:
            self._save()

    def _continue(self, folder: Path) -> None:
        stored = self._stored()
        before, now = stored["fingerprint"], self._fingerprint
        different = [
            _told(key, before.get(key), now.get(key))
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if different:
            raise UsageError(
                f"{folder} holds an unfinished run with other settings: {'; '.join(different)}",
                "repeat the earlier command to finish it, or start over with --overwrite",
            )
        self._done = stored["done"]

    def _stored(self) -> dict[str, dict[str, Any]]:
        try:
            stored = json.loads(self._path.read_text("utf-8"))
            parts = stored["fingerprint"], stored["done"]
            if not all(isinstance(part, dict) for part in parts):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{self._path} is damaged, so that nobody knows what was finished",
                "start over with --overwrite",
            ) from error
        found: dict[str, dict[str, Any]] = stored
        return found

    def __contains__(self, part: str) -> bool:
        return part in self._done

    def __len__(self) -> int:
        return len(self._done)

    def __iter__(self) -> Iterator[str]:
        return iter(self._done)

    def report(self, part: str) -> Any:
        """What was recorded about a finished part."""
        return self._done[part]

    def finish(self, part: str, report: Any) -> None:
        """Record that a part is done. Its data must already be on the disk."""
        self._done[part] = report
        self._save()

    def forget(self) -> None:
        """Nothing is done, after all."""
        self._done = {}
        self._save()

    def remove(self) -> None:
        """The run is complete; forget the ledger."""
        self._path.unlink()

    def _save(self) -> None:
        write_json(self._path, {"fingerprint": self._fingerprint, "done": self._done})


def _told(key: str, before: Any, now: Any) -> str:
    """How a setting differs; a digest says nothing to people."""
    if all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (before, now)):
        return f"{key} is another"
    return f"{key} was {before}, is now {now}"
