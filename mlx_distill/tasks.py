"""Tasks: problems with a checkable answer, and the check.

In: a task's name (`embedded:NAME`, `gsm8k:PATH`, `jsonl:PATH`), how many problems and a seed. Out: a `Task` whose `verify`
says whether a whole generation, reasoning included, ends in the expected answer. Decided here: what is read as the answer
(the text after the first `</think>`), which rows are drawn, and what makes two problems the same (the digest of their text).
"""

import difflib
import hashlib
import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_distill.errors import DataError, NotFound

THINK_END = "</think>"
GSM8K_ANSWER = re.compile(r"####\s*(-?[\d.,]*\d)\s*$")


@dataclass(frozen=True)
class Problem:
    """A prompt as the user says it and the answer to be found; `id` is a digest of both, so it is the same in every run."""

    id: str
    prompt: str
    expected: str


@dataclass(frozen=True)
class Task:
    """Problems under one name; `verify(expected, generated_text)` takes the whole generation, reasoning included.

    A generation without `</think>` has given no answer and is never right.
    """

    name: str
    problems: list[Problem]
    verify: Callable[[str, str], bool]


def load_task(name: str, examples: int, seed: int) -> Task:
    """The task called `name` with at most `examples` problems, drawn with `seed`; the same arguments give the same problems.

    Raises `NotFound` (no such task or file) or `DataError` (a row or column that cannot be used).
    """
    kind, _, rest = name.partition(":")
    if kind not in _LOADERS:
        near = difflib.get_close_matches(kind, _LOADERS, 1)
        hint = f"; did you mean {_FORMS[near[0]]}?" if near else ""
        raise NotFound(f"no task {name!r}{hint} Choices: {', '.join(_FORMS.values())}")
    if not rest:
        raise NotFound(f"task {name!r} names nothing after {kind!r}: write {_FORMS[kind]}")
    return _LOADERS[kind](name, rest, examples, seed)


def answer_text(generated: str) -> str:
    """What follows the first `</think>`; empty where there is none."""
    return generated.partition(THINK_END)[2]


def math_equal(expected: str, answer: str) -> bool:
    """Whether `answer` states the mathematical expression `expected`, by math-verify.

    It finds `\\boxed{}`, "#### N", "The answer is N", or else the last expression in the text.
    """
    from math_verify import verify

    return bool(verify(_parsed(_as_latex(expected)), _parsed(answer), timeout_seconds=_timeout()))


def _after_think(check: Callable[[str, str], bool]) -> Callable[[str, str], bool]:
    return lambda expected, generated: THINK_END in generated and check(expected, answer_text(generated))


def _load_embedded(name: str, rest: str, examples: int, seed: int) -> Task:
    from mlx_distill.embedded import task

    if rest != task.NAME:
        raise NotFound(f"no embedded task {rest!r}; did you mean embedded:{task.NAME}? It is the only one")
    rows = ((example.prompt, example.answer) for example in task.generate("held_out", examples, seed))
    return Task(name, _problems(rows), _after_think(task.verify))


def _load_gsm8k(name: str, rest: str, examples: int, seed: int) -> Task:
    rows = _drawn(Path(rest).expanduser(), ("question", "answer"), examples, seed)
    return Task(name, _problems((question, _gsm8k_number(answer, place)) for place, question, answer in rows),
                _after_think(math_equal))


def _load_jsonl(name: str, rest: str, examples: int, seed: int) -> Task:
    rows = _drawn(Path(rest).expanduser(), ("prompt", "answer"), examples, seed)
    for place, _, answer in rows:
        if not _parsed(_as_latex(answer)):
            raise DataError(f"{place}: answer {answer[:60]!r} is not an expression that math-verify can read; "
                            "give a number or LaTeX, or drop the row")
    return Task(name, _problems((prompt, answer) for _, prompt, answer in rows), _after_think(math_equal))


_LOADERS = {"embedded": _load_embedded, "gsm8k": _load_gsm8k, "jsonl": _load_jsonl}
_FORMS = {"embedded": "embedded:NAME", "gsm8k": "gsm8k:PATH", "jsonl": "jsonl:PATH"}


def _problems(rows: Iterator[tuple[str, str]]) -> list[Problem]:
    """Problems in order; the same text twice is one problem, since it could not be told apart when runs are compared."""
    found = {}
    for prompt, expected in rows:
        key = hashlib.sha256(f"{prompt}\0{expected}".encode()).hexdigest()[:12]
        found.setdefault(key, Problem(key, prompt, expected))
    return list(found.values())


def _drawn(path: Path, columns: tuple[str, str], examples: int, seed: int) -> list[tuple[str, str, str]]:
    """(where, first column, second column) of `examples` rows of a JSON-lines file, in file order; all if it has fewer."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.jsonl")], 1)
        raise NotFound(f"no task file at {path}" + (f"; did you mean {path.parent / near[0]}?" if near else "; check the path"))
    lines = [(number, line) for number, line in enumerate(_lines(path), 1) if line.strip()]
    kept = sorted(random.Random(seed).sample(lines, min(examples, len(lines))))
    return [_row(f"{path}:{number}", line, columns) for number, line in kept]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); expected JSON lines") from None


def _row(place: str, line: str, columns: tuple[str, str]) -> tuple[str, str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not a JSON object ({error.msg}); expected one object a line") from None
    found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    for column in columns:
        if not isinstance(row, dict) or column not in row:
            raise DataError(f"{place}: no column {column!r}, found {found}; this task reads {' and '.join(columns)}")
        if not isinstance(row[column], str | int | float):
            raise DataError(f"{place}: column {column!r} should be text or a number, found {type(row[column]).__name__}")
    return place, str(row[columns[0]]), str(row[columns[1]])


def _gsm8k_number(answer: str, place: str) -> str:
    number = GSM8K_ANSWER.search(answer.strip())
    if not number:
        raise DataError(f"{place}: answer ends in {answer[-40:]!r}, expected '#### NUMBER' as in GSM8K")
    return number[1].replace(",", "")


def _as_latex(expected: str) -> str:
    """A bare expected answer is boxed, so that all of it is read as LaTeX ("2x+1" alone would be read as 2)."""
    return expected if "$" in expected or "\\boxed" in expected else f"\\boxed{{{expected}}}"


def _parsed(text: str) -> list:
    from math_verify import parse

    return parse(text, parsing_timeout=_timeout())


def _timeout() -> int | None:
    """math-verify's own limit in seconds; it works through a signal, which only the main thread may ask for."""
    return 5 if threading.current_thread() is threading.main_thread() else None
