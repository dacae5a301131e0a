"""Calibration text: from a name or a file to rows of token ids, with nothing silently dropped.

A specification names sources, and may say how many rows each gives:

    bundled                         the texts that come with quantkit (en, ja, code, chat)
    bundled:ja=64,en=64             64 rows of each
    notes.txt   data.jsonl=32       a local .txt, .jsonl, .csv or .parquet file
    data.csv:question               with the column to read
    hf:owner/name:config:split:column   a dataset on the Hub, streamed; all but the name optional
    wikitext2, c4, c4-ja, ...       shortcuts for such (see SHORTCUTS)
    self                            text that the model itself samples

Documents are shuffled with a fixed seed, joined with the end-of-text token between them and cut
into rows. A file may also hold rows of ready ``input_ids``; they are taken as they are.
"""

import csv
import hashlib
import json
import random
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit import data
from quantkit.core.unicode import refuse_halves
from quantkit.errors import QuantkitError, UsageError

BUNDLED = ("en", "ja", "code", "chat")
SHORTCUTS = {
    "wikitext2": "hf:Salesforce/wikitext:wikitext-2-raw-v1:train:text",
    "c4": "hf:allenai/c4:en:train:text",
    "c4-ja": "hf:allenai/c4:ja:train:text",
    "wikipedia": "hf:wikimedia/wikipedia:20231101.en:train:text",
    "wikipedia-ja": "hf:wikimedia/wikipedia:20231101.ja:train:text",
    "ultrachat": "hf:HuggingFaceH4/ultrachat_200k:default:train_sft:messages",
}
_SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
_TEXT_KEYS = ("text", "content", "body")
_CSV_FIELD = 1 << 30  # a field may hold a whole book; Python stops at 128 KiB unless told


@dataclass(frozen=True)
class Document:
    """One text, or one ready row of token ids; ``label`` is its language or kind."""

    label: str
    text: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Part:
    """One source of a specification and the number of rows it should give (None: what it has)."""

    source: str
    rows: int | None = None


@dataclass
class Calibration:
    """Rows of token ids and where they came from.

    tokens  used tokens by label: the language of a text, or the name of the bundled set
    used    documents that went in, wholly or (the last one) in part
    left    documents of local sources that were not needed
    notes   what the user should know, one sentence each
    short   what was asked for and could not be had, one sentence each
    """

    rows: list[list[int]] = field(default_factory=list)
    tokens: Counter[str] = field(default_factory=Counter)
    used: int = 0
    left: int = 0
    notes: list[str] = field(default_factory=list)
    short: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """sha256 over the rows: equal digests mean equal calibration."""
        state = hashlib.sha256()
        for row in self.rows:
            state.update(struct.pack(f"<I{len(row)}I", len(row), *row))
        return state.hexdigest()

    def extend(self, other: "Calibration") -> None:
        self.rows += other.rows
        self.tokens += other.tokens
        self.used += other.used
        self.left += other.left
        self.notes += other.notes
        self.short += other.short


def parse(specification: str) -> list[Part]:
    """``bundled:ja=64,en=64`` -> its parts. Raises UsageError for what it cannot read."""
    name, colon, rest = specification.partition(":")
    if name == "bundled" and colon:
        parts = [_rows_of(item) for item in rest.split(",")]
        for part in parts:
            if part.source not in BUNDLED:
                raise UsageError(
                    f"there is no bundled calibration text '{part.source}'",
                    f"choose from {', '.join(BUNDLED)}",
                )
        return [Part(f"bundled:{part.source}", part.rows) for part in parts]
    return [_rows_of(specification)]


def _rows_of(item: str) -> Part:
    name, equals, rows = item.rpartition("=")
    if not equals:
        return Part(item)
    if not rows.isdecimal() or int(rows) == 0:
        raise UsageError(f"'{rows}' in '{item}' is not a number of rows", "write name=64")
    return Part(name, int(rows))


def overlaps(source: str, specifications: Iterable[str]) -> bool:
    """Whether one of them, which others may have written, names the same text."""
    for specification in specifications:
        try:
            parts = parse(specification)
        except UsageError:
            continue
        if any(_texts(source) & _texts(part.source) for part in parts):
            return True
    return False


def _texts(source: str) -> set[str]:
    return {f"bundled:{name}" for name in BUNDLED} if source == "bundled" else {source}


def public_name(source: str) -> str:
    """A source as it may be published: without the folders of this machine."""
    hub = source.startswith("hf:") and source[3:4] not in ("/", ".", "~")
    return source if hub else Path(source).name


