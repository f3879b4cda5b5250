"""Whatever lies in a file, reading it ends well or with one line.

Files that are right are damaged at random, in their bytes and in their values, with a fixed seed.
`MLX_DISTILL_FUZZ=20` takes twenty times as many inputs as a run of the tests does.
"""

import datetime
import gzip
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomli_w
from test_report import PARTS
from tiny import recipe_of

from mlx_distill.data.prepare import prepare
from mlx_distill.data.reading import read_examples
from mlx_distill.errors import DistillError
from mlx_distill.models.hub import load_tokenizer, model_folder
from mlx_distill.recipe.load import eval_table, load_recipe
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.recipe.tables import DataTable
from mlx_distill.reporting.kept_run import read_run
from mlx_distill.reporting.runs_page import report
from mlx_distill.sweeps.sweep import load_sweep
from mlx_distill.verify.tasks import load_task
from mlx_distill.view import OBEYED, one_line

TIMES = int(os.environ.get("MLX_DISTILL_FUZZ", "1"))
PIECES = [
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\r\n",
    b"\x0c",
    b"\x1b[2J",
    b'"',
    b"'",
    b"\\",
    b"\\ud83d",
    b"\\u0000",
    b"[" * 300,
    b'{"a":' * 300,
    b"9" * 5000,
    b"0x" + b"f" * 5000,
    b"-1",
    b"1e999",
    b"1e-999",
    b"NaN",
    b"null",
    b"true",
    b"{}",
    b"[]",
    b",",
    b"=",
    b"\n",
    b"#",
    b"07:32:00",
    b"1979-05-27T07:32:00Z",
    b"~nobody-is-called-so/x",
    b"y" * 300,
    "\u202e\u2028é😀".encode(),
    b"</think>",
    b"<think>",
]
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    10**400,
    -0.5,
    1e300,
    5e-324,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "\ud83d",
    "\x1b[2J",
    "y" * 300,
    "~nobody-is-called-so/x",
    "/dev/zero",
    ".",
    "..",
    "a/b",
    "a\nb",
    [],
    [[]],
    {},
    {"a": {"b": 1}},
    [1, "x", None],
    datetime.time(7, 32),
    datetime.date(1979, 5, 27),
    "embedded:dial",
    "jsonl:",
    "gsm8k:x",
    ["cot", "cot"],
    "9" * 5000,
    [{}],
    {"": ""},
]


def damaged(good: bytes, chance: random.Random) -> bytes:
    """One to three small damages to bytes."""
    content = bytearray(good)
    for _ in range(chance.randint(1, 3)):
        start = chance.randrange(len(content) + 1)
        stop = min(len(content), start + chance.choice([0, 1, 1, 2, 5, 30]))
        kind = chance.randrange(4)
        if kind == 0:
            content[start:stop] = b""
        elif kind == 1:
            content[start:stop] = content[start:stop] * 2
        elif kind == 2 and content:
            content[start % len(content)] = chance.randrange(256)
        else:
            content[start:stop] = chance.choice(PIECES)
    return bytes(content)


