"""A first recipe for somebody's own rows.

In: the names of a teacher, a student and a file of rows. Out: `recipe.toml`, which says what each of
its lines is for, and on the terminal what the rows hold. Decided here: which fields a first recipe
shows. Paths stand in it as they were given: from the folder in which commands are typed.
"""

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

from mlx_distill.data.columns import COLUMNS
from mlx_distill.data.detection import about_format, detected, first_rows
from mlx_distill.data.named import resolved
from mlx_distill.data.reading import read_examples
from mlx_distill.errors import RunError
from mlx_distill.files import told_as, write_text
from mlx_distill.recipe.load import build_recipe
from mlx_distill.recipe.shipped import SHIPPED
from mlx_distill.recipe.tables import DataTable

FEW_ROWS = 500  # up to which a first recipe sees its rows several times
SHOWN = 60  # characters of a row's text

# a first recipe; the comments are for a person who has none yet
TEXT = """\
# A first recipe. All fields, each with its default and a sentence, are in reference.toml
# (REFERENCE).
# Paths are taken from the folder in which you type the command.

[teacher]
model = TEACHER  # a hub id, a folder, a .gguf file, or embedded:teacher

[student]
model = STUDENT  # the same, with the teacher's vocabulary
# tuning = "lora"  # trains adapters alone, with less memory

[data]
source = SOURCE
COLUMNS
[truncation]
fraction = 0.5  # the first half of each example's tokens: half the time and memory
whole_share = 0.25  # but a quarter of the examples whole, so that the student learns to stop

[objective]
segments = ["cot", "answer"]  # what is learned: any of "prompt", "cot", "answer"
kd_weight = 0.5  # of the teacher's distribution; the rest is the text itself, and 0 needs no teacher

[optim]
epochs = EPOCHS  # how often each row is seen
# learning_rate = 2e-5  # the default; 2e-4 for adapters

# [eval]
# task = "jsonl:test.jsonl"  # rows of prompt and answer that are not trained on: scored at the end

[run]
name = NAME  # the folder below runs/ that holds the results
"""


def init(folder: Path, teacher: str, student: str, source: str, say: Callable[[str], None]) -> Path:
    """Write a recipe for these models and rows into `folder`, and say what the rows hold.

    Raises `NotFound` or `DataError` for rows that cannot be read or have nothing to learn from, and
    `RunError` where there is a recipe already.
    """
    path = folder / "recipe.toml"
    if path.exists():
        raise RunError(f"{path} is there already: name another folder, or delete it")
    asked = resolved(DataTable(source=source))
    if not source.startswith("embedded:"):
        first_rows(asked)  # says what is wrong with the source itself
    data = detected(asked)
    if note := about_format(asked, data):
        say(note)
    rows = 300 if source.startswith("embedded:") else _look_at(data, say)
    by_name = asked.source != source  # a named dataset brings its own settings
    text = recipe_text(DataTable(source=source) if by_name else data, teacher, student, rows)
    build_recipe(tomllib.loads(text), path)  # refuses what cannot be run, before it is written
    with told_as(RunError, folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    say(f"wrote {path}")
    say(f"next: mlx-distill show {path}   (one example, coloured)")
    say(f"      mlx-distill run {path}")
    return path


def _look_at(data: DataTable, say: Callable[[str], None]) -> int:
    """How many examples there are; says one of them."""
    examples = list(read_examples(data))
    one = examples[0]
    say(f"{data.source}: {len(examples):,} usable examples, for example")
    for name in ("prompt", "cot", "answer"):
        text = " ".join(getattr(one, name).split())
        say(f"  {name:<7} {text[:SHOWN]}{'…' if len(text) > SHOWN else ''}")
    return len(examples)


def recipe_text(data: DataTable, teacher: str, student: str, rows: int) -> str:
    """The recipe as TOML; `data` has its format and columns."""
    stem = Path(data.source.removeprefix("embedded:")).name.split(".")[0]
    words = {
        "REFERENCE": str(SHIPPED / "reference.toml"),
        "TEACHER": _toml(teacher),
        "STUDENT": _toml(student),
        "SOURCE": _toml(data.source),
        "COLUMNS": "".join(f"{line}\n" for line in _data_lines(data, rows)),
        "EPOCHS": "3" if rows <= FEW_ROWS else "1",
        "NAME": _toml(re.sub(r"[^\w.-]+", "-", stem).strip(".-") or "first"),
    }
    return re.sub(rf"\b({'|'.join(words)})\b", lambda found: words[found[0]], TEXT)


def _data_lines(data: DataTable, rows: int) -> list[str]:
    if data.source.startswith("embedded:"):
        return [f"train_examples = {rows}"]
    if data.format == "auto":
        return ["# format and columns are those of this named dataset"]
    lines = [f"format = {_toml(data.format)}  # found by looking at the first rows"]
    for role in COLUMNS[data.format]:
        if name := getattr(data, f"{role}_column"):
            lines.append(f"{role}_column = {_toml(name)}")
    return lines


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
