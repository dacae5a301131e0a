"""``quantkit convert``: a checkpoint in one format in, the same model in another out.

No model is built: linears are read as QWeights one at a time, fitted to the target's form and
packed. Whether all of them fit is seen before the first byte is written, and at the end every one
is read back from the result and compared with the source.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from quantkit import __version__
from quantkit.core import provenance
from quantkit.core.ledger import Ledger
from quantkit.core.names import natural
from quantkit.core.progress import Progress, Step
from quantkit.core.sizes import size_in_bytes
from quantkit.core.source import resolve
from quantkit.errors import QuantkitError, UsageError
from quantkit.methods import digest, fit
from quantkit.runtime.opened import Folder, Opened, open_checkpoint, recorded
from quantkit.workflows import convert_targets, legacy
from quantkit.workflows.ahead import Ahead, ahead, one_behind
from quantkit.workflows.convert_record import Conversion, made, provenance_of
from quantkit.workflows.convert_targets import Moved, Target
from quantkit.workflows.output import Output, companions, disk_errors
from quantkit.workflows.rounded import Rounded

_BATCH = 1 << 30  # bytes being worked on between two syncs of the output
_PIECE = 64 << 20  # bytes of a plain tensor that are compared at a time


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
    legacy_name: str | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert ``model`` (``demo``, a folder, a .gguf file or a Hub repository) to the format
    ``to``: gptq, gptq_v2, awq, compressed-tensors, mlx, dense, or gguf:TYPE.

    lossy           round what the target cannot hold, and measure it, instead of refusing
    pre_tokenizer   GGUF's name for the tokenizer's first step, where it is not recognised
    model_basename  the weight file without its ending, where a folder has several
    legacy_name     a second name of GPTQ's weight file, such as gptq_model-4bit-128g

    Raises UsageError for a target that is not known, QuantkitError when something does not fit,
    both before anything is written. An interrupted call goes on when repeated.
    """
    legacy.check(legacy_name, to.lower().replace("-", "_"))
    opened = open_checkpoint(resolve(model, revision, model_basename), model_basename)
    if not opened.model_config:
        raise QuantkitError(
            f"{opened.source.name} has no config.json",
            "is this the folder of a transformers model?",
        )
    target = convert_targets.target(to, opened, lossy=lossy, pre_tokenizer=pre_tokenizer)
    folder = Path(out) if out else Path(f"{opened.source.short_name}-{to.replace(':', '-')}")
    return carry(
        opened,
        target,
        to,
        Output(folder, overwrite),
        settings={"lossy": lossy, "pre_tokenizer": pre_tokenizer},
        max_shard_size=max_shard_size,
        dry_run=dry_run,
        legacy_name=legacy_name,
        progress=progress,
    )


def carry(
    opened: Opened,
    target: Target,
    to: str,
    output: Output,
    *,
    settings: dict[str, Any],
    max_shard_size: str = "5GB",
    dry_run: bool = False,
    legacy_name: str | None = None,
    progress: Progress | None = None,
    fingerprint: dict[str, Any] | None = None,
) -> Conversion:
    """Everything that ``opened`` holds into ``target``. ``settings`` are what decides the output's
    bytes beside the source's files and the target's name ``to``; whoever has begun the output
    already gives the whole ``fingerprint``. A :class:`Rounded` source is quantized on the way, and
    quantkit.json speaks of that instead of a conversion."""
    progress = progress or Progress()
    started = time.perf_counter()
    folder = output.folder
    output.keep_apart(opened.source)
    if not isinstance(opened, Rounded):
        recorded(opened)  # one that cannot be gone on from is told before anything is written
    result = Conversion(folder, opened.format, to, linears=len(opened.linears))
    result.settings = {key: value for key, value in settings.items() if value}
    for text in [*target.survey(progress), *_unpacked(opened, to)]:
        result.notes.append(text)
        progress.note(text)
    result.bytes = target.nbytes
    shard = size_in_bytes(max_shard_size)
    legacy.check_size(legacy_name, result.bytes, shard)
    output.check_space(result.bytes)
    if opened.format != "gguf":
        companions(opened.source)  # what is wrong with them is told before the work is done
    if dry_run:
        return result
    with disk_errors(folder), ahead() as workers:
        ledger = begin(output, fingerprint or fingerprint_of(opened, to, settings, shard))
        if not target.begin(output.partial, shard):
            ledger.forget()  # somebody removed files that it calls finished
        hashes = None
        if not opened.linears or isinstance(opened, Rounded):
            # verify will have to recognise them
            hashes = provenance.hash_files(opened.files, opened.source.remote)
        try:
            _move(opened, target, ledger, progress, workers)
            _beside(opened, output)
            target.close(output.partial, f"quantkit:{__version__}")
        finally:
            target.abandon()
        if target.requantizes:
            _measure(opened, target, output.partial, result, progress)
        else:
            _gather(ledger, result)
            result.linears = max(result.linears, len(result.digests))  # some were plain before
            _compare(opened, target, output.partial, ledger, progress, workers)
        result.seconds = time.perf_counter() - started
        files = hashes.result() if hashes else {}
        if isinstance(opened, Rounded):
            content = made(opened, result, files)
        else:
            content = provenance_of(opened, result, files)
        legacy.add(output.partial, legacy_name)
        from quantkit.workflows.seal import told  # and transformers: 180 MB that nothing else needs

        told(content, opened.source, output.partial, opened.model_config)
        output.complete()
    result.written = True
    return result


