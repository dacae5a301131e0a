"""``quantkit convert``: a checkpoint in one format in, the same model in another out.

No model is built: linears are read as QWeights one at a time, fitted to the target's form and
packed. Whether all of them fit is seen before the first byte is written, and at the end every one
is read back from the result and compared with the source.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantkit import __version__
from quantkit.core import provenance
from quantkit.core.checkpoint import write_json
from quantkit.core.ledger import Ledger
from quantkit.core.progress import Progress, Step
from quantkit.core.source import resolve
from quantkit.errors import QuantkitError
from quantkit.methods import digest
from quantkit.runtime.opened import Opened, open_checkpoint
from quantkit.workflows import convert_targets
from quantkit.workflows.convert_targets import Moved, Target
from quantkit.workflows.layout import natural
from quantkit.workflows.output import Output, disk_errors
from quantkit.workflows.plan import size_in_bytes

_BATCH = 256 << 20  # bytes between two syncs of the output


@dataclass
class Conversion:
    """What came of it.

    exact    every weight means the very same number as before
    digest   of all quantized weights' numbers, in any format that holds them exactly
    errors   relative error |W - W'|^2 / |W|^2 of each linear that was rounded
    dense    largest relative error of a tensor that is not quantized, and was rounded
    """

    folder: Path
    source_format: str
    target: str
    linears: int = 0
    bytes: int = 0
    digest: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    dense: float = 0.0
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    written: bool = False

    @property
    def exact(self) -> bool:
        return not self.errors and not self.dense

    @property
    def worst(self) -> tuple[str, float] | None:
        """The linear with the largest error."""
        return max(self.errors.items(), key=lambda item: item[1]) if self.errors else None


def convert(
    model: str,
    to: str,
    out: str | Path | None = None,
    *,
    lossy: bool = False,
    max_shard_size: str = "5GB",
    pre_tokenizer: str | None = None,
    model_basename: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert ``model`` (``demo``, a folder, a .gguf file or a Hub repository) to the format
    ``to``: gptq, gptq_v2, awq, compressed-tensors, mlx, dense, or gguf:TYPE.

    lossy           round what the target cannot hold, and measure it, instead of refusing
    pre_tokenizer   GGUF's name for the tokenizer's first step, where it is not recognised
    model_basename  the weight file without its ending, where a folder has several

    Raises UsageError for a target that is not known, QuantkitError when something does not fit,
    both before anything is written. An interrupted call goes on when repeated.
    """
    progress = progress or Progress()
    started = time.perf_counter()
    opened = open_checkpoint(resolve(model, revision), model_basename)
    target = convert_targets.target(to, opened, lossy=lossy, pre_tokenizer=pre_tokenizer)
    folder = Path(out) if out else Path(f"{opened.source.short_name}-{to.replace(':', '-')}")
    output = Output(folder, overwrite)
    result = Conversion(folder, opened.format, to, linears=len(opened.linears))
    for text in target.survey(progress):
        result.notes.append(text)
        progress.note(text)
    result.bytes = target.nbytes
    output.check_space(target.nbytes)
    if dry_run:
        return result
    shard = size_in_bytes(max_shard_size)
    with disk_errors(folder):
        output.begin()
        ledger = Ledger(output.partial, _fingerprint(opened, to, lossy, pre_tokenizer, shard))
        if not target.begin(output.partial, shard):
            ledger.forget()  # somebody removed files that it calls finished
        try:
            _move(opened, target, ledger, progress)
            _beside(opened, output)
            target.close(output.partial, f"quantkit:{__version__}")
        finally:
            target.abandon()
        _gather(ledger, result)
        _compare(opened, target, output.partial, ledger, progress)
        result.seconds = time.perf_counter() - started
        write_json(output.partial / provenance.FILE, _provenance(opened, result))
        output.complete()
    result.written = True
    return result


def _fingerprint(
    opened: Opened, to: str, lossy: bool, pre_tokenizer: str | None, shard: int
) -> dict[str, Any]:
    """Everything that decides the output's bytes."""
    files = {
        f"source file {path.name}": f"{path.stat().st_size} bytes, {path.stat().st_mtime_ns}"
        for path in opened.files
    }
    return {
        "model": opened.source.name,
        "to": to,
        "lossy": lossy,
        "pre_tokenizer": pre_tokenizer,
        "max_shard_size": shard,
        "quantkit version": __version__,
        **files,
    }


