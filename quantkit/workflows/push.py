"""``quantkit push``: a finished, measured, clean folder to a repository on the Hub.

look at the folder -> look at the repository -> upload -> one commit -> read back by hash. What
should not be public is refused before anything is sent.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit import __version__, formats
from quantkit.core import card_data, hub, ledger, provenance, publish
from quantkit.core.needed import SUFFIX
from quantkit.core.progress import Progress
from quantkit.core.publish import MAIN, There
from quantkit.core.source import Source
from quantkit.errors import QuantkitError, UsageError

_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_BRANCH = re.compile(r"(?!refs/|.*(?:\.\.|//|/\.))\w[\w./-]*(?<![./])(?<!\.lock)")
_NO_DERIVATIVES = re.compile(r"(^|-)nd(-|$)")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf", SUFFIX)


@dataclass
class Pushed:
    """files: the names of all; commit: None when nothing had to be sent or it was a dry run;
    removed: files of the branch that made way"""

    repository: str
    branch: str
    address: str
    files: list[str]
    bytes: int
    removed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    commit: str | None = None
    written: bool = False


def push(
    folder: str | Path,
    repository: str,
    *,
    branch: str = MAIN,
    private: bool = False,
    message: str | None = None,
    unverified: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Pushed:
    """Publish the model in ``folder`` as ``owner/name``, in one commit, and compare what landed.

    branch       made if it is not there, with nothing of other branches in it
    private      of a repository that is made; one that is public is refused then
    message      of the commit
    unverified   also a model that nobody measured, or that missed its limits
    overwrite    also over weights that quantkit did not put there
    dry_run      look at everything, send nothing

    Raises UsageError or QuantkitError, with nothing published. An interrupted call goes on when
    repeated: large files that are there are not sent again.
    """
    progress = progress or Progress()
    check_name(repository)
    if not _BRANCH.fullmatch(branch) or branch == "HEAD":
        raise UsageError(f"{branch!r} is no name of a branch", "give one such as gptq-4bit-32g")
    try:
        folder = Path(folder).expanduser()
        record = _finished(folder)
    except (OSError, RuntimeError) as error:  # names that no disk takes, users that there are not
        raise QuantkitError(
            f"there is no folder {folder}", "give one that quantkit wrote"
        ) from error
    files = _files(folder)
    _clean(folder)
    if not unverified:
        refuse_unmeasured(record, folder)
    if repository == _text(record, "source", "name"):
        raise UsageError(f"{repository} is the original of {folder}", "push to a name of your own")
    result = Pushed(repository, branch, publish.address(repository, branch), [], 0)
    result.files = [path.name for path in files]
    result.bytes = sum(path.stat().st_size for path in files)
    publish.check_token()
    there = publish.look(repository, branch)
    if private and there.private is False:
        raise UsageError(f"{repository} is there already, and public", "leave out --private")
    result.removed = _in_the_way(there, result.files)
    if result.removed and provenance.FILE not in there.files and not overwrite:
        raise UsageError(
            f"{repository} holds other weights in {branch}: {', '.join(result.removed[:3])}",
            "choose another --branch, or use --overwrite",
        )
    result.notes = _licence(folder) + _edited_card(repository, there, folder)
    for text in result.notes:
        progress.warn(text)
    if dry_run:
        return result
    if publish.holds(there, files, result.removed):
        progress.note(f"{repository} holds all of this already")
        result.written = True
        return result
    result.commit = publish.publish(
        files,
        repository,
        branch,
        there,
        private=private,
        remove=result.removed,
        message=message or _message(record),
    )
    if wrong := publish.different(files, repository, result.commit):
        raise QuantkitError(
            f"{', '.join(wrong[:3])} in {repository} is not what was sent",
            "push again; if it stays so, report it to the Hub",
        )
    result.written = True
    return result


def check_name(repository: str) -> None:
    """Raises UsageError for what is not ``owner/name``."""
    if not _NAME.fullmatch(repository):
        raise UsageError(f"'{repository}' is no name of a repository", "give owner/name")


def _finished(folder: Path) -> dict[str, Any]:
    """quantkit.json of a folder that is complete."""
    whole = folder.absolute()  # "." has no name
    partial = whole.parent / f"{whole.name}.partial"
    unfinished = folder.is_dir() and (folder / ledger.FILE).is_file()
    if unfinished or (partial.is_dir() and not folder.exists()):
        raise QuantkitError(
            f"{folder} is unfinished", "run the command that began it again, then push"
        )
    if not folder.is_dir():
        raise QuantkitError(f"there is no folder {folder}", "give one that quantkit wrote")
    record = Source(whole.name, folder).read_json(provenance.FILE)
    if record is None:
        raise QuantkitError(
            f"{folder} was not written by quantkit, it has no {provenance.FILE}",
            "quantize or convert the model with quantkit, or upload it with 'hf upload'",
        )
    return record


def _files(folder: Path) -> list[Path]:
    """What is published: all files that lie in the folder itself and are not hidden."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    for path in files:
        if not hub.is_path(path.name):
            raise QuantkitError(f"{folder} has a file called {path.name!r}", "give it another name")
    return files


