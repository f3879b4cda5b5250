"""Rows of a dataset → `Example`s, and `Example`s → a training and a validation side.

In: the `[data]` table of a recipe. Out: plain text split into prompt, reasoning and answer. Decided here: where rows
come from (`SOURCES` by file ending, a hub dataset, `embedded:NAME`), how a row is read (`FORMATS`, one function each),
what is skipped, and which rows are held out.

A row that cannot be *understood* (bad JSON, no such column) stops the run with its file, line and remedy. A row that
has nothing to *learn from* (no reasoning, no answer) raises `Skip`; whoever walks the rows counts its reason.

Column settings left empty take the format's usual names (`COLUMNS`). Public datasets and how to name them:

| dataset | format | settings |
|---|---|---|
| bespokelabs/Bespoke-Stratos-17k, open-thoughts/OpenThoughts-114k, NovaSky-AI/Sky-T1_data_17k | conversations | – |
| PrimeIntellect/SYNTHETIC-1 | response | response_column = "llm_response", where = {task_type = "verifiable_math"} |
| nvidia/Llama-Nemotron-Post-Training-Dataset (config = "SFT", split = "math") | response | prompt_column = "input", \
response_column = "output" |
| openai/gsm8k (config = "main") or its .jsonl files | gsm8k | – |
"""

import csv
import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.errors import DataError, NotFound
from mlx_distill.recipe import DataTable

Turns = tuple[tuple[str, str], ...]
Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One worked problem as plain text.

    `prompt` is what the user says last, `history` the (role, content) turns before it, a system message included and
    without the reasoning of earlier assistant turns. `cot` is the reasoning without its `<think>` tags, `answer` what
    follows it; both without white space around them. `id` is a digest of the content (`example_id`), so it does not
    depend on the order of the file: two rows that say the same are one example.
    """

    id: str
    prompt: str
    cot: str
    answer: str
    history: Turns = ()


class Skip(Exception):
    """A row with nothing to learn from; its only argument is the reason under which it is counted. Never leaves
    data/."""


def example_id(prompt: str, cot: str, answer: str, history: Turns = ()) -> str:
    """16 hexadecimal digits that depend on the text of an example and on nothing else."""
    text = json.dumps([prompt, cot, answer, history], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_example(prompt: str, cot: str, answer: str, history: Turns = ()) -> Example:
    """An `Example` with its white space trimmed and its id made; raises `Skip` where a part is empty."""
    cot, answer = cot.strip(), answer.strip()
    for name, text in (("prompt", prompt.strip()), ("reasoning", cot), ("answer", answer)):
        if not text:
            raise Skip(f"no {name}")
    return Example(example_id(prompt, cot, answer, history), prompt, cot, answer, history)


# ---------------------------------------------------------------------------------------------- reading and splitting


def read_examples(data: DataTable, seed: int = 0, skipped: Counter[str] | None = None) -> Iterator[Example]:
    """Every usable example of `data.source`, in its order, each id once; reasons for the others are added to `skipped`.

    `seed` matters to `embedded:NAME` alone, which writes `validation_examples + train_examples` problems of its own.
    Raises `NotFound` for a source that is not there, `DataError` for a row that cannot be read and when nothing is
    left.
    """
    skipped = Counter() if skipped is None else skipped
    found: set[str] = set()
    before = skipped.copy()
    for item in _embedded(data, seed) if data.source.startswith("embedded:") else _read_rows(data):
        if isinstance(item, Example) and item.id not in found:
            found.add(item.id)
            yield item
        else:
            skipped["same as an earlier row" if isinstance(item, Example) else item] += 1
    if not found:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in (skipped - before).most_common())
        raise DataError(
            f"{data.source}: no usable example with format = {data.format!r}: {reasons or 'it has no rows'}; "
            "check data.format, the column names and data.where"
        )


def split_examples(
    examples: Iterable[Example],
    data: DataTable,
    seed: int,
    usable: Callable[[Example], bool] = lambda example: True,
    skipped: Counter[str] | None = None,
) -> tuple[list[Example], list[Example]]:
    """(training, validation) examples: a seeded shuffle, the validation side filled first.

    No prompt (with its history) is on both sides: training rows that ask a held-out question are counted in `skipped`.
    `usable` is asked once for each example that is about to be taken (it renders and checks lengths), so that the
    numbers asked for are the numbers got. Raises `DataError` where there are too few.
    """
    skipped = Counter() if skipped is None else skipped
    pool = list(examples)
    order = np.random.default_rng([seed, 0x5B117]).permutation(len(pool))
    shuffled = (pool[index] for index in order)
    validation: list[Example] = []
    while len(validation) < data.validation_examples and (example := next(shuffled, None)):
        if usable(example):
            validation.append(example)
    held_out = {(example.history, example.prompt.strip()) for example in validation}
    train: list[Example] = []
    while (not data.train_examples or len(train) < data.train_examples) and (example := next(shuffled, None)):
        if (example.history, example.prompt.strip()) in held_out:
            skipped["its prompt is in the validation set"] += 1
        elif usable(example):
            train.append(example)
    _refuse_too_few(data, len(pool), len(train), len(validation), skipped)
    return train, validation


def _refuse_too_few(data: DataTable, rows: int, train: int, validation: int, skipped: Counter[str]) -> None:
    if validation == data.validation_examples and train >= max(1, data.train_examples):
        return
    reasons = "".join(f", {count} × {reason}" for reason, count in skipped.most_common())
    raise DataError(
        f"{data.source}: asked for {data.validation_examples} validation and {data.train_examples or 'at least 1'} "
        f"training examples, found {validation} and {train} usable ones in {rows} examples{reasons}; "
        "lower data.validation_examples or data.train_examples, or raise data.longest_tokens"
    )


# -------------------------------------------------------------------------------------------------------- row formats


@dataclass(frozen=True)
class Place:
    """Where a row was read, for error messages: the source, the line or row, and the recipe's `[data]` table."""

    where: str
    data: DataTable

    def value(self, row: Row, role: str) -> Any:
        """The value of the column that plays `role` ("prompt", "cot", …); raises `DataError` where there is none."""
        return self.cell(row, self.column(role), f"data.{role}_column")

    def column(self, role: str) -> str:
        return getattr(self.data, f"{role}_column") or COLUMNS[self.data.format][role]

    def cell(self, row: Row, column: str, field: str) -> Any:
        if column in row:
            return row[column]
        near = difflib.get_close_matches(column, row, 1, 0.5)
        hint = f"did you mean {near[0]!r}? Set {field}" if near else f"set {field} or data.format"
        raise DataError(f"{self.where}: no column {column!r}, found {', '.join(map(str, row)) or 'none'}; {hint}")

    def text(self, row: Row, role: str) -> str:
        """A column's value as text: numbers are written out, null is empty."""
        value = self.value(row, role)
        if isinstance(value, (list, dict)):
            kind = type(value).__name__
            hint = "use format = \"messages\" or \"conversations\", or another column"
            raise DataError(f"{self.where}: column {self.column(role)!r} holds a {kind}, text was expected; {hint}")
        return _text(value)

    def turns(self, row: Row, role: str, who: str = "role", what: str = "content") -> list[tuple[str, str, str]]:
        """A column that holds a list of messages as (role, content, reasoning) with the roles' usual names."""
        value, column = self.value(row, role), self.column(role)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                value = None
        if not isinstance(value, list) or not all(isinstance(turn, dict) and who in turn for turn in value):
            raise DataError(f"{self.where}: column {column!r} is no list of objects with {who!r} and {what!r}; "
                            "set data.format to what it holds")
        return [
            (ROLES.get(str(turn[who]), str(turn[who])), _content(turn.get(what)), _text(turn.get("reasoning_content")))
            for turn in value
        ]