def _beside(opened: Opened, output: Output) -> None:
    """Tokenizer, generation settings, licence: copied, or written anew from a GGUF file."""
    if opened.format == "gguf":
        opened.tokenizer().save_pretrained(output.partial)
    else:
        output.copy_companions(opened.source)


def _move(opened: Opened, target: Target, ledger: Ledger, progress: Progress) -> None:
    """Everything from the source into the target, in batches that an interrupted run keeps."""
    batches = list(_batches(opened))
    progress.begin("converting", len(batches))
    for index, batch in enumerate(batches):
        started = time.perf_counter()
        part = batch[0]
        if part not in ledger:
            done: dict[str, Moved] = {}
            for name in batch:
                if name in opened.linears:
                    done[name] = _move_linear(opened, target, name)
                else:
                    done |= target.put_dense(name, opened.dense.get(name))
            target.sync()
            ledger.finish(part, done)
        spent = time.perf_counter() - started
        progress.step(Step(index + 1, len(batches), part, None, spent))
    progress.end()


def _batches(opened: Opened) -> Iterator[list[str]]:
    """Linears and dense tensors, some hundred MB at a time."""
    sizes = {name: opened.dense.spec(name).nbytes for name in opened.dense}
    sizes |= {prefix: packed.out * packed.width for prefix, packed in opened.linears.items()}
    batch: list[str] = []
    size = 0
    for name in sorted(sizes, key=natural):
        if batch and size + sizes[name] > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += sizes[name]
    if batch:
        yield batch


def _move_linear(opened: Opened, target: Target, prefix: str) -> Moved:
    """One linear: what it means, or what it was rounded to means, and the error then."""
    q = opened.qweight(prefix)
    fitted, exact = target.fitted(q)
    target.put(prefix, fitted)
    if exact:
        return {"digest": digest.of(q)}
    return {"digest": digest.of(fitted), "error": target.error(q, fitted)}


def _gather(ledger: Ledger, result: Conversion) -> None:
    digests = {}
    for part in ledger:
        for name, moved in ledger.report(part).items():
            if "digest" in moved:
                digests[name] = moved["digest"]
                if "error" in moved:
                    result.errors[name] = moved["error"]
            result.dense = max(result.dense, moved.get("rounded", 0.0))
    if digests:
        result.digest = digest.together(digests)


def _compare(
    opened: Opened, target: Target, folder: Path, ledger: Ledger, progress: Progress
) -> None:
    """Read the result as anybody would, and see that it holds what was meant."""
    again = target.reopened(folder)
    moved = {name: report for part in ledger for name, report in ledger.report(part).items()}
    progress.begin("reading back", len(moved))
    for index, (name, report) in enumerate(moved.items()):
        started = time.perf_counter()
        if not _same(opened, again, name, report):
            raise QuantkitError(
                f"{name} was written, but reads back differently",
                "the disk may be failing; please report it if it happens again",
            )
        progress.step(Step(index + 1, len(moved), name, None, time.perf_counter() - started))
    progress.end()


def _same(opened: Opened, again: Opened, name: str, report: Moved) -> bool:
    if name in again.linears:
        return digest.of(again.qweight(name)) == report.get("digest")
    if "digest" in report:  # its numbers as a plain weight
        found = again.dense.get(f"{name}.weight")
        return torch.equal(found, opened.qweight(name).dequantize(found.dtype))
    found = again.dense.get(name)
    return torch.equal(found, opened.dense.get(name).to(found.dtype))


def _provenance(opened: Opened, result: Conversion) -> dict[str, Any]:
    recorded = opened.source.read_json(provenance.FILE) if opened.format != "gguf" else None
    worst = result.worst
    return {
        "method": "convert",
        "source": {
            "name": opened.source.name,
            "revision": opened.source.revision,
            "format": result.source_format,
        },
        "target": result.target,
        "exact": result.exact,
        "digest": result.digest,
        "worst_error": None if worst is None else {"linear": worst[0], "error": worst[1]},
        "linears": result.linears,
        "size": {"bytes": result.bytes},
        "made_from": recorded,
        "versions": provenance.versions(),
        "seconds": round(result.seconds, 2),
    }