def _clean(folder: Path) -> None:
    """Raises QuantkitError for a model with errors, and for what should stay on this machine."""
    from quantkit.workflows.inspect import inspect

    findings = inspect(str(folder)).findings
    for finding in findings:
        if finding.level == "error":
            raise QuantkitError(f"{folder} has an error: {finding.text}", "see 'quantkit inspect'")
    for finding in findings:
        if finding.code == "leak":
            raise QuantkitError(
                f"{folder} should not be published as it is: {finding.text}",
                f"'quantkit inspect {folder} --repair NEW' writes a copy without it",
            )


def measured(record: dict[str, Any]) -> bool:
    """Whether the model was compared with its original, by verify or while it was made."""
    return bool(record.get("verified") or record.get("measured"))


def refuse_unmeasured(record: dict[str, Any], folder: Path) -> None:
    """Raises QuantkitError for a model that nobody measured, or that missed its limits."""
    verified = record.get("verified")
    gate = verified.get("gate") if isinstance(verified, dict) else None
    if isinstance(gate, dict) and not gate.get("passed"):
        raise QuantkitError(
            f"{folder} did not keep the limits of its verification",
            "make a better one, or push it all the same with --unverified",
        )
    if not measured(record):
        raise QuantkitError(
            f"{folder} was never measured against its original",
            f"run 'quantkit verify {folder}' first, or push it all the same with --unverified",
        )


def _licence(folder: Path) -> list[str]:
    """What the licence may forbid."""
    licence = card_data.read(folder).get("license")
    if isinstance(licence, str) and _NO_DERIVATIVES.search(licence.lower()):
        return [
            f"the licence of the original, {licence}, does not allow to publish changed versions, "
            "and a quantized model is one"
        ]
    return []


def _edited_card(repository: str, there: There, folder: Path) -> list[str]:
    """Where to find the card that makes way, if somebody wrote or changed it on the Hub: a push
    changes it together with quantkit.json."""
    ours, kept = folder / card_data.CARD, there.files.get(card_data.CARD)
    if kept is None or not ours.is_file() or publish.same(ours, kept):
        return []
    card, record = publish.last_commits(repository, there, [card_data.CARD, provenance.FILE])
    if card == record:
        return []
    where = publish.address(repository, there.head or MAIN)
    return [f"the card on the Hub was changed there, and makes way; it stays readable in {where}"]


def _in_the_way(there: There, ours: list[str]) -> list[str]:
    """Weights in the branch that loaders would mix up with these, and what says how others were
    quantized. GGUF files live side by side."""
    single = any(name.endswith(".gguf") for name in ours)
    return [
        name
        for name in there.files
        if (name.endswith(_WEIGHTS) or name in formats.CONFIG_FILES)
        and "/" not in name
        and name not in ours
        and not (single and name.endswith(".gguf"))
    ]


def _message(record: dict[str, Any]) -> str:
    what = _text(record, "conversion", "to") or _text(record, "method") or "model"
    return f"{what}, made with quantkit {__version__}"


def _text(content: Any, *path: str) -> str | None:
    for key in path:
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, str) else None
