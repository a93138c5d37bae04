"""Tables of examples: .jsonl, .json, .csv, .tsv and .parquet as rows by column name, each with its place (file:line).

Columns are known by the names that data sets use (COLUMNS); a table without a header has text and label, or two
sentences and a score.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wherry.errors import BadInput
from wherry.shelf import missing

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
# what a column is -> the names that it goes by; the first that a table has counts
COLUMNS = {
    "file": ("file", "file_name", "filename", "path"),
    "image": ("image", "img"),
    "audio": ("audio",),
    "first": ("sentence1", "sentence_1", "premise", "question1"),
    "second": ("sentence2", "sentence_2", "hypothesis", "question2"),
    "source": ("source",),
    "text": ("text", "sentence", "content", "review"),
    "words": ("words", "tokens"),
    "boxes": ("boxes", "bboxes"),
    "segments": ("segments",),
    "label": ("label", "labels", "score", "similarity_score", "class", "category", "target", "tags", "transcription"),
}
Row = dict[str, Any]


def read(path: Path, raw: bytes) -> tuple[list[Row], list[str], bool]:
    """Rows under the keys of COLUMNS (others are dropped), their places, and whether the table named its columns.

    Raises:
        BadInput: not of its form (with the line), not UTF-8, or without a column that is known.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        rows: list[tuple[str, Row]] = list(_parquet(path, raw))
    else:
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadInput(f"{path} is not UTF-8 text: byte {error.start}") from error
        if kind in (".csv", ".tsv"):
            return _delimited(path, text, "\t" if kind == ".tsv" else ",")
        rows = list(_jsonl(path, text))
    known = [(place, {what: row[name] for what, name in columns(row).items()}) for place, row in rows]
    for place, row in known:
        if not row.keys() - {"label", "boxes", "segments", "second"}:
            raise BadInput(
                f'{place}: not an object with a field "text" (or another that is known:'
                f" {', '.join(names[0] for names in COLUMNS.values())})"
            )
    return [row for _, row in known], [place for place, _ in known], True


def columns(names: Any) -> dict[str, str]:
    """{what it is: the table's own name} of the columns that are known."""
    given = {str(name).strip().lower(): name for name in names}
    found = {what: next((given[n] for n in known if n in given), None) for what, known in COLUMNS.items()}
    if found["source"] is None and found["text"] is None and "target" in given and "input" in given:
        found["source"] = given["input"]
    return {what: name for what, name in found.items() if name is not None}


def _jsonl(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    if text.lstrip().startswith("["):
        try:
            for number, found in enumerate(json.loads(text), 1):
                if not isinstance(found, dict):
                    raise BadInput(f"{path}: element {number} is not an object, but a {type(found).__name__}")
                yield f"{path.name}[{number}]", found
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path} is not JSON: {error}") from error
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f'{path}:{number}: not a JSON object with a field "text"') from error
        if not isinstance(found, dict):
            raise BadInput(f'{path}:{number}: not a JSON object with a field "text", but a {type(found).__name__}')
        yield f"{path.name}:{number}", found


def _parquet(path: Path, raw: bytes) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise missing(error, "reading parquet") from error
    try:
        names = parquet.ParquetFile(io.BytesIO(raw)).schema_arrow.names
        table = parquet.read_table(io.BytesIO(raw), columns=list(columns(names).values()))
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise BadInput(f"{path} is not a parquet file: {' '.join(str(error).split())[:160]}") from error
    for number, row in enumerate(rows, 1):
        yield f"{path.name}: row {number}", row


def _delimited(path: Path, text: str, delimiter: str) -> tuple[list[Row], list[str], bool]:
    quoting: Any = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
    lines: list[tuple[int, list[str]]] = []
    try:
        for row in reader:
            if row and not row[0].startswith("#"):
                lines.append((reader.line_num, row))
    except csv.Error as error:
        raise BadInput(f"{path}:{reader.line_num} is not a row of a table: {error}") from error
    if not lines:
        return [], [], False
    head = columns(lines[0][1])
    if not head.keys() & {"file", "image", "audio", "first", "source", "text"}:
        return _headless(path, lines)
    places = {what: lines[0][1].index(name) for what, name in head.items()}
    rows = []
    for number, row in lines[1:]:
        if len(row) != len(lines[0][1]):
            raise BadInput(
                f"{path}:{number}: {len(row)} columns, the header has {len(lines[0][1])}"
                + (" (a comma inside of a text wants quotes)" if delimiter == "," else "")
            )
        rows.append({what: row[i] for what, i in places.items()})
    return rows, [f"{path.name}:{number}" for number, _ in lines[1:]], True


def _headless(path: Path, lines: list[tuple[int, list[str]]]) -> tuple[list[Row], list[str], bool]:
    rows: list[Row] = []
    places = []
    for i, (number, row) in enumerate(lines):
        if len(lines[0][1]) == 2 and len(row) == 2:
            rows.append({"text": row[0], "label": row[1]})
        else:
            try:
                if len(lines[0][1]) == 2:
                    raise ValueError(f"{len(row)} columns after rows of 2")
                rows.append({"first": row[0], "second": row[1], "label": float(row[2])})
            except (IndexError, ValueError) as error:
                if i == 0:  # a header in words that are not known
                    continue
                raise BadInput(
                    f"{path}:{number}: not two sentences and a score, nor text and label, nor a table with a"
                    " column 'text'"
                ) from error
        places.append(f"{path.name}:{number}")
    return rows, places, False
