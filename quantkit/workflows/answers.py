"""``quantkit generate --in FILE --out FILE``: every row of a file answered.

Rows go through the model several at a time. What is done is added to a file in OUT.partial after
every batch, so that a run that was killed goes on there; OUT appears when all rows are done. A row
that cannot be answered has the reason in its column ``error``, and the others go on.
"""

import codecs
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from quantkit.core import table_file
from quantkit.core.ledger import FILE, Ledger
from quantkit.core.progress import Progress, Step
from quantkit.core.sampling import SEEDS, Sampling
from quantkit.core.table_file import Table
from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime import decode_cpu
from quantkit.runtime.batch import has_state
from quantkit.runtime.engine import Engine, open_engine
from quantkit.runtime.linear import QuantLinear
from quantkit.runtime.prompts import Prompts, asked
from quantkit.runtime.stream import Answer, Written
from quantkit.runtime.torch_engine import TorchEngine
from quantkit.workflows.generate import Wanted

COLUMNS = ("answer", "finish_reason", "error")
_DONE = "answers.jsonl"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_USUAL = ("question", "prompt", "instruction", "質問", table_file.TEXT)  # columns, if none is named

Record = dict[str, str]


@dataclass(frozen=True)
class Answered:
    """How many rows there were, and how many of them have no answer."""

    rows: int
    failed: int


def answer_file(
    model: str,
    questions: str | Path,
    out: str | Path,
    *,
    column: str | None = None,
    batch: int = 8,
    encoding: str = "auto",
    overwrite: bool = False,
    engine: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    model_basename: str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Answered:
    """Answer every row of ``questions`` (.csv, .tsv, .jsonl, .txt) into ``out``: the rows as they
    are, with the columns of COLUMNS behind. ``settings`` are the fields of Wanted; a seed counts up
    by row.

    Raises UsageError when OUT is there already, or has begun with other settings.
    """
    wanted, progress = Wanted(**settings), progress or Progress()
    wanted.check()
    out, questions = Path(out), Path(questions)
    if batch < 1:
        raise UsageError("--batch must be at least 1")
    table_file.check_writable(out)
    table = table_file.read(questions, encoding)
    progress.note(f"{questions}: {len(table.rows)} rows, {table.encoding}")
    column = _column(table, column, questions)
    partial = _partial(questions, out, overwrite)
    loading: dict[str, Any] = {
        "engine": engine,
        "device": device,
        "dtype": dtype,
        "revision": revision,
        "model_basename": model_basename,
    }
    _claim(partial, _fingerprint(model, loading, table, column, wanted))
    done = dict(_recorded(partial / _DONE))
    left = [row for row in range(len(table.rows)) if row not in done]
    if done:
        progress.note(f"{len(done)} rows are done already")
    if left:
        try:
            loaded = open_engine(model, **loading, note=progress.note)
        except QuantkitError:
            if not done:  # there is nothing to go on from
                shutil.rmtree(partial)
            raise
        prompts = Prompts(loaded, wanted.template, wanted.chat)
        parts = [left[start : start + batch] for start in range(0, len(left), batch)]
        progress.begin("rows", len(parts))
        try:
            for index, rows in enumerate(parts, 1):
                started = perf_counter()
                texts = {row: table.rows[row].get(column) for row in rows}
                found = _answers(loaded, prompts, texts, wanted)
                _record(partial / _DONE, found)
                done |= found
                seconds = perf_counter() - started
                progress.step(Step(index, len(parts), f"row {rows[-1] + 1}", None, seconds))
        finally:
            progress.end()
    complete = [row | done[index] for index, row in enumerate(table.rows)]
    mark = codecs.lookup(table.encoding).name != "utf-8"
    table_file.write(out, [*table.columns, *COLUMNS], complete, mark)
    shutil.rmtree(partial)
    return Answered(len(complete), sum(bool(record["error"]) for record in done.values()))


def _column(table: Table, named: str | None, path: Path) -> str:
    """The column with the question. Raises UsageError when it is not there or not clear."""
    there = f"it has {', '.join(table.columns)}" if table.columns else "it has none"
    if taken := set(COLUMNS) & set(table.columns):
        raise UsageError(
            f"{path} has a column '{min(taken)}' already", "rename it: the result has one too"
        )
    usual = [name for name in _USUAL if name in table.columns]
    found = named or (table.columns[0] if len(table.columns) == 1 else next(iter(usual), None))
    if found is None:
        raise UsageError(f"which column of {path} holds the questions?", f"--column; {there}")
    if found not in table.columns:
        raise UsageError(f"{path} has no column '{found}'", there)
    return found


def _partial(questions: Path, out: Path, overwrite: bool) -> Path:
    """The folder of an unfinished run. What is at ``out`` stays there until the new file is."""
    partial = out.with_name(out.name + ".partial")
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent}", "make it first")
    if out.exists() and out.samefile(questions):
        raise UsageError(f"{out} holds the questions", "choose another --out")
    if overwrite:
        if partial.exists():
            shutil.rmtree(partial)
    elif out.exists():
        raise UsageError(f"{out} is there already", "choose another --out, or --overwrite it")
    partial.mkdir(exist_ok=True)
    return partial


