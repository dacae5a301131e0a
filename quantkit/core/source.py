"""Where a model comes from: the demo, a folder, or a repository on the Hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import data
from quantkit.core.checkpoint import read_json
from quantkit.core.gguf_file import looks_like_one
from quantkit.errors import QuantkitError, UsageError

DEMO = "demo"
_REPOSITORY = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?(@[\w./-]+)?")
# everything that is needed to run or quantize a model, and no pickles
_WANTED = ["*.safetensors", "*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja"]
_WANTED += ["LICENSE*", "NOTICE*"]
_FILES = (".gguf", ".safetensors")  # that may be named in the place of a folder


@dataclass(frozen=True)
class Source:
    """A model that is now on this machine.

    name      what to call it in reports: ``demo``, the repository, or the folder's own name (never
              a path, since it is published)
    folder    where the files are
    revision  the commit, for a repository
    file      the weight file, where one was named (``model-Q4_0.gguf``)
    """

    name: str
    folder: Path
    revision: str | None = None
    file: str | None = None

    @property
    def short_name(self) -> str:
        """The name without an owner."""
        return self.name.rpartition("/")[2]

    def read_json(self, file: str) -> dict[str, Any] | None:
        """A JSON file of the model, or None when it has none of that name."""
        path = self.folder / file
        if not path.exists():
            return None
        try:
            content = read_json(path)
        except ValueError as error:
            raise QuantkitError(f"{path} is not readable JSON ({error})") from error
        if not isinstance(content, dict):
            raise QuantkitError(f"{path} should hold one JSON object")
        return content


def resolve(model: str, revision: str | None = None) -> Source:
    """Find ``model`` and fetch it if need be: ``demo``, a folder, ``owner/name`` or
    ``owner/name@revision``. Raises QuantkitError when there is no such model."""
    if model == DEMO:
        _no_revision(model, revision)
        return Source(DEMO, data.demo())
    try:
        path = Path(model).expanduser()
        if path.exists():
            _no_revision(model, revision)
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
    if not _REPOSITORY.fullmatch(model):
        raise _no_folder(model)
    repository, _, tag = model.partition("@")
    return _from_hub(repository, revision or tag or None)


def _no_revision(model: str, revision: str | None) -> None:
    if revision is not None:
        raise UsageError(f"{model} is on this machine and has no revisions", "leave out --revision")


def _no_folder(model: str) -> QuantkitError:
    return QuantkitError(
        f"there is no folder {model}",
        "give a folder, a Hub repository such as owner/name, or 'demo'",
    )


def _from_hub(repository: str, revision: str | None) -> Source:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = Path(
            huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=_WANTED)
        )
    except errors.HFValidationError as error:
        raise _no_folder(repository) from error  # no repository can have such a name
    except errors.GatedRepoError as error:
        raise QuantkitError(
            f"{repository} is gated, and you have no access to it with the current token",
            "accept its terms on its Hub page, then run 'hf auth login'",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise QuantkitError(
            f"{repository} has no revision '{revision}'", "see the branches on its Hub page"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise QuantkitError(
            f"there is no folder {repository} here, and no such repository on the Hub",
            "check the spelling; for a private repository run 'hf auth login'",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise QuantkitError(
            f"there is no folder {repository} here, and the Hub cannot be reached",
            "check the path or the network (and HF_HUB_OFFLINE)",
        ) from error
    except (errors.HTTPError, OSError) as error:  # the former: a connection that broke, too
        raise QuantkitError(
            f"downloading {repository} failed ({error})", "run the same command again to continue"
        ) from error
    return Source(repository, folder, folder.name)
