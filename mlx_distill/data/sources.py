"""Where rows come from: a file, a dataset of the hub, or a task of our own.

In: the `[data]` table of a recipe. Out: rows as plain dictionaries, each with the words that say
where it stands. Decided here: which files are read (`SOURCES`, by ending, in any case and packed
with gzip or not), how a table's cells are separated, what is no value (NaN; what a column format
fills in for an absent key), and what is told where there are no rows.
"""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_distill.data.examples import MOST_HELD_OUT, Example, make_example
from mlx_distill.errors import DataError, NotFound
from mlx_distill.files import all_lines, of_people, one_line
from mlx_distill.models.reach import hub_at_hand
from mlx_distill.readers import path_of, read_json, read_json_lines, read_lines, read_text
from mlx_distill.recipe.tables import DataTable

Row = dict[str, Any]
SEPARATORS = ",;\t|"
STREAM_BUFFER = 10_000  # rows among which a stream's next one is drawn


def rows_of(data: DataTable, seed: int = 0) -> Iterator[tuple[str, Row]]:
    """(where, row) for each row of a file or a hub dataset; where is "line 7" or "row 7", counted
    from 1. `seed` draws the rows of a stream.
    """
    path = path_of(data.source, "data.source", DataError)
    read = SOURCES.get(_ending(path))
    if not read and not path.exists():
        return _hub_rows(data, seed)
    if not path.is_file():
        found = "a folder" if path.exists() else "not there"
        raise NotFound(
            f"data.source: {data.source} is {found}{_neighbours(path)}; name a "
            f"{', '.join(SOURCES)} file"
        )
    if not read:
        raise DataError(
            f"data.source: {data.source} ends in {path.suffix!r}; known are {', '.join(SOURCES)}"
        )
    if data.config:
        raise DataError(
            f"{data.source}: data.config = {data.config!r} names a part of a hub dataset; leave "
            "it empty for a file"
        )
    if data.stream_rows:
        raise DataError(
            f"{data.source}: data.stream_rows = {data.stream_rows} is for a hub dataset; set it to 0 "
            "for a file"
        )
    return read(path, data.source)


