"""Tasks: problems with a checkable answer, and the check.

In: a task's name (`embedded:NAME`, `gsm8k:PATH`, `math:PATH`, `jsonl:PATH`, or one of
`verify/named.py` as `NAME` or `NAME:PATH`), how many problems and a seed. Out: a `Task` whose
`verify` says whether a whole generation, reasoning included, ends in the expected answer. Decided
here: what is read as the answer (the text after the first `</think>`, or all of it), how a problem
is put, which rows are drawn, what makes two problems the same (the digest of their text), and how a
gold answer that is a number or a list in JSON is written. Whether an answer is right, `verify/`
says.
"""

import difflib
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_distill.data.sources import SOURCES, rows_of
from mlx_distill.errors import DataError, NotFound
from mlx_distill.files import of_people
from mlx_distill.readers import is_text, path_of, read_json_lines
from mlx_distill.recipe.tables import DataTable
from mlx_distill.recipe.training_tables import EvalTable
from mlx_distill.verify import TEXT, compared_as, states
from mlx_distill.verify.named import BOXED, NAMED_TASKS, PROBLEM

AFTER_THINK, ANYWHERE = "after_think", "anywhere"
THINK_END = "</think>"
# what `[data]` reads and plain JSON lines are not: what the hub has, and its copies
TABLES = (*(SOURCES.keys() - {".jsonl", ".ndjson"}), ".gz")
GSM8K_ANSWER = re.compile(r"####[ \t]*(\S[^\n]*)$")
GSM8K_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d+)?")  # not 1.234,5


@dataclass(frozen=True)
class Problem:
    """A prompt as the user says it and the answer to be found; `id` is a digest of both, so it is
    the same in every run.

    `compared` says how answers are compared with the expected one: as "mathematics" or as "text".
    """

    id: str
    prompt: str
    expected: str
    compared: str = TEXT


@dataclass(frozen=True)
class Task:
    """Problems under one name; `verify(expected, generated_text)` takes the whole generation,
    reasoning included.

    prompt: how a problem is put. answer: where the answer is looked for; "after_think": a
    generation without `</think>` has given no answer and is never right; "anywhere": all of the
    text is searched, as lighteval does. tokens: what an answer is usually given, 0 if nothing is
    usual.
    """

    name: str
    problems: list[Problem]
    verify: Callable[[str, str], bool]
    prompt: str = PROBLEM
    answer: str = AFTER_THINK
    tokens: int = 0

    def compared(self) -> dict[str, int]:
        """How many problems are compared in which way."""
        return dict(Counter(problem.compared for problem in self.problems))

    @property
    def digest(self) -> str:
        """16 hex digits over the problems, as they are put, and their answers: what a score is of."""
        asked = [[one.id, one.prompt, one.expected] for one in self.problems]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """One line: how many problems there are and how they are compared."""
        ways = ", ".join(f"{count:,} as {way}" for way, count in sorted(self.compared().items()))
        return f"{self.name}: {len(self.problems):,} problems, compared {ways}{self._asked()}"

    def _asked(self) -> str:
        """What is not as it is by default, in words."""
        put = "" if self.prompt == PROBLEM else f"; put as {self.prompt!r}"
        looked = "" if self.answer == AFTER_THINK else "; answers looked for anywhere in the text"
        return put + looked

    def short_of_tokens(self, max_new_tokens: int) -> str:
        """What is to be said where answers get fewer tokens than is usual; "" where they do not."""
        if max_new_tokens >= self.tokens:
            return ""
        return (
            f"{self.name} is reported with {self.tokens:,} new tokens, and eval.max_new_tokens is "
            f"{max_new_tokens:,}: answers that it cuts off count as wrong"
        )


def task_of(asked: EvalTable, name: str = "") -> Task:
    """The task of an `[eval]` table, or another one under its settings; raises as `load_task`."""
    return load_task(name or asked.task, asked.examples, asked.seed, asked.prompt, asked.answer)


def tasks_of(asked: EvalTable) -> list[Task]:
    """The tasks of an `[eval]` table, the first one in front; none where it names none."""
    return [task_of(asked, name) for name in (asked.task, *asked.also) if name]