def _unpacked(opened: Opened, to: str) -> list[str]:
    """What is quantized and will not be: linears of the blocks are carried over as codes alone."""
    found = opened.outside if isinstance(opened, Folder) else []
    if not found or to.startswith("dense"):
        return []
    return [f"quantized outside of the blocks, written as plain tensors: {', '.join(found)}"]


def begin(output: Output, fingerprint: dict[str, Any]) -> Ledger:
    """Start in the partial folder, or go on there."""
    output.begin()
    try:
        return Ledger(output.partial, fingerprint)
    except UsageError:
        if not output.overwrite:
            raise
        output.discard()
        output.begin()
        return Ledger(output.partial, fingerprint)


def fingerprint_of(opened: Opened, to: str, settings: dict[str, Any], shard: int) -> dict[str, Any]:
    """Everything that decides the output's bytes."""
    files = {
        f"source file {path.name}": provenance.identity(path, opened.source.remote)
        for path in opened.files
    }
    return {
        "model": opened.source.name,
        "to": to,
        **settings,
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


def _move(
    opened: Opened, target: Target, ledger: Ledger, progress: Progress, workers: Ahead
) -> None:
    """Everything from the source into the target, in batches that an interrupted run keeps."""

    def move(name: str) -> dict[str, Moved]:
        if name in opened.linears:
            moved = {name: _move_linear(opened, target, name)}
        else:
            moved = target.put_dense(name, opened.dense.get(name))
        opened.release()
        return moved

    def keep(part: str, done: dict[str, Moved]) -> None:
        target.sync()
        ledger.finish(part, done)

    batches = list(_batches(_sizes(opened)))
    progress.begin("converting", len(batches))
    with one_behind() as behind:  # the disk takes a batch while the next one is worked on
        for index, batch in enumerate(batches):
            started = time.perf_counter()
            part = next(iter(batch))
            if part not in ledger:
                done: dict[str, Moved] = {}
                for _, moved in workers.map(move, batch):
                    done |= moved
                behind(keep, part, done)
            spent = time.perf_counter() - started
            progress.step(Step(index + 1, len(batches), part, None, spent))
    progress.end()


def _sizes(opened: Opened) -> dict[str, int]:
    """Bytes that every linear and every dense tensor takes while it is being worked on."""
    sizes = {name: opened.dense.spec(name).nbytes for name in opened.dense}
    sizes |= {prefix: packed.out * packed.width for prefix, packed in opened.linears.items()}
    return {name: sizes[name] for name in sorted(sizes, key=natural)}


def _batches(sizes: dict[str, int]) -> Iterator[dict[str, int]]:
    """Tensors, some hundred MB at a time."""
    batch: dict[str, int] = {}
    for name, size in sizes.items():
        if batch and sum(batch.values()) + size > _BATCH:
            yield batch
            batch = {}
        batch[name] = size
    if batch:
        yield batch


def _move_linear(opened: Opened, target: Target, prefix: str) -> Moved:
    """One linear: what it means, or what it was rounded to means, and the error then."""
    q = opened.qweight(prefix)
    fitted, exact = target.fitted(q)
    target.put(prefix, fitted)
    quantized = {"layer": opened.error(prefix, fitted)} if isinstance(opened, Rounded) else {}
    if exact:
        return {"digest": digest.of(q), **quantized}
    return {"digest": digest.of(fitted), "error": target.error(q, fitted), **quantized}


def _gather(ledger: Ledger, result: Conversion) -> None:
    for part in ledger:
        for name, moved in ledger.report(part).items():
            if "digest" in moved:
                result.digests[name] = moved["digest"]
                if "error" in moved:
                    result.errors[name] = moved["error"]
                if "layer" in moved:
                    result.layers[name] = moved["layer"]
            result.dense = max(result.dense, moved.get("rounded", 0.0))


def _compare(
    opened: Opened,
    target: Target,
    folder: Path,
    ledger: Ledger,
    progress: Progress,
    workers: Ahead,
) -> None:
    """Read the result as anybody would, and see that it holds what was meant."""
    again = target.reopened(folder)
    moved = {name: report for part in ledger for name, report in ledger.report(part).items()}
    sizes = _sizes(again)
    sizes = {name: sizes.get(name) or sizes.get(f"{name}.weight", 0) for name in moved}

    def same(name: str) -> bool:
        found = _same(opened, again, name, moved[name])
        again.release()
        opened.release()
        return found

    progress.begin("reading back", len(moved))
    started = time.perf_counter()
    for index, (name, is_same) in enumerate(workers.map(same, sizes)):
        if not is_same:
            raise QuantkitError(
                f"{name} was written, but reads back differently",
                "the disk may be failing; please report it if it happens again",
            )
        now = time.perf_counter()
        progress.step(Step(index + 1, len(moved), name, None, now - started))
        started = now
    progress.end()


def _measure(
    opened: Opened, target: Target, folder: Path, result: Conversion, progress: Progress
) -> None:
    """What somebody else's rounding did to every linear."""
    again = target.reopened(folder)
    result.linears, result.bytes = len(again.linears), sum(f.stat().st_size for f in again.files)
    progress.begin("measuring", len(again.linears))
    for index, prefix in enumerate(again.linears):
        started = time.perf_counter()
        found = again.qweight(prefix)
        if prefix in opened.linears:
            original = opened.qweight(prefix).dequantize()
        else:
            original = opened.dense.get(f"{prefix}.weight").float()
        result.errors[prefix] = fit.relative_error(original, found.dequantize())
        result.digests[prefix] = digest.of(found)
        opened.release()
        spent = time.perf_counter() - started
        progress.step(Step(index + 1, len(again.linears), prefix, result.errors[prefix], spent))
    progress.end()


def _same(opened: Opened, again: Opened, name: str, report: Moved) -> bool:
    if name in again.linears:
        return digest.of(again.qweight(name)) == report.get("digest")
    if "digest" in report:  # its numbers as a plain weight
        found = again.dense.get(f"{name}.weight")
        return _same_bits(found, opened.qweight(name).dequantize(found.dtype))
    if "sha256" in report:  # a table in codes, as a plain tensor
        return bool(digest.of_plain(again.dense.get(name)) == report["sha256"])
    return _same_numbers(opened, again, name)


def _same_numbers(opened: Opened, again: Opened, name: str) -> bool:
    """Equality of plain tensors, a piece at a time: the largest are as large as a whole block. What
    is still on the Hub comes whole, and would come anew for every piece."""
    spec = again.dense.spec(name)
    if opened.dense.spec(name).shape != spec.shape:
        return False
    rows = spec.shape[0] if spec.shape else 1
    piece = spec.nbytes if opened.source.remote else _PIECE
    step = max(1, rows * piece // max(1, spec.nbytes))
    for start in range(0, rows, step):
        at = slice(start, start + step) if spec.shape else ...
        found, expected = again.dense.get(name)[at], opened.dense.get(name)[at]
        if not _same_bits(found, expected.to(found.dtype)):
            return False
        again.release()
        opened.release()
    return True


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality to which a NaN is a number like any other."""
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)