def _ending(path: Path) -> str:
    """ ".jsonl" of rows.jsonl, ROWS.JSONL and rows.jsonl.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _neighbours(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    names = [file.name for file in of_people(folder) if _ending(file) in SOURCES]
    return f" ({folder} holds {', '.join(names[:8])})" if names else ""


# files


def _json_lines(path: Path, name: str) -> Iterator[tuple[str, Row]]:
    number, row = 0, None
    try:
        for number, row in read_json_lines(path, name):
            if not isinstance(row, dict):
                found = type(row).__name__
                raise DataError(
                    f"{name}, line {number}: a JSON {found}, expected an object with columns"
                )
            yield f"line {number}", row
    except DataError as error:
        of_the_line = ": not valid JSON" in str(error) or ": a JSON " in str(error)
        advice = "correct or delete the line"
        if isinstance(row, list) or (
            not number and _first_line(path, name).strip() in ("{", "[", "[{")
        ):
            advice = "is it one list over many lines? Then name it .json"
        raise DataError(f"{error}; {advice}" if of_the_line else str(error)) from None


def _first_line(path: Path, name: str) -> str:
    return next((line for _, line in read_lines(path, name) if line.strip()), "")


def _json(path: Path, name: str) -> Iterator[tuple[str, Row]]:
    try:
        rows = read_json(path, name)
    except DataError as error:
        if "(Extra data" not in str(error):
            raise
        raise DataError(f"{error}; is it JSON lines? Then name it .jsonl") from None
    if not isinstance(rows, list):
        raise DataError(
            f"{name}: a JSON {type(rows).__name__}, expected a list of objects; put the rows into "
            "a list"
        )
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(
                f"{name}, row {number}: a JSON {type(row).__name__}, expected an object; correct "
                "the row"
            )
        yield f"row {number}", row


def _table(path: Path, name: str) -> Iterator[tuple[str, Row]]:
    """Cells of text under a line of column names, separated by what separates the names."""
    csv.field_size_limit(1 << 30)
    text = read_text(path, name)
    header = text.lstrip("\r\n").splitlines()[0] if text.strip() else ""
    if re.fullmatch("sep=.", header, re.IGNORECASE):
        raise DataError(f"{name}: its first line {header!r} is for Excel alone; delete it")
    separator = _separator(header)
    reader = csv.DictReader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        skipinitialspace=f"{separator} " in header,
        strict=True,
    )
    try:
        twice = [column for column, count in Counter(reader.fieldnames or ()).items() if count > 1]
        if twice:
            raise DataError(f"{name}: two columns are called {twice[0]!r}; rename one")
        for row in reader:
            if None in row or None in row.values():
                what = f"its cells are not as many as the {len(reader.fieldnames or ())} columns"
                raise DataError(_unreadable_row(name, reader.line_num, what))
            yield f"line {reader.line_num}", row
    except csv.Error as error:  # of a row that begins after the last one
        unclosed = "unexpected end" in str(error)
        what = 'a quote (") that is opened there is never closed' if unclosed else str(error)
        raise DataError(_unreadable_row(name, reader.line_num + 1, what)) from None


def _unreadable_row(name: str, line: int, what: str) -> str:
    return f"{name}, line {line}: not readable as CSV ({what}); correct the row"


def _separator(header: str) -> str:
    """What separates column names most often: a comma, semicolon, tab or bar; quoted names may hold
    any of them.
    """
    unquoted = "".join(header.split('"')[::2])
    return max(SEPARATORS, key=unquoted.count)


def _parquet(path: Path, name: str) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"{name}: reading .parquet needs pyarrow; pip install 'mlx-distill[data]'"
        ) from None
    if path.suffix.lower() == ".gz":
        raise DataError(
            f"{name}: Parquet packs its columns itself and is not read from .gz; unpack it"
        )
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", _filled(row)
    except (pyarrow.ArrowException, OSError) as error:
        reason = f"not readable as Parquet ({one_line(error)})"
        raise DataError(f"{name}, after row {number}: {reason}; fetch it again") from None


SOURCES: dict[str, Callable[[Path, str], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
}


# the hub


def _hub_rows(data: DataTable, seed: int) -> Iterator[tuple[str, Row]]:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"data.source: {data.source} is no file here, and hub datasets need the datasets "
            "package; pip install 'mlx-distill[data]', or name a file"
        ) from None
    asked = data.source + (f" ({data.config})" if data.config else "")
    try:
        with hub_at_hand():
            dataset = _opened(datasets, data, seed)
    except (
        Exception
    ) as error:  # datasets, huggingface_hub, fsspec and requests each bring their own kinds
        raise NotFound(
            f"data.source: {asked}, split {data.split!r} is no file here and could not be loaded "
            f"from the hub: {all_lines(error, 200)}; {_hub_remedy(str(error))}"
        ) from None
    for number, row in enumerate(dataset, 1):
        yield f"row {number}", _filled(row)


def _opened(datasets: Any, data: DataTable, seed: int) -> Any:
    """A stored dataset, or where only some rows are taken a stream, whose order the seed draws."""
    name = data.source, data.config or None
    if not data.stream_rows:
        return datasets.load_dataset(*name, split=data.split)
    stream = datasets.load_dataset(*name, split=data.split, streaming=True)
    return stream.shuffle(seed=seed % 2**32, buffer_size=STREAM_BUFFER)


def _hub_remedy(said: str) -> str:
    """What to do about what the hub's libraries said."""
    for words, advice in HUB_REMEDIES.items():
        if re.search(words, said, re.IGNORECASE):
            return advice
    return "check the id, or name a local .jsonl or .parquet file"


HUB_REMEDIES = {
    "BuilderConfig|config name": "set data.config to one that it has",
    "unknown split|bad split": "set data.split to one that it has",
    "offline|couldn't reach|connection|resolve": "go online (HF_HUB_OFFLINE unset), or name a "
    "local .jsonl or .parquet file",
    "gated|authenticat|401|403": "log in with `hf auth login` and accept its terms",
}


def _filled(row: Row) -> Row:
    """A row of a column format without what it had to fill in: every object there has every key of
    every other one.
    """
    return {column: _without_absent(value) for column, value in row.items()}


def _without_absent(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_absent(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_absent(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# tasks of our own


def embedded_examples(data: DataTable, seed: int) -> Iterator[Example]:
    """Worked problems of `embedded:NAME`, which writes as many as a recipe asks for."""
    from mlx_distill.embedded import (
        EMBEDDED,
        PARTITIONS,
    )  # {name: generate(partition, count, seed) -> list[Worked]}

    name = data.source.removeprefix("embedded:")
    if name not in EMBEDDED:
        raise NotFound(f"data.source: no embedded task {name!r}; there are: {', '.join(EMBEDDED)}")
    if data.split not in PARTITIONS:
        raise DataError(
            f"{data.source}: no split {data.split!r}; there are: {', '.join(PARTITIONS)}"
        )
    columns = [field for field in type(data).model_fields if field.endswith("_column")]
    for field in ("config", "where", "stream_rows", *columns):
        if value := getattr(data, field):
            raise DataError(
                f"{data.source}: data.{field} = {value!r} is about rows, and an embedded task has "
                "none: leave it out"
            )
    if not data.train_examples:
        raise DataError(
            f"{data.source}: an embedded task has no end; set data.train_examples to a number "
            "above 0"
        )
    held_out = data.validation_examples or MOST_HELD_OUT
    worked = EMBEDDED[name](data.split, data.train_examples + held_out, seed)
    yield from (make_example(*row) for row in worked)
