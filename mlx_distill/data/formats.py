"""Rows of a dataset → `Example`s.

In: the `[data]` table of a recipe. Out: plain text split into prompt, reasoning and answer. Decided here: how a row is
read (`FORMATS`, one function each) and what is skipped.

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

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mlx_distill.data.examples import Example, Skip, Turns, make_example
from mlx_distill.data.sources import Row, embedded_examples, rows_of
from mlx_distill.errors import DataError
from mlx_distill.recipe import DataTable


def read_examples(data: DataTable, seed: int = 0, skipped: Counter[str] | None = None) -> Iterator[Example]:
    """Every usable example of `data.source`, in its order, each id once; reasons for the others are added to `skipped`.

    `seed` matters to `embedded:NAME` alone, which writes `validation_examples + train_examples` problems of its own.
    Raises `NotFound` for a source that is not there, `DataError` for a row that cannot be read and when nothing is
    left.
    """
    skipped = Counter() if skipped is None else skipped
    found: set[str] = set()
    before = skipped.copy()
    for item in embedded_examples(data, seed) if data.source.startswith("embedded:") else _read_rows(data):
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


def _read_rows(data: DataTable) -> Iterator[Example | str]:
    """An `Example`, or the reason why there is none, for each row."""
    read = FORMATS[data.format]
    for where, row in rows_of(data):
        place = Place(f"{data.source}, {where}", data)
        if any(_text(place.cell(row, column, "data.where")) != value for column, value in data.where.items()):
            yield "not chosen by data.where"
            continue
        try:
            yield read(row, place)
        except Skip as skip:
            yield str(skip)


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
