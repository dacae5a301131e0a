"""What the tests of publishing share: folders here and there, and a Hub that refuses."""

import json
import re
from pathlib import Path

from hub_answers import Handler
from tools import read_json

REPO = "me/demo-gptq"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_attributes(hub, branch="main", name=REPO) -> dict[str, bytes]:
    found = dict(hub.repositories[name].files(branch))
    found.pop(".gitattributes", None)
    return found


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**read_json(path), **changes}), "utf-8")


def faults(path: str, status: int, message: str = "no"):
    """What a Hub answers ``instead``: it refuses to change anything where the pattern ``path``
    occurs."""

    def refuse(handler: Handler) -> bool:
        if not re.search(path, handler.path_) or handler.command in ("GET", "HEAD"):
            return False
        handler.refuse(status, "", message)
        return True

    return refuse