def load_task(
    name: str, examples: int, seed: int, prompt: str = "", answer: str = AFTER_THINK
) -> Task:
    """The task called `name` with at most `examples` problems, drawn with `seed`; the same
    arguments give the same problems. `prompt` puts each of them ("" = as the task does), `answer`
    says where it is looked for.

    Raises `NotFound` (no such task or file) or `DataError` (a row or column that cannot be used).
    """
    kind, _, rest = name.partition(":")
    if kind in NAMED_TASKS and not (rest and kind in _LOADERS):
        task = _load_named(name, kind, rest, examples, seed)
    else:
        task = _load_file(name, kind, rest, examples, seed)
    put = prompt or task.prompt
    problems = [
        replace(problem, prompt=put.replace(PROBLEM, problem.prompt)) for problem in task.problems
    ]
    verify = task.verify if answer == ANYWHERE else _after_think(task.verify)
    return replace(task, problems=problems, verify=verify, prompt=put, answer=answer)


def _load_file(name: str, kind: str, rest: str, examples: int, seed: int) -> Task:
    if kind not in _LOADERS:
        forms = {one: one for one in NAMED_TASKS} | _FORMS
        near = difflib.get_close_matches(kind, forms, 1)
        hint = f"; did you mean {forms[near[0]]}?" if near else "."
        choices = ", ".join([*_FORMS.values(), *NAMED_TASKS])
        raise NotFound(f"no task {name!r}{hint} Choices: {choices}")
    if not rest:
        raise NotFound(f"task {name!r} names nothing after {kind!r}: write {_FORMS[kind]}")
    if kind != "embedded":
        path_of(rest, f"task {name}", NotFound)
    return _LOADERS[kind](name, rest, examples, seed)


def answer_text(generated: str) -> str:
    """What follows the first `</think>`; empty where there is none."""
    return generated.partition(THINK_END)[2]


def _after_think(check: Callable[[str, str], bool]) -> Callable[[str, str], bool]:
    return lambda expected, generated: (
        THINK_END in generated and check(expected, answer_text(generated))
    )


def _load_embedded(name: str, rest: str, examples: int, seed: int) -> Task:
    from mlx_distill.embedded import task

    if rest != task.NAME:
        raise NotFound(
            f"no embedded task {rest!r}; did you mean embedded:{task.NAME}? It is the only one"
        )
    rows = (
        (example.prompt, example.answer, TEXT)
        for example in task.generate("held_out", examples, seed)
    )
    return Task(name, _problems(rows), task.verify)


def _load_gsm8k(name: str, rest: str, examples: int, seed: int) -> Task:
    rows = _drawn(Path(rest).expanduser(), ("question", "answer"), examples, seed)
    return _stated(
        name, ((place, question, _gsm8k_gold(answer, place)) for place, question, answer in rows)
    )


def _load_named(name: str, kind: str, file: str, examples: int, seed: int) -> Task:
    """Problems of the hub, or of a file whose rows are as the hub has them."""
    named = NAMED_TASKS[kind]
    if file:
        path_of(file, f"task {name}", NotFound)
    try:
        rows = list(named.rows(file))
    except (NotFound, DataError) as error:  # which speak of a recipe's rows
        said = str(error).replace("data.source: ", f"task {name}: ", 1)
        copy = "" if file else f"; a copy on disk is {kind}:FILE"
        raise type(error)(f"{said}{copy}") from None
    if not rows:
        raise DataError(f"task {name}: it has no rows, so there is nothing to score")
    found = [_row(*rows[i], named.columns) for i in _sample(len(rows), examples, seed)]
    if kind == "gsm8k":
        found = [(place, asked, _gsm8k_gold(gold, place)) for place, asked, gold in found]
    return replace(_stated(name, found), prompt=BOXED, tokens=named.tokens)


def _load_math(name: str, rest: str, examples: int, seed: int) -> Task:
    """MATH-500 and AIME as their authors write them."""
    return _stated(name, _drawn(Path(rest).expanduser(), ("problem", "answer"), examples, seed))


def _load_jsonl(name: str, rest: str, examples: int, seed: int) -> Task:
    return _stated(name, _drawn(Path(rest).expanduser(), ("prompt", "answer"), examples, seed))