def changed(value, chance: random.Random):
    """A value of JSON or TOML with one value in it replaced, renamed, dropped or doubled."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        kind = chance.randrange(8)
        if kind == 0:
            return {name: inner for name, inner in value.items() if name != key}
        if kind == 1:
            return value | {
                chance.choice(["", "x", "a.b", "a\nb", "\x1b[31m", f"{key}s"]): value[key]
            }
        return value | {key: changed(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        place = chance.randrange(len(value))
        return [
            *value[:place],
            changed(value[place], chance),
            *value[place + chance.choice([0, 1]) :],
        ]
    return chance.choice(VALUES)


def as_toml(tables: dict) -> bytes:
    try:
        return tomli_w.dumps(tables if isinstance(tables, dict) else {"run": tables}).encode(
            "utf-8", "surrogatepass"
        )
    except (TypeError, ValueError, RecursionError):  # TOML has no null
        return b"run.seed = -1"


def as_json(value) -> bytes:
    try:
        return json.dumps(value, default=str).encode()
    except ValueError:  # more digits than Python writes
        return b"9" * 5000


def as_lines(rows) -> bytes:
    return b"\n".join(map(as_json, rows)) if isinstance(rows, list) else as_json(rows)


def inputs(
    good: bytes, read: Callable, write: Callable, chance: random.Random, count: int
) -> Iterator[bytes]:
    """Damaged in bytes and changed in values, by turns."""
    for number in range(count * TIMES):
        yield damaged(good, chance) if number % 2 else write(changed(read(good), chance))


def ends_well(what: Callable, *arguments, shown: object = None) -> None:
    """Nothing but a `DistillError` of one readable line may come out."""
    try:
        what(*arguments)
    except DistillError as error:
        line = str(error)
        assert line and not line.startswith("(")
        assert not OBEYED.search(one_line(line)) and len(line) < 3000, (line[:300], shown)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} of {shown!r:.2000}") from error


RECIPE = Recipe.model_validate(
    {
        "data": {"source": "rows.jsonl", "where": {"level": "3"}, "train_examples": 9},
        "student": {"model": "s", "tuning": "lora"},
        "eval": {
            "task": "jsonl:rows.jsonl",
            "temperature": 0.5,
            "samples": 2,
            "compare": ["other"],
        },
        "run": {"name": "it"},
        "teacher": {"model": "t", "cache": "top_k"},
    }
).model_dump(mode="json")
SWEEP = {
    "recipe": "base.toml",
    "seeds": [1, 2],
    "token_matched": [0.5],
    "question": "Which?",
    "set": {"optim": {"steps": 4}},
    "axes": {"truncation": {"fraction": [0.5, 1.0]}, "optim": {"learning_rate": [1e-3, 1e-4]}},
    "full": {"truncation": {"fraction": 1.0}},
    "arms": [{"name": "plain", "objective": {"kd_weight": 0.0}, "teacher": {"cache": "off"}}],
}


def test_recipes(tmp_path):
    chance, path = random.Random(1), tmp_path / "mine.toml"
    for content in inputs(as_toml(RECIPE), lambda good: RECIPE, as_toml, chance, 300):
        path.write_bytes(content)
        ends_well(lambda: load_recipe(path).toml().encode(), shown=content)


def test_overrides(tmp_path):
    chance, path = random.Random(2), tmp_path / "mine.toml"
    path.write_bytes(as_toml(RECIPE))
    for _ in range(300 * TIMES):
        table = chance.choice(list(RECIPE))
        good = f"{table}.{chance.choice(list(RECIPE[table]))}=".encode()
        value = (
            chance.choice(PIECES)
            if chance.random() < 0.5
            else repr(chance.choice(VALUES[:30])).encode("utf-8", "replace")[:3000]
        )
        text = (good + value if chance.random() < 0.7 else damaged(good + value, chance)).decode(
            "utf-8", "surrogateescape"
        )
        ends_well(lambda text=text: load_recipe(path, (text,)).toml().encode(), shown=text)
        ends_well(eval_table, (text.partition(".")[2],), shown=text)


def test_sweeps(tmp_path):
    chance, path = random.Random(3), tmp_path / "sweep.toml"
    (tmp_path / "base.toml").write_bytes(
        as_toml(RECIPE | {"eval": {"task": "jsonl:rows.jsonl"}, "teacher": {"model": "t"}})
    )
    load_sweep_of(path, as_toml(SWEEP))
    for content in inputs(as_toml(SWEEP), lambda good: SWEEP, as_toml, chance, 100):
        ends_well(load_sweep_of, path, content, shown=content)


def load_sweep_of(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for point in load_sweep(path).points:
        point.recipe.toml().encode()


ROWS = {
    "columns": {"prompt": "1 + 1?", "cot": "One and one are two.", "answer": 2},
    "response": {"prompt": "1 + 1?", "response": "<think>One and one.</think>2"},
    "messages": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]},
            {"role": "assistant", "content": "2", "reasoning_content": "One and one."},
        ]
    },
    "conversations": {
        "conversations": [
            {"from": "human", "value": "1 + 1?"},
            {
                "from": "gpt",
                "value": "<|begin_of_thought|>a<|end_of_thought|><|begin_of_solution|>2<|end_of_solution|>",
            },
        ]
    },
    "gsm8k": {"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"},
}


def test_rows(tmp_path):
    chance = random.Random(4)
    for number in range(400 * TIMES):
        form = chance.choice(list(ROWS))
        ending = chance.choice([".jsonl", ".json", ".csv", ".jsonl.gz", ".JSON.GZ", ".ndjson"])
        content = some_rows(ROWS[form], ending, number % 2 == 0, chance)
        path = tmp_path / f"rows{ending}"
        path.write_bytes(content)
        table = DataTable(source=str(path), format=form)
        ends_well(lambda table=table: list(read_examples(table)), shown=content)


def some_rows(row: dict, ending: str, whole: bool, chance: random.Random) -> bytes:
    """Three rows, changed in their values (`whole`) or damaged in their bytes, packed where the
    ending says so.
    """
    rows = [row, changed(row, chance) if whole else row, row]
    if ".csv" in ending.lower():
        content = (
            ",".join(row).encode()
            + b"\n"
            + b"\n".join(b",".join(as_json(cell) for cell in row.values()) for _ in range(3))
        )
    elif ".json" in ending.lower() and "jsonl" not in ending:
        content = as_json(rows)
    else:
        content = b"\n".join(map(as_json, rows))
    content = content if whole else damaged(content, chance)
    if not ending.lower().endswith(".gz"):
        return content
    packed = gzip.compress(content)
    return damaged(packed, chance) if chance.random() < 0.3 else packed


def test_rows_become_sequences(tmp_path):
    chance, path = random.Random(5), tmp_path / "rows.jsonl"
    tokenizer = load_tokenizer(model_folder("embedded:student", weights=False))
    for number in range(60 * TIMES):
        lines = [as_json(ROWS["columns"] | {"prompt": f"{index} + 1?"}) for index in range(6)]
        lines[2] = (
            as_json(changed(ROWS["columns"], chance)) if number % 2 else damaged(lines[2], chance)
        )
        path.write_bytes(b"\n".join(lines))
        recipe = recipe_of(data={"source": str(path), "validation_examples": 2})
        ends_well(prepare, recipe, tokenizer, shown=lines[2])


def test_tasks(tmp_path):
    chance, path = random.Random(6), tmp_path / "rows.jsonl"
    for number in range(60 * TIMES):
        kind = chance.choice(["jsonl", "gsm8k"])
        row = {"jsonl": {"prompt": "1 + 1?", "answer": "2"}, "gsm8k": ROWS["gsm8k"]}[kind]
        path.write_bytes(some_rows(row, ".jsonl", number % 2 == 0, chance))
        ends_well(load_task, f"{kind}:{path}", 5, 1, shown=path.read_bytes())
    for name in (
        "",
        ":",
        "jsonl",
        "jsonl:",
        "jsonl:\0",
        f"jsonl:{'y' * 300}",
        "gsm8k:~nobody-is-called-so/x",
        f"jsonl:{tmp_path}",
        "jsonl:/dev/zero",
        "embedded:",
        "embedded:x",
        "x:y",
        "jsonl:\ud83d",
    ):
        ends_well(load_task, name, 5, 1, shown=name)


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_run) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "other", steps=4)
    return write_run(folder / "run", steps=20, compare=(str(folder / "other"),))


@pytest.mark.parametrize("part", PARTS)
def test_reports(run, part, tmp_path):
    chance, path = random.Random(7 + PARTS.index(part)), run / part
    good = path.read_bytes()
    write = {".toml": as_toml, ".json": as_json, ".jsonl": as_lines}[path.suffix]
    read = {
        ".toml": lambda _: RECIPE,
        ".json": json.loads,
        ".jsonl": lambda text: [json.loads(line) for line in text.splitlines()],
    }
    try:
        for number, content in enumerate(inputs(good, read[path.suffix], write, chance, 20)):
            path.write_bytes(content)
            ends_well(read_run, run, shown=content)
            if number % 5 < 2:  # a page is much more work
                ends_well(report, [run], tmp_path, shown=content)
    finally:
        path.write_bytes(good)