def read(source: str, seed: int) -> Sequence[Document] | Iterator[Document]:
    """The documents of one source (not ``self``, which needs the model): a shuffled list of a
    local source, an iterator over a streamed one. Raises QuantkitError when there is no text."""
    source = SHORTCUTS.get(source, source)
    if source.startswith("hf:"):
        return _from_hub(source, seed)
    if source == "bundled" or source.startswith("bundled:"):
        documents = list(_bundled(source.partition(":")[2]))
    else:
        documents = list(_from_file(source))
    if not documents:
        raise QuantkitError(f"calibration source {source} holds no text")
    if documents[0].ids is None:
        random.Random(seed).shuffle(documents)
    return documents


def check(source: str) -> None:
    """Raises what :func:`read` would raise of a source that is none; nothing is read."""
    source = SHORTCUTS.get(source, source)
    if source not in ("self", "bundled") and not source.startswith(("hf:", "bundled:")):
        _file(source)


def pack(
    documents: Sequence[Document] | Iterator[Document],
    tokenizer: Any,
    rows: int | None,
    length: int,
    cap: int,
) -> Calibration:
    """Rows of ``length`` tokens, at most ``rows`` of them (at most ``cap`` when that is None).

    The last row may be shorter; it is kept. Rows of ready ``input_ids`` are taken as they are.
    Reading stops when there is enough. Raises QuantkitError when there is nothing.
    """
    limit = cap if rows is None else rows
    result = Calibration()
    stream: list[int] = []
    for document in documents:
        if len(result.rows) * length + len(stream) >= limit * length:
            break
        result.used += 1
        ids = encode(document, tokenizer)
        if document.ids is not None:
            result.rows.append(ids)
        else:
            ids = ids[: limit * length - len(stream)]
            stream += ids
        result.tokens[document.label] += len(ids)
    if isinstance(documents, Sequence):
        result.left = len(documents) - result.used
    result.rows += [stream[i : i + length] for i in range(0, len(stream), length)]
    if not result.rows:
        raise QuantkitError("the calibration text is empty", "give text with --calib")
    if rows is not None and len(result.rows) < rows:
        result.short.append(f"{rows} rows were asked for, the text gives {len(result.rows)}")
    return result


def encode(document: Document, tokenizer: Any) -> list[int]:
    """Token ids of a document, with the end-of-text token after it (ready ids stay as they are)."""
    if document.ids is not None:
        vocabulary = len(tokenizer)
        if any(not 0 <= token < vocabulary for token in document.ids):
            raise QuantkitError(
                f"a row of input_ids holds ids outside of the vocabulary (0 to {vocabulary - 1})",
                "the rows were made with another tokenizer",
            )
        return list(document.ids)
    if document.messages is not None and tokenizer.chat_template:
        for message in document.messages:
            refuse_halves(message["content"])
        filled = _templated(document.messages, tokenizer)
        return list(tokenizer.encode(filled, add_special_tokens=False))
    text = document.text or ""
    if document.messages is not None:
        text = "\n\n".join(message["content"] for message in document.messages)
    refuse_halves(text)
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    if ids and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return ids


