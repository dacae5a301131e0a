"""The Hub, as far as both directions need it: what a repository holds, patience, and its errors as
sentences.

Everything goes through huggingface_hub, which is imported when it is first needed.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from quantkit.errors import QuantkitError

T = TypeVar("T")
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between attempts
_LATER = (408, 429, 500, 502, 503, 504)
_TOKEN = re.compile(r"hf_\w{8,}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SHA1, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """A file of a repository. size in bytes; ``sha256`` of a large file, as far as it is known;
    ``blob`` git's own hash of it (of the pointer, for a large one)."""

    size: int
    sha256: str | None
    blob: str


def entries(api: Any, repository: str, commit: str) -> dict[str, Entry]:
    """Every file of a commit, by its path. Raises QuantkitError for a listing that cannot be true:
    its paths and hashes become names of files here, and its sizes are relied upon."""
    from huggingface_hub.hf_api import RepoFile

    try:
        found = patiently(
            lambda: list(api.list_repo_tree(repository, revision=commit, recursive=True))
        )
        return {file.path: _entry(file) for file in found if isinstance(file, RepoFile)}
    except (KeyError, TypeError, ValueError) as error:
        raise QuantkitError(
            f"what the Hub lists of {repository} cannot be right ({short(error)})",
            "do not use this repository, or see whether HF_ENDPOINT or a proxy leads elsewhere",
        ) from error


def _entry(file: Any) -> Entry:
    """Raises TypeError or ValueError when it is none."""
    if not is_path(file.path):
        raise ValueError(f"the path {file.path!r}")
    if not isinstance(file.size, int) or file.size < 0:
        raise ValueError(f"the size of {file.path}")
    sha256 = file.lfs and file.lfs.sha256
    if not _SHA1.fullmatch(file.blob_id) or (file.lfs and not _SHA256.fullmatch(sha256)):
        raise ValueError(f"the hash of {file.path}")
    return Entry(file.size, sha256, file.blob_id)


def unsound() -> type[Exception]:
    """What transformers raises for a config.json with fields of the wrong kind, or that contradict
    each other: its configurations are checked by huggingface_hub."""
    from huggingface_hub.errors import StrictDataclassError

    error: type[Exception] = StrictDataclassError
    return error


def is_path(text: str) -> bool:
    """Whether it can be the path of a file in a repository: relative, and fit to be shown."""
    return not _CONTROL.search(text) and not {"", ".", ".."} & set(text.split("/"))


def patiently(call: Callable[[], T]) -> T:
    """What ``call`` returns; tried again when the Hub is busy or a connection breaks. A Hub that
    cannot be reached at all is not waited for."""
    from huggingface_hub import errors

    for wait in WAITS:
        try:
            return call()
        except (errors.HTTPError, OSError, errors.RevisionResolutionError) as error:
            seconds = _worth_waiting(error, wait)
            if seconds is None:
                raise
        time.sleep(seconds)
    return call()


def _worth_waiting(error: BaseException, wait: float) -> float | None:
    """Seconds, or None when waiting would not help."""
    import httpx2
    from huggingface_hub import errors

    told = error.__cause__ if isinstance(error, errors.RevisionResolutionError) else error
    if isinstance(told, errors.HfHubHTTPError):
        if told.response.status_code not in _LATER:
            return None
        asked = told.response.headers.get("Retry-After", "")
        return max(wait, min(float(asked), 300.0)) if asked.isdigit() else wait
    broken = isinstance(told, httpx2.TransportError) and not isinstance(told, httpx2.ConnectError)
    return wait if broken else None


def short(error: BaseException) -> str:
    """What the Hub has said, or the first line of an error, without anything that looks like a
    token."""
    told = getattr(error, "server_message", None) or str(error)
    lines = told.strip().splitlines() or [type(error).__name__]
    return _TOKEN.sub("hf_...", lines[0])


@contextmanager
def told(repository: str, revision: str | None, doing: str) -> Iterator[None]:
    """What the client raises, as a sentence. ``doing``: "downloading", "pushing to"."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise QuantkitError(
            f"no repository can be called {repository}", "its name is owner/name"
        ) from error
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
    except (errors.LocalEntryNotFoundError, errors.RevisionResolutionError) as error:
        raise QuantkitError(
            f"there is no folder {repository} here, and the Hub cannot be reached",
            "check the path or the network (and HF_HUB_OFFLINE)",
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refused(repository, doing, error) from error
    except json.JSONDecodeError as error:
        raise QuantkitError(
            f"{doing} {repository} failed: what answered is not the Hub",
            "see whether this network wants a login, or HF_ENDPOINT or a proxy leads elsewhere",
        ) from error
    except (errors.HTTPError, OSError) as error:  # the former: a connection that broke, too
        raise QuantkitError(
            f"{doing} {repository} failed ({short(error)})",
            "run the same command again to continue",
        ) from error


def _refused(repository: str, doing: str, error: Any) -> QuantkitError:
    status = error.response.status_code
    if status == 401:
        return QuantkitError(
            f"{doing} {repository} failed: the Hub does not accept the token",
            "run 'hf auth login', or set HF_TOKEN to a token that is still valid",
        )
    if status == 403:
        return QuantkitError(
            f"{doing} {repository} failed: the token has no right to do that",
            "use a token that may write there ('hf auth login')",
        )
    if status == 412:
        return QuantkitError(
            f"{repository} was changed by somebody else meanwhile, nothing was published",
            "look at it, then run the same command again",
        )
    return QuantkitError(
        f"{doing} {repository} failed ({short(error)})", "run the same command again to continue"
    )


def blobs(repository: str) -> Path:
    """Where huggingface_hub's cache keeps the files of a repository, each under its hash."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repository, repo_type="model")
    return Path(str(constants.HF_HUB_CACHE)).expanduser() / str(folder) / "blobs"