def _claim(partial: Path, fingerprint: dict[str, Any]) -> None:
    """Go on in a folder with answers of the same settings, or begin there: a run that has answered
    nothing (its model was not there) is none. Raises UsageError for other settings."""
    if not (partial / _DONE).exists():
        (partial / FILE).unlink(missing_ok=True)
    Ledger(partial, fingerprint)


def _fingerprint(
    model: str, loading: dict[str, Any], table: Table, column: str, wanted: Wanted
) -> dict[str, Any]:
    """What decides the answers."""
    template = wanted.template
    if template is not None and Path(template).is_file():
        template = hashlib.sha256(Path(template).read_bytes()).hexdigest()
    questions = "\0".join(str(row.get(column)) for row in table.rows)
    return asdict(wanted) | {
        "model": model,
        **{key: value for key, value in loading.items() if key != "device"},
        "weights": _weights(Path(model)),
        "template": template,
        "questions": hashlib.sha256(questions.encode("utf-8", "replace")).hexdigest(),
        "column": column,
    }


def _weights(model: Path) -> dict[str, list[int]]:
    """Sizes and times of the weight files of a model on this disk."""
    files = model.iterdir() if model.is_dir() else [model] if model.is_file() else []
    stats = {path.name: path.stat() for path in sorted(files) if path.suffix in _WEIGHTS}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _record(file: Path, found: dict[int, Record]) -> None:
    """Add the answers of a batch to those that are on the disk."""
    with file.open("ab") as lines:
        for row, record in found.items():
            lines.write(json.dumps({"row": row, **record}).encode() + b"\n")
        lines.flush()
        os.fsync(lines.fileno())


def _recorded(file: Path) -> Iterator[tuple[int, Record]]:
    """The answers on the disk, whose last line a crash may have cut off: then it goes."""
    if not file.exists():
        return
    text = file.read_bytes()
    whole = text.rpartition(b"\n")[0] + b"\n" if b"\n" in text else b""
    if whole != text:
        os.truncate(file, len(whole))
    for line in whole.splitlines():
        record = json.loads(line)
        yield record.pop("row"), record


def _answers(
    engine: Engine, prompts: Prompts, texts: dict[int, Any], wanted: Wanted
) -> dict[int, Record]:
    """The records of some rows, by row."""
    ids: dict[int, list[int]] = {}
    found: dict[int, Record] = {}
    for row, text in texts.items():
        try:
            if not isinstance(text, str):
                raise QuantkitError("there is no text in this row")
            tokens = prompts.ids(asked(text, wanted.system))
            if len(tokens) > engine.context:
                raise QuantkitError(
                    f"{len(tokens)} tokens do not fit into the context of {engine.context}"
                )
            ids[row] = tokens
        except QuantkitError as error:
            found[row] = dict(zip(COLUMNS, ("", "", error.message)))
    if not ids:
        return found
    own = wanted.sampling(engine.own_settings)
    each = [own if own.seed is None else replace(own, seed=(own.seed + row) % SEEDS) for row in ids]
    stop = (*wanted.stop, *prompts.stop)
    if isinstance(engine, TorchEngine) and _quicker_together(engine, len(ids)):
        texts_made = _together(engine, list(ids.values()), each, wanted.budget, stop)
    else:
        texts_made = [
            _alone(engine, one, sampling, wanted.budget, stop)
            for one, sampling in zip(ids.values(), each)
        ]
    made = {row: (text.strip(), why, "") for row, (text, why) in zip(ids, texts_made)}
    return found | {row: dict(zip(COLUMNS, record)) for row, record in made.items()}


def _quicker_together(engine: TorchEngine, texts: int) -> bool:
    """Whether texts are made faster in a batch than one after another. Where a single text is a
    compiled function (decode_cpu), one gains nothing, and weights that a batch would have to unpack
    at every step make it slower than 16 texts alone (measured: 121 tokens/s against 317)."""
    if has_state(engine.model):
        return False
    if not decode_cpu.fits(engine.model):
        return True
    packed = any(isinstance(module, QuantLinear) for module in engine.model.modules())
    unpacked = packed and engine.model.dtype != torch.bfloat16  # torch's int4 kernel is for that
    return texts > (32 if unpacked else 1)


def _alone(
    engine: Engine, ids: list[int], sampling: Sampling, budget: int, stop: Sequence[str]
) -> tuple[str, str]:
    answer = Answer(engine, ids, sampling, budget, stop)
    text = "".join(answer)
    return text, str(answer.reason)


def _together(
    engine: TorchEngine,
    ids: list[list[int]],
    sampling: list[Sampling],
    budget: int,
    stop: Sequence[str],
) -> list[tuple[str, str]]:
    """Text and reason of each, computed at once."""
    written = [Written(engine.decode, stop, engine.end_ids) for _ in ids]
    texts = [""] * len(ids)
    steps = engine.batch(ids, sampling, budget)
    ended: set[int] | None = None
    with suppress(StopIteration):
        while True:
            found = steps.send(ended)
            for i, token in found:
                texts[i] += written[i].push(token)
            ended = {i for i, _ in found if written[i].reason is not None}
    for i, one in enumerate(written):
        texts[i] += one.rest()
    cut = ["length" if len(one.ids) >= budget else "context" for one in written]
    return [(text, one.reason or why) for text, one, why in zip(texts, written, cut)]