def _columns(row: Row, place: Place) -> Example:
    """Three columns of text: prompt, cot, answer."""
    history, prompt = _prompt(row, place)
    return make_example(prompt, place.text(row, "cot"), place.text(row, "answer"), history)


def _response(row: Row, place: Place) -> Example:
    """A prompt (text, or a list of messages) and one text that holds reasoning and answer."""
    history, prompt = _prompt(row, place)
    cot, answer = split_reasoning(place.text(row, "response"))
    return make_example(prompt, cot, answer, history)


def _messages(row: Row, place: Place) -> Example:
    """A list of role/content messages whose last assistant turn is learned."""
    return _last_turn(place.turns(row, "messages"))


def _conversations(row: Row, place: Place) -> Example:
    """The Bespoke-Stratos layout: from/value turns; the system message only asks for the markers and is dropped."""
    turns = place.turns(row, "messages", "from", "value")
    return _last_turn([turn for turn in turns if turn[0] != "system"])


def _gsm8k(row: Row, place: Place) -> Example:
    """GSM8K: worked steps with `<<48/2=24>>` annotations (removed), then `#### N`."""
    steps, mark, answer = place.text(row, "answer").rpartition("####")
    if not mark:
        raise Skip("no #### before the answer")
    return make_example(place.text(row, "prompt"), re.sub(r"<<[^<>]*>>", "", steps), answer)


