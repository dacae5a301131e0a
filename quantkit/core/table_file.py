"""Rows of text in files: .csv, .tsv, .jsonl, and .txt with one text a line.

    table = read(Path("questions.csv"))      table.columns, table.rows, table.encoding
    write(Path("answers.csv"), columns, rows)

Files from Japanese spreadsheets are often cp932 (Shift JIS of Windows), or UTF-8 with a mark at the
beginning: which it is, is seen from the bytes.
"""

import codecs
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.core.checkpoint import write_text
from quantkit.errors import QuantkitError, UsageError

TEXT = "text"  # the one column of a .txt
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_READ = (".csv", ".tsv", ".jsonl", ".txt")
_WRITTEN = (".csv", ".tsv", ".jsonl")
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_FIELD = 1 << 24  # characters in a field at most


@dataclass(frozen=True)
class Table:
    """``columns`` in their order; ``rows`` by column; ``encoding`` as Python calls it."""

    columns: list[str]
    rows: list[dict[str, Any]]
    encoding: str


def read(path: Path, encoding: str = "auto") -> Table:
    """The rows of a file. Raises QuantkitError, naming file and line, when it cannot be read as
    what its name says, and UsageError for another kind of file or an unknown encoding."""
    kind = path.suffix.lower()
    if kind not in _READ:
        raise UsageError(f"quantkit does not read questions from {path}", f"use {', '.join(_READ)}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise QuantkitError(f"{path} cannot be read ({error.strerror})") from error
    encoding = _encoding(raw) if encoding == "auto" else encoding
    try:
        text = raw.decode(encoding)
    except LookupError as error:
        raise UsageError(
            f"there is no encoding '{encoding}'", "utf-8, cp932, euc-jp ..."
        ) from error
    except UnicodeError as error:
        where = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        raise QuantkitError(
            f"{path} is not {encoding} text{where}", "name its --encoding"
        ) from error
    text = text.removeprefix("\ufeff")  # where utf-8 was named for a file with a mark
    if kind == ".txt":
        rows = [{TEXT: line} for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
        return Table([TEXT], rows, encoding)
    if kind == ".jsonl":
        found = _json_lines(path, text)
        return Table(list(dict.fromkeys(name for row in found for name in row)), found, encoding)
    return Table(*_records(path, text), encoding)


def check_writable(path: Path) -> None:
    """Raises UsageError where :func:`write` has no form for a file of this name."""
    if path.suffix.lower() not in _WRITTEN:
        raise UsageError(f"quantkit does not write answers to {path}", f"use {', '.join(_WRITTEN)}")


def write(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]], mark: bool) -> None:
    """Write a file at once, or not at all. ``mark``: begin a .csv so that spreadsheet programs take
    it for UTF-8."""
    kind = path.suffix.lower()
    if kind == ".jsonl":
        write_text(path, "".join(_json(row) + "\n" for row in rows))
        return
    out = io.StringIO()
    writer = csv.DictWriter(
        out, columns, delimiter=_DELIMITERS[kind], lineterminator="\n", restval=""
    )
    careful = csv.DictWriter(
        out, columns, delimiter=_DELIMITERS[kind], lineterminator="\n", quoting=csv.QUOTE_ALL
    )
    writer.writeheader()
    for row in rows:
        cells = {name: _cell(value) for name, value in row.items()}
        # the csv module of Python before 3.13 takes a lone CR for no end of a line, readers do
        wild = any("\r" in str(value) for value in cells.values())
        (careful if wild else writer).writerow(cells)
    text = out.getvalue().encode("utf-8", "replace").decode()  # halves of characters that JSON had
    write_text(path, ("\ufeff" if mark else "") + text)


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # halves of characters, which JSON can spell
        return json.dumps(value)
    return text


def _cell(value: Any) -> Any:
    """A field of a .csv: text, a number, or what JSON had there."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


def _encoding(raw: bytes) -> str:
    """What the bytes are: what a mark says, UTF-8 if they are, else cp932."""
    for mark, name in _MARKS.items():
        if raw.startswith(mark):
            return name
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return "cp932"
    return "utf-8"


def _records(path: Path, text: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows."""
    csv.field_size_limit(_FIELD)
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=_DELIMITERS[path.suffix.lower()], strict=True
    )
    found: list[dict[str, Any]] = []
    try:
        columns = list(reader.fieldnames or [])
        if twice := [name for name in columns if columns.count(name) > 1]:
            raise QuantkitError(f"{path} has two columns '{twice[0]}'", "rename one of them")
        for row in reader:
            if None in row:
                raise QuantkitError(
                    f"{path}, line {reader.line_num}: more fields than there are columns",
                    'put text that has commas in it into "quotes"',
                )
            found.append({name: value or "" for name, value in row.items()})
    except csv.Error as error:
        raise QuantkitError(f"{path}, line {reader.line_num}: {error}") from error
    return columns, found


def _json_lines(path: Path, text: str) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise QuantkitError(f"{path}, line {number}: no JSON ({error})") from error
        if not isinstance(row, dict):
            raise QuantkitError(f"{path}, line {number}: not a JSON object")
        found.append(row)
    return found
