"""Where a model comes from: the demo, a folder, a file, or a repository on the Hub."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit import data
from quantkit.core.checkpoint import read_json
from quantkit.core.gguf_file import looks_like_one
from quantkit.core.pull import pull
from quantkit.core.ranges import Remote
from quantkit.errors import QuantkitError, UsageError

DEMO = "demo"
_REPOSITORY = re.compile(
    r"([\w][\w.-]*(?:/[\w][\w.-]*)?)(/\w[^@]*\.(?:gguf|safetensors))?(@[\w./-]+)?"
)
_FILES = (".gguf", ".safetensors")  # that may be named in the place of a folder


@dataclass(frozen=True)
class Source:
    """A model that is now on this machine.

    name      what to call it in reports: ``demo``, the repository, or the folder's own name (never
              a path, since it is published)
    folder    where the files are
    revision  the commit, for a repository
    file      the weight file, where one was named (``model-Q4_0.gguf``)
    remote    weight files that are still on the Hub, by name (``low_disk``)
    """

    name: str
    folder: Path
    revision: str | None = None
    file: str | None = None
    remote: Mapping[str, Remote] = field(default_factory=dict)

    @property
    def short_name(self) -> str:
        """The name without an owner."""
        return self.name.rpartition("/")[2]

    def read_json(self, file: str) -> dict[str, Any] | None:
        """A JSON file of the model, or None when it has none of that name."""
        path = self.folder / file
        try:
            if not path.exists():
                return None
            content = read_json(path)
        except OSError as error:
            raise QuantkitError(
                f"{path} cannot be read ({error.strerror})", "see whose file it is"
            ) from error
        except ValueError as error:
            raise QuantkitError(f"{path} is not readable JSON ({error})") from error
        if not isinstance(content, dict):
            raise QuantkitError(f"{path} should hold one JSON object")
        return content


def resolve(
    model: str,
    revision: str | None = None,
    model_basename: str | None = None,
    *,
    low_disk: bool = False,
    no_weights: bool = False,
) -> Source:
    """Find ``model`` and fetch it if need be: ``demo``, a folder, a .gguf or .safetensors file,
    ``owner/name``, ``owner/name@revision`` or ``owner/name/FILE.gguf``.

    ``model_basename`` chooses among the weight files of a repository; ``low_disk`` leaves them
    there, to be read tensor by tensor, ``no_weights`` leaves whatever they are. Raises
    QuantkitError when there is no such model."""
    if model == DEMO:
        _only_of_repositories(model, revision, low_disk)
        return Source(DEMO, data.demo())
    try:
        path = Path(model).expanduser()
        if path.exists():
            _only_of_repositories(model, revision, low_disk)
        if path.is_dir():
            return Source(path.resolve().name, path)
        is_file = path.exists()
    except (OSError, RuntimeError):  # a name too long for this system, a user that it does not know
        is_file = False
    if is_file and (path.suffix in _FILES or looks_like_one(path)):
        return Source(path.stem, path.parent, file=path.name)
    if is_file:
        raise QuantkitError(
            f"{model} is a file, not a model's folder", "give the folder that holds config.json"
        )
    asked = _REPOSITORY.fullmatch(model)
    if not asked:
        raise _no_folder(model)
    repository, named, tag = asked[1], asked[2], asked[3]
    _check_name(repository)
    at = revision or (tag[1:] if tag else None)
    found = pull(repository, at, named and named[1:], model_basename, low_disk, no_weights)
    return Source(repository, found.folder, found.commit, found.file, found.remote)


def _check_name(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise _no_folder(repository) from error


def _only_of_repositories(model: str, revision: str | None, low_disk: bool) -> None:
    if low_disk:
        raise UsageError(f"{model} is on this disk already", "leave out --low-disk")
    if revision is not None:
        raise UsageError(f"{model} is on this machine and has no revisions", "leave out --revision")


def _no_folder(model: str) -> QuantkitError:
    return QuantkitError(
        f"there is no folder {model}",
        "give a folder, a Hub repository such as owner/name, or 'demo'",
    )