def _templated(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False))
    except (TemplateError, RecursionError, TypeError, ValueError, LookupError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise QuantkitError(
            f"the model's chat template fails on calibration messages ({error}): {roles:.60}",
            "give messages of roles that it knows, in their order, or plain text",
        ) from error


def language(text: str) -> str:
    """A rough label by script: ja, zh, ko, cyrillic, arabic or latin."""
    counts = Counter(_script(character) for character in text[:4000])
    if counts["kana"] * 10 > counts["han"]:
        counts["ja"] = counts.pop("kana") + counts.pop("han", 0)
    else:
        counts["zh"] = counts.pop("han", 0) + counts.pop("kana", 0)
    del counts[""]
    label, most = max(counts.items(), key=lambda item: item[1])
    return label if most else "latin"


def _script(character: str) -> str:
    code = ord(character)
    for label, first, last in (
        ("latin", 0x41, 0x24F),
        ("cyrillic", 0x400, 0x52F),
        ("arabic", 0x600, 0x77F),
        ("kana", 0x3041, 0x30FF),
        ("han", 0x3400, 0x9FFF),
        ("ko", 0xAC00, 0xD7A3),
    ):
        if first <= code <= last:
            return label
    return ""


def _bundled(name: str) -> Iterator[Document]:
    if name and name not in BUNDLED:
        raise UsageError(
            f"there is no bundled text '{name}'", f"use bundled:NAME with {', '.join(BUNDLED)}"
        )
    for label in [name] if name else BUNDLED:
        for _, row in _json_lines(data.calibration() / f"{label}.jsonl"):
            yield _document(row, label, "bundled")


def _file(source: str) -> tuple[Path, str | None]:
    """The file, and the column of it, that a source means. Raises UsageError and QuantkitError when
    there is none."""
    column = None
    try:
        path = Path(source).expanduser()
        if not path.exists() and ":" in source:
            before, _, column = source.rpartition(":")
            path = Path(before).expanduser()
    except (OSError, RuntimeError) as error:  # names that no disk takes, users that there are not
        raise QuantkitError(f"there is no file {source:.80}") from error
    if path.suffix.lower() not in _SUFFIXES:
        raise UsageError(
            f"'{source}' is not a calibration source",
            "use bundled, self, a .txt/.jsonl/.csv/.parquet file, hf:<dataset>, or one of "
            + ", ".join(SHORTCUTS),
        )
    if not path.is_file():
        raise QuantkitError(f"there is no file {path}")
    return path, column


def _from_file(source: str) -> Iterator[Document]:
    path, column = _file(source)
    try:
        if path.suffix.lower() == ".txt":
            text = path.read_text("utf-8-sig")
            yield from [Document(language(text), text=text)] if text.strip() else []
            return
        for where, row in _rows(path):
            yield _document(_pick(row, column, f"{path}, {where}"), None, f"{path}, {where}")
    except OSError as error:
        raise QuantkitError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise QuantkitError(
            f"{path} is not UTF-8 text ({error.reason})", "convert it to UTF-8 first"
        ) from error


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    kind = path.suffix.lower()
    if kind == ".jsonl":
        yield from _json_lines(path)
    elif kind == ".csv":
        csv.field_size_limit(_CSV_FIELD)
        with path.open(encoding="utf-8-sig", newline="") as file:
            try:
                for number, record in enumerate(csv.DictReader(file), 2):
                    yield f"row {number}", record
            except csv.Error as error:
                raise QuantkitError(f"{path} is not a readable CSV file ({error})") from error
    else:
        import_datasets()
        import pyarrow.parquet

        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                for record in batch.to_pylist():
                    yield "a row", record
        except pyarrow.ArrowException as error:
            raise QuantkitError(f"{path} is not a readable parquet file ({error})") from error


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise QuantkitError(f"{path}, line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise QuantkitError(f"{path}, line {number} is not a JSON object")
            yield f"line {number}", row


def _pick(row: dict[str, Any], column: str | None, where: str) -> dict[str, Any]:
    if column is None:
        return row
    if column not in row:
        raise QuantkitError(
            f"{where} has no column '{column}'", f"it has {', '.join(map(str, row))}"
        )
    value = row[column]
    return {"messages": value} if isinstance(value, list) else {"text": value}


def _document(row: Mapping[str, Any], label: str | None, where: str) -> Document:
    """Text, chat messages or ready ids, whichever the row holds."""
    if isinstance(row.get("input_ids"), list):
        ids = row["input_ids"]
        if not ids or not all(type(token) is int for token in ids):
            raise QuantkitError(f"{where}: input_ids should be a list of numbers")
        return Document(label or "ids", ids=tuple(ids))
    if isinstance(row.get("messages"), list):
        messages = row["messages"]
        if not messages or not all(
            isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m
            for m in messages
        ):
            raise QuantkitError(f"{where}: messages should be a list of role and content")
        label = label or language("".join(m["content"] for m in messages))
        return Document(label, messages=tuple(messages))
    for key in _TEXT_KEYS:
        if isinstance(row.get(key), str):
            return Document(label or language(row[key]), text=row[key])
    for key in _TEXT_KEYS:
        if key in row:
            raise QuantkitError(f"{where}: {key} should be a string")
    raise QuantkitError(
        f"{where} has neither text nor messages nor input_ids (it has {', '.join(map(str, row))})",
        "name the column after the file: data.csv:question",
    )


def import_datasets() -> Any:
    """The ``datasets`` library, or an error that says how to get it."""
    try:
        import datasets
    except ImportError as error:
        raise QuantkitError(
            "this calibration source needs the 'datasets' library",
            "pip install 'quantkit[datasets]'",
        ) from error
    return datasets


def _from_hub(source: str, seed: int) -> Iterator[Document]:
    name, config, split, column = (source.split(":")[1:] + [""] * 4)[:4]
    if not name:
        raise UsageError(f"'{source}' names no dataset", "write hf:<dataset>")
    datasets = import_datasets()
    try:
        stream = datasets.load_dataset(
            name, config or None, split=split or "train", streaming=True
        ).shuffle(seed=seed, buffer_size=1000)
        for row in stream:
            yield _document(_pick(row, column or None, name), None, name)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise QuantkitError(
            f"dataset {name} could not be read ({reason})",
            "write hf:<dataset>:<config>:<split>:<column>",
        ) from error
