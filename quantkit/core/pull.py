"""A model from the Hub into huggingface_hub's cache, where other programs find it too.

First the commit, then its files' names and sizes, then what is needed of them: all of it belongs to
one commit, even when the branch moves meanwhile, and fits on the disk before the first byte comes.
"""

import glob
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.core import hub
from quantkit.core.needed import beside_file, needed
from quantkit.core.pickled import SUFFIXES
from quantkit.core.ranges import Remote, fetch, partial
from quantkit.errors import QuantkitError

LARGE = 8 << 20  # bytes from which on a file is fetched in pieces
_SLACK = 64 << 20


@dataclass(frozen=True)
class Pulled:
    """folder: of the cache; commit: its hash; file: the one weight file, where it is one;
    remote: weight files that stayed where they are, by name"""

    folder: Path
    commit: str
    file: str | None
    remote: dict[str, Remote]


def pull(
    repository: str,
    revision: str | None = None,
    file: str | None = None,
    basename: str | None = None,
    low_disk: bool = False,
    no_weights: bool = False,
) -> Pulled:
    """Fetch what is needed of ``repository`` at ``revision`` (a branch, tag or commit): ``file``
    and what belongs to it, or the weights called ``basename``, or the only ones. With ``low_disk``
    large safetensors files are left there, with ``no_weights`` all files of LFS. Raises
    QuantkitError, also when the disk is too small; an interrupted call goes on when repeated."""
    import huggingface_hub

    with hub.told(repository, revision, "downloading"):
        api = huggingface_hub.HfApi()
        at = hub.patiently(lambda: api.resolve_revision(repository, revision=revision))
        found, online = _listing(api, repository, at)
        wanted = _wanted(repository, found, file, basename)
        remote: dict[str, Remote] = {}
        if online:
            least = 0 if low_disk or no_weights else LARGE
            large = _large(repository, at.resolved, found, wanted, least)
            if low_disk:
                remote = _left(repository, large, wanted)
                wanted = [name for name in wanted if name not in remote or _kept(remote[name])]
            elif no_weights:
                remote = large
                wanted = [name for name in wanted if name not in remote]
            _make_room(repository, found, wanted)
            _fetch(repository, [large[name] for name in wanted if name in large])
        elif low_disk:
            raise QuantkitError("--low-disk needs the Hub, which cannot be reached")
        patterns = [glob.escape(name) for name in wanted]
        folder = hub.patiently(
            lambda: huggingface_hub.snapshot_download(
                repository, revision=at, allow_patterns=patterns
            )
        )
    one = file or (wanted[-1] if wanted and wanted[-1].endswith(".gguf") else None)
    place = Path(folder, one).parent if one else Path(folder)
    return Pulled(place, at.resolved, Path(one).name if one else None, remote)


def _listing(api: Any, repository: str, at: Any) -> tuple[dict[str, hub.Entry], bool]:
    """The files of the commit, and whether the Hub was asked: without a network it is what the
    cache remembers."""
    import httpx2
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return hub.entries(api, repository, at.resolved), True
    except (httpx2.ConnectError, httpx2.TimeoutException, errors.OfflineModeIsEnabled) as error:
        try:
            known = huggingface_hub.get_cached_repo_tree(repository, revision=at)
        except errors.CachedRepoTreeNotFoundError:
            raise errors.LocalEntryNotFoundError("nothing is here") from error
    return {file.path: hub.Entry(file.size, None, file.blob_id) for file in known}, False


def _wanted(
    repository: str, found: dict[str, hub.Entry], file: str | None, basename: str | None
) -> list[str]:
    names = list(found)
    if file is None:
        return needed(repository, names, basename)
    if file not in names:
        raise QuantkitError(
            f"{repository} has no file {file}", "see the files on its Hub page, or its branches"
        )
    return beside_file(names, file)


def _large(
    repository: str, commit: str, found: dict[str, hub.Entry], wanted: list[str], least: int
) -> dict[str, Remote]:
    return {
        name: Remote(repository, commit, name, found[name].size, found[name].sha256 or "")
        for name in wanted
        if found[name].sha256 and found[name].size >= least
    }


def _left(repository: str, large: dict[str, Remote], wanted: list[str]) -> dict[str, Remote]:
    """The files that may stay on the Hub: all weights, which must be large safetensors files."""
    weights = [name for name in wanted if name.endswith((".safetensors", ".gguf", *SUFFIXES))]
    if any(not name.endswith(".safetensors") for name in weights):
        raise QuantkitError(
            f"the weights of {repository} are no safetensors files, and cannot be read in parts",
            "leave out --low-disk",
        )
    return {name: one for name, one in large.items() if name in weights}


def _kept(remote: Remote) -> bool:
    """Whether the whole file is here already."""
    return (hub.blobs(remote.repository) / remote.sha256).exists()


def _make_room(repository: str, found: dict[str, hub.Entry], wanted: list[str]) -> None:
    """Raises QuantkitError when what is still missing does not fit on the cache's disk."""
    folder = hub.blobs(repository)
    missing = 0
    for name in wanted:
        kept = found[name].sha256 or found[name].blob
        if not (folder / kept).exists():
            part = partial(folder, kept)
            missing += found[name].size - (part.stat().st_size if part.exists() else 0)
    free = shutil.disk_usage(next(p for p in folder.parents if p.exists())).free
    if missing and free < missing + _SLACK:
        raise QuantkitError(
            f"{repository} needs {missing / 1e9:.2f} GB more in {folder.parent.parent}, "
            f"{free / 1e9:.2f} GB are free",
            "make room, set HF_HOME to another disk, or quantize with --low-disk",
        )


def _fetch(repository: str, files: list[Remote]) -> None:
    from huggingface_hub.utils import tqdm

    folder = hub.blobs(repository)
    missing = [one for one in files if not (folder / one.sha256).exists()]
    for one in missing:
        bar = tqdm(
            total=one.size,
            unit="B",
            unit_scale=True,
            desc=one.path,
            name="quantkit.pull",
            leave=False,
        )
        with bar:
            fetch(one, folder, bar.update)
