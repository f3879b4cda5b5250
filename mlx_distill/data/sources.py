"""Where rows come from: a file, a dataset of the hub, or a task of our own.

In: the `[data]` table of a recipe. Out: rows as plain dictionaries, each with the words that say where it stands.
Decided here: which files are read (`SOURCES`, by ending) and what is told where there is none.
"""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_distill.data.examples import Example
from mlx_distill.errors import DataError, NotFound
from mlx_distill.recipe import DataTable

Row = dict[str, Any]


def rows_of(data: DataTable) -> Iterator[tuple[str, Row]]:
    """(where, row) for each row of a file or a hub dataset; where is "line 7" or "row 7", counted from 1."""
    path = Path(data.source).expanduser()
    if path.suffix in SOURCES or path.exists():
        if not path.is_file():
            raise NotFound(f"data.source: {data.source} is {'a folder' if path.exists() else 'not there'}"
                           f"{_neighbours(path)}; name a {', '.join(SOURCES)} file")
        if path.suffix not in SOURCES:
            raise DataError(f"data.source: {data.source} ends in {path.suffix!r}; known are {', '.join(SOURCES)}")
        if data.config:
            raise DataError(f"{data.source}: data.config = {data.config!r} names a part of a hub dataset; "
                            "leave it empty for a file")
        return SOURCES[path.suffix](path, data.source)
    return _hub_rows(data)


def _neighbours(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    names = sorted(file.name for file in folder.iterdir() if file.suffix in SOURCES) if folder.is_dir() else []
    return f" ({folder} holds {', '.join(names[:8])})" if names else ""


def _jsonl(path: Path, name: str) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", _object(line, f"{name}, line {number}")


def _object(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{where}: not readable as JSON ({error}); correct or delete the line") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON {type(row).__name__}, expected an object with columns; correct the line")
    return row


def _json(path: Path, name: str) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(path.read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = "is it JSON lines? Then name it .jsonl" if error.msg == "Extra data" else "correct the file"
        raise DataError(f"{name}, line {error.lineno}: not readable as JSON ({error.msg}); {hint}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 ({error}); save it as UTF-8") from None
    if not isinstance(rows, list):
        raise DataError(f"{name}: a JSON {type(rows).__name__}, expected a list of objects; put the rows into a list")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{name}, row {number}: a JSON {type(row).__name__}, expected an object; correct the row")
        yield f"row {number}", row


def _csv(path: Path, name: str) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(1 << 30)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise csv.Error(f"its cells are not as many as the {len(reader.fieldnames or ())} columns")
                yield f"line {reader.line_num}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{name}, line {reader.line_num}: not readable as CSV ({error}); correct the row") from None


def _parquet(path: Path, name: str) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{name}: reading .parquet needs pyarrow; pip install 'mlx-distill[data]'") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = f"not readable as Parquet ({_line(error)})"
        raise DataError(f"{name}, after row {number}: {reason}; fetch it again") from None


SOURCES: dict[str, Callable[[Path, str], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet,
}


def _hub_rows(data: DataTable) -> Iterator[tuple[str, Row]]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"data.source: {data.source} is no file here, and hub datasets need the datasets package; "
                        "pip install 'mlx-distill[data]', or name a file") from None
    asked = data.source + (f" ({data.config})" if data.config else "")
    try:
        dataset = datasets.load_dataset(data.source, data.config or None, split=data.split)
    except Exception as error:  # datasets, huggingface_hub, fsspec and requests each bring their own kinds
        raise NotFound(f"data.source: {asked}, split {data.split!r} is no file here and could not be loaded from the "
                       f"hub: {_line(error)}; check the id, data.config and data.split, go online (HF_HUB_OFFLINE "
                       "unset), or name a local .jsonl or .parquet file") from None
    for number, row in enumerate(dataset, 1):
        yield f"row {number}", row


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def embedded_examples(data: DataTable, seed: int) -> Iterator[Example]:
    from mlx_distill.embedded import EMBEDDED, PARTITIONS  # {name: generate(partition, count, seed) -> list[Example]}

    name = data.source.removeprefix("embedded:")
    if name not in EMBEDDED:
        raise NotFound(f"data.source: no embedded task {name!r}; there are: {', '.join(EMBEDDED)}")
    if data.split not in PARTITIONS:
        raise DataError(f"{data.source}: no split {data.split!r}; there are: {', '.join(PARTITIONS)}")
    if not data.train_examples:
        raise DataError(f"{data.source}: an embedded task has no end; set data.train_examples to a number above 0")
    yield from EMBEDDED[name](data.split, data.train_examples + data.validation_examples, seed)