FORMATS: dict[str, Callable[[Row, Place], Example]] = {
    "columns": _columns, "response": _response, "messages": _messages, "conversations": _conversations, "gsm8k": _gsm8k,
}

COLUMNS: dict[str, dict[str, str]] = {
    "columns": {"prompt": "prompt", "cot": "cot", "answer": "answer"},
    "response": {"prompt": "prompt", "response": "response"},
    "messages": {"messages": "messages"},
    "conversations": {"messages": "conversations"},
    "gsm8k": {"prompt": "question", "answer": "answer"},
}

ROLES = {"human": "user", "gpt": "assistant"}  # others are their own names

MARKED = (
    re.compile(r"\s*(?:<think>)?(?P<cot>.*?)</think>(?P<answer>.*)", re.DOTALL),
    re.compile(
        r".*?<\|begin_of_thought\|>(?P<cot>.*?)<\|end_of_thought\|>\s*(?:<\|begin_of_solution\|>)?"
        r"(?P<answer>.*?)(?:<\|end_of_solution\|>\s*)?",
        re.DOTALL,
    ),
)


def split_reasoning(text: str) -> tuple[str, str]:
    """(reasoning, answer) of a response; raises `Skip` where its reasoning is missing or never closed.

    Understands `<think>…</think>answer` (the opening tag may be missing: some templates put it into the prompt) and
    `<|begin_of_thought|>…<|end_of_thought|><|begin_of_solution|>…<|end_of_solution|>`. A second pair of tags stays in
    the answer and is refused when the example is rendered.
    """
    for pattern in MARKED:
        if match := pattern.fullmatch(text):
            return match["cot"], match["answer"]
    raise Skip("reasoning never closed" if "<think>" in text or "<|begin_of_thought|>" in text else "no reasoning")


def _last_turn(turns: list[tuple[str, str, str]]) -> Example:
    last = max((index for index, turn in enumerate(turns) if turn[0] == "assistant"), default=0)
    if not turns or turns[last][0] != "assistant":
        raise Skip("no assistant turn")
    if last == 0 or turns[last - 1][0] != "user":
        raise Skip("no user turn before the last assistant turn")
    _, content, reasoning = turns[last]
    cot, answer = (reasoning, content) if reasoning.strip() else split_reasoning(content)
    return make_example(turns[last - 1][1], cot, answer, _history(turns[: last - 1]))


def _history(turns: list[tuple[str, str, str]]) -> Turns:
    return tuple((role, _without_reasoning(content) if role == "assistant" else content) for role, content, _ in turns)


def _without_reasoning(content: str) -> str:
    try:
        return split_reasoning(content)[1].strip()
    except Skip:
        return content


def _prompt(row: Row, place: Place) -> tuple[Turns, str]:
    if not isinstance(place.value(row, "prompt"), list):
        return (), place.text(row, "prompt")
    turns = place.turns(row, "prompt")
    if not turns or turns[-1][0] != "user":
        raise Skip("no user turn at the end of the prompt")
    return _history(turns[:-1]), turns[-1][1]


def _content(value: Any) -> str:
    if isinstance(value, list):  # OpenAI's list of parts
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in value):
            raise Skip("content that is not text")
        return "".join(_text(part.get("text")) for part in value)
    return _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


# ------------------------------------------------------------------------------------------------------------ sources


def _read_rows(data: DataTable) -> Iterator[Example | str]:
    """An `Example`, or the reason why there is none, for each row."""
    read = FORMATS[data.format]
    for where, row in _rows(data):
        place = Place(f"{data.source}, {where}", data)
        if any(_text(place.cell(row, column, "data.where")) != value for column, value in data.where.items()):
            yield "not chosen by data.where"
            continue
        try:
            yield read(row, place)
        except Skip as skip:
            yield str(skip)


def _embedded(data: DataTable, seed: int) -> Iterator[Example]:
    from mlx_distill.embedded import EMBEDDED, PARTITIONS  # {name: generate(partition, count, seed) -> list[Example]}

    name = data.source.removeprefix("embedded:")
    if name not in EMBEDDED:
        raise NotFound(f"data.source: no embedded task {name!r}; there are: {', '.join(EMBEDDED)}")
    if data.split not in PARTITIONS:
        raise DataError(f"{data.source}: no split {data.split!r}; there are: {', '.join(PARTITIONS)}")
    if not data.train_examples:
        raise DataError(f"{data.source}: an embedded task has no end; set data.train_examples to a number above 0")
    yield from EMBEDDED[name](data.split, data.train_examples + data.validation_examples, seed)


def _rows(data: DataTable) -> Iterator[tuple[str, Row]]:
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