def _stated(name: str, rows: Iterable[tuple[str, str, str]]) -> Task:
    """A task whose answers state a gold answer somewhere in their text."""
    found = []
    for place, prompt, gold in rows:
        try:
            found.append((prompt, gold, compared_as(gold)))
        except ValueError as error:
            raise DataError(
                f"{place}: answer {gold[:60]!r} cannot be compared with ({error}); give it, or "
                "drop the row"
            ) from None
    return Task(name, _problems(found), states)


_LOADERS = {
    "embedded": _load_embedded,
    "gsm8k": _load_gsm8k,
    "math": _load_math,
    "jsonl": _load_jsonl,
}
_FORMS = {kind: f"{kind}:{'NAME' if kind == 'embedded' else 'PATH'}" for kind in _LOADERS}


def _problems(rows: Iterable[tuple[str, str, str]]) -> list[Problem]:
    """Problems in order; the same text twice is one problem, since it could not be told apart when
    runs are compared.
    """
    found: dict[str, Problem] = {}
    for prompt, expected, compared in rows:
        key = hashlib.sha256(f"{prompt}\0{expected}".encode(errors="surrogatepass")).hexdigest()[
            :12
        ]
        found.setdefault(key, Problem(key, prompt, expected, compared))
    return list(found.values())


def _drawn(
    path: Path, columns: tuple[str, str], examples: int, seed: int
) -> list[tuple[str, str, str]]:
    """(where, first column, second column) of `examples` rows of a file, in file order; all if it
    has fewer.
    """
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name, [p.name for p in of_people(path.parent, "*.jsonl")], 1
        )
        raise NotFound(
            f"no task file at {path}"
            + (f"; did you mean {path.parent / near[0]}?" if near else "; check the path")
        )
    rows = list(_places_and_rows(path))
    if not rows:
        raise DataError(f"{path}: it has no rows, so there is nothing to score; name another file")
    kept = _sample(len(rows), examples, seed)
    return [_row(f"{path}, {rows[i][0]}", rows[i][1], columns) for i in kept]


def _places_and_rows(path: Path) -> Iterable[tuple[str, Any]]:
    """A table's rows as `[data]` reads them; any other file is JSON lines."""
    if path.name.lower().endswith(TABLES):
        return rows_of(DataTable(source=str(path)))
    return ((f"line {number}", row) for number, row in read_json_lines(path))


def _sample(rows: int, examples: int, seed: int) -> list[int]:
    """Which of so many rows are asked, in their order."""
    return sorted(random.Random(seed).sample(range(rows), min(examples, rows)))


def _row(place: str, row: Any, columns: tuple[str, str]) -> tuple[str, str, str]:
    found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    advice = "rename it" if isinstance(row, dict) else "write one JSON object on each line"
    for column in columns:
        if not isinstance(row, dict) or column not in row:
            read = " and ".join(columns)
            raise DataError(
                f"{place}: no column {column!r}, found {found}; this task reads {read}: {advice}"
            )
    if not is_text(row):
        raise DataError(
            f"{place}: holds half of a character (a lone surrogate); correct or drop the row"
        )
    prompt, answer = columns
    if not isinstance(row[prompt], str | int | float):
        raise DataError(
            f"{place}: column {prompt!r} should be text, found {type(row[prompt]).__name__}"
        )
    if not str(row[prompt]).strip():
        raise DataError(f"{place}: column {prompt!r} is empty, so nothing is asked; drop the row")
    return place, str(row[prompt]), _written(row[answer], place, answer)


def _written(gold: Any, place: str, column: str) -> str:
    """A gold answer as text: 5 of the number, "3, 5" of the list [3, 5], all of whose items are to
    be stated.
    """
    items = gold if isinstance(gold, list) else [gold]
    for item in items:
        if not isinstance(item, str | int | float):
            raise DataError(
                f"{place}: column {column!r} should be text, a number or a list of those, found "
                f"{type(item).__name__}"
            )
    return ", ".join(map(str, items))


def _gsm8k_gold(answer: str, place: str) -> str:
    found = GSM8K_ANSWER.search(answer.strip())
    if not found:
        raise DataError(
            f"{place}: answer ends in {answer[-40:]!r}, expected '#### ANSWER' as in GSM8K"
        )
    gold = found[1].strip()
    return gold.replace(",", "") if GSM8K_NUMBER.fullmatch(gold) else gold
