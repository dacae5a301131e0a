"""Files to a repository on the Hub: all of them in one commit, or nothing.

Large files are uploaded first, where nobody sees them; what is there already is not sent again, so
that repeating a push that failed goes on. The one commit that makes them visible is refused by the
Hub when somebody else was there in between.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.core import hub
from quantkit.core.hub import Entry
from quantkit.errors import QuantkitError, UsageError

MAIN = "main"
_ATTRIBUTES = ".gitattributes"


@dataclass(frozen=True)
class There:
    """What a repository holds. head: the commit that ``files`` belong to, None for a repository or
    branch that is not there yet, or has nothing of its own yet; private: None for a repository that
    is not there"""

    files: dict[str, Entry]
    head: str | None = None
    private: bool | None = None


def check_token() -> None:
    """Raises UsageError when nobody is logged in, QuantkitError when the Hub rejects the token."""
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise UsageError(
            "pushing needs a token of the Hub, and there is none",
            "run 'hf auth login', or set HF_TOKEN, with a token that may write",
        )
    with hub.told("the Hub", None, "asking"):
        hub.patiently(huggingface_hub.HfApi().whoami)


def look(repository: str, branch: str) -> There:
    """What is in ``branch`` now."""
    import huggingface_hub
    from huggingface_hub import errors

    api = huggingface_hub.HfApi()
    with hub.told(repository, branch, "looking at"):
        try:
            main = hub.patiently(lambda: api.repo_info(repository))
        except errors.RepositoryNotFoundError:
            return There({})
        try:
            info = hub.patiently(lambda: api.repo_info(repository, revision=branch))
        except errors.RevisionNotFoundError:
            return There({}, None, bool(main.private))
        if branch != MAIN and info.sha == main.sha:  # made by a push that broke off then
            return There({}, None, bool(main.private))
        return There(hub.entries(api, repository, info.sha), info.sha, bool(main.private))


def same(path: Path, entry: Entry | None) -> bool:
    """Whether the file is byte for byte what the Hub lists, by the Hub's own hashes."""
    if entry is None or path.stat().st_size != entry.size:
        return False
    if entry.sha256:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
    raw = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest() == entry.blob


def holds(there: There, files: list[Path], remove: list[str]) -> bool:
    """Whether all of ``files`` are there already, and none of the files ``remove``."""
    gone = not there.files.keys() & set(remove)
    return gone and all(same(path, there.files.get(path.name)) for path in files)


def last_commits(repository: str, there: There, names: list[str]) -> list[str | None]:
    """The commits that changed the files last, None for one that is not there."""
    import huggingface_hub

    api = huggingface_hub.HfApi()
    with hub.told(repository, there.head, "looking at"):
        found = hub.patiently(
            lambda: api.get_paths_info(repository, names, revision=there.head, expand=True)
        )
    commits = {file.path: file.last_commit.oid for file in found if file.last_commit}
    return [commits.get(name) for name in names]


def publish(
    files: list[Path],
    repository: str,
    branch: str,
    there: There,
    *,
    private: bool,
    remove: list[str],
    message: str,
) -> str:
    """Make the repository and the branch if need be, and add ``files`` in one commit that also
    removes the files ``remove`` -> its hash. Raises QuantkitError; nothing is visible then."""
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, errors

    api = huggingface_hub.HfApi()
    adds = [CommitOperationAdd(path.name, str(path)) for path in files]
    with hub.told(repository, branch, "pushing to"), _uploads():
        if there.private is None:
            hub.patiently(lambda: api.create_repo(repository, private=private, exist_ok=True))
        main = hub.patiently(lambda: api.repo_info(repository))
        hub.patiently(
            lambda: api.preupload_lfs_files(repository, adds, revision=MAIN, free_memory=False)
        )
        head = there.head
        if head is None:
            head = main.sha
            if branch != MAIN:
                hub.patiently(lambda: api.create_branch(repository, branch=branch, exist_ok=True))
            found = hub.entries(api, repository, head)
            ours = {path.name for path in files} | {_ATTRIBUTES}
            remove = [name for name in found if name not in ours]
        operations: list[Any] = [*adds, *(CommitOperationDelete(name) for name in remove)]
        try:
            done = hub.patiently(
                lambda: api.create_commit(
                    repository,
                    operations,
                    commit_message=message,
                    revision=branch,
                    parent_commit=head,
                )
            )
        except errors.HfHubHTTPError as error:
            # the commit before this attempt may have been our own, and only its answer got lost
            now = look(repository, branch) if error.response.status_code == 412 else There({})
            if now.head is None or not holds(now, files, remove):
                raise
            return now.head
        return str(done.oid)


def different(files: list[Path], repository: str, commit: str) -> list[str]:
    """The files that did not land as they are here, by their hashes in the commit's listing."""
    import huggingface_hub

    with hub.told(repository, commit, "reading back"):
        found = hub.entries(huggingface_hub.HfApi(), repository, commit)
    return [path.name for path in files if not same(path, found.get(path.name))]


@contextmanager
def _uploads() -> Iterator[None]:
    """The client wraps what went wrong with an upload into errors without a kind."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__cause__, OSError):  # what the Hub answered, or the network
            raise error.__cause__ from error
        raise QuantkitError(
            f"an upload failed ({hub.short(error.__cause__ or error)})",
            "run the same command again to continue",
        ) from error
    except ValueError as error:
        raise QuantkitError(f"the Hub refused the upload ({hub.short(error)})") from error


def address(repository: str, branch: str) -> str:
    """Where people see it."""
    from huggingface_hub import constants

    tree = "" if branch == MAIN else f"/tree/{branch}"
    return f"{constants.ENDPOINT}/{repository}{tree}"
