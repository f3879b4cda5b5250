"""Named datasets: rows in each one's exact format, what a recipe may change, which rows are chosen,
and a stream of a part.
"""

import json
import sys
import types
from collections import Counter

import pytest
from test_examples import BESPOKE, INSTRUCTION
from typer.testing import CliRunner

from mlx_distill.cli import app
from mlx_distill.data.chosen import fits
from mlx_distill.data.formats import FORMATS
from mlx_distill.data.named import NAMED, resolved
from mlx_distill.data.reading import read_examples
from mlx_distill.errors import DataError
from mlx_distill.recipe.tables import DataTable

THOUGHT = "<think>\nTwo and three.\n</think>\n\n5"
ASKED = {"role": "user", "content": "2+3?"}
STRATOS = {
    "system": INSTRUCTION,
    "conversations": [{"from": "user", "value": "2+3?"}, {"from": "assistant", "value": BESPOKE}],
}
TALK = {"messages": [ASKED, {"role": "assistant", "content": THOUGHT}]}
ROWS = {  # as the hub's cards show them, made short
    "bespoke-stratos": STRATOS,
    "openthoughts": STRATOS,
    "sky-t1": STRATOS,
    "synthetic-1": {
        "prompt": "2+3?",
        "llm_response": THOUGHT,
        "task_type": "verifiable_math",
        "score": 1.0,
    },
    "nemotron": {
        "input": [ASKED],
        "output": THOUGHT,
        "category": "math",
        "reasoning": "on",
        "used_in_training": "Ultra",
    },
    "synthetic-2": TALK | {"problem_id": "x", "reward": 1.0},
    "openthoughts3": {
        "difficulty": 5,
        "conversations": [{"from": "human", "value": "2+3?"}, {"from": "gpt", "value": THOUGHT}],
    },
    "openr1-math": TALK | {"problem": "2+3?", "correctness_math_verify": [True, False]},
    "mixture-of-thoughts": TALK | {"num_tokens": 9, "source": "x"},
    "s1k": {
        "question": "2+3?",
        "deepseek_thinking_trajectory": "Two and three.",
        "deepseek_attempt": "5",
        "solution": "5",
    },
    "deepmath": {"question": "2+3?", "final_answer": "5", "r1_solution_1": THOUGHT},
    "multilingual-thinking": {
        "reasoning_language": "English",
        "messages": [
            ASKED | {"thinking": None},
            {"role": "assistant", "content": "5", "thinking": "Two and three."},
        ],
    },
    "gsm8k": {"question": "2+3?", "answer": "Two<<2=2>> and three.\n#### 5"},
}


def write(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", NAMED)
def test_a_row_in_the_exact_format_of_each(name, tmp_path):
    data = DataTable(source=f"{name}:{write(tmp_path, [ROWS[name]])}")
    (example,) = read_examples(data)
    assert (example.prompt, example.cot, example.answer, example.history) == (
        "2+3?",
        "Two and three.",
        "5",
        (),
    )


@pytest.mark.parametrize("name", NAMED)
def test_the_hub_is_asked_for_the_named_part(name, monkeypatch):
    asked = []
    fake = types.SimpleNamespace(
        load_dataset=lambda *names, **options: asked.append((*names, options)) or [ROWS[name]]
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert len(list(read_examples(DataTable(source=name)))) == 1
    fields = NAMED[name].fields
    split = {"split": fields.get("split", "train")}
    assert asked == [(NAMED[name].id, fields.get("config"), split)]
    assert fields["format"] in FORMATS


def test_what_a_recipe_sets_itself_stands():
    mine = DataTable(source="synthetic-1", split="test", where={"task_type": "code"})
    data = resolved(mine)
    assert (data.split, data.where) == ("test", {"task_type": "code"})
    assert (data.source, data.response_column) == ("PrimeIntellect/SYNTHETIC-1", "llm_response")
    other = DataTable(source="org/synthetic-1")
    assert resolved(other) is other


def test_datasets_are_listed_with_rows_size_and_licence():
    lines = CliRunner().invoke(app, ["datasets"]).output
    for name, one in NAMED.items():
        (line,) = (line for line in lines.splitlines() if line.startswith(f"{name} "))
        assert all(said in line for said in (one.id, one.rows, one.size, one.licence))


@pytest.mark.parametrize(
    ("value", "asked", "right"),
    [
        ("math", "math", True),
        ("maths", "math", False),
        (3, 3, True),
        (3, 3.0, True),
        ("3", 3, True),
        ("3.0", 3, True),
        (4, 3, False),
        (3, "3", True),
        (None, 3, False),
        (True, True, True),
        ("true", True, True),
        (1, True, False),
        (True, 1, False),
        ("code", ["math", "code"], True),
        ("law", ["math", "code"], False),
        (2, [1, 2], True),
        ([True, False], True, True),
        ([False, False], True, False),
        (["a", "b"], ["b", "c"], True),
        ([], "a", False),
        (0.5, ">= 0.5", True),
        (0.4, ">= 0.5", False),
        ("0.7", "> 0.5", True),
        (3, "<4", True),
        (4, "< 4", False),
        (4, "<= 4", True),
        ("x", "< 4", False),
        (4, "!= 4.0", False),
        ("law", "!= math", True),
        ("> 3", "> 3", True),
        (float("nan"), "> 0", False),
    ],
)
def test_where_compares_texts_numbers_truths_and_lists(value, asked, right):
    assert fits(value, asked) is right


def test_rows_are_chosen_by_numbers_and_lists_and_the_others_counted(tmp_path):
    rows = [
        {"prompt": f"q{i}", "cot": "c", "answer": "a", "level": i, "kind": "xyz"[i % 3]}
        for i in range(9)
    ]
    skipped = Counter()
    data = DataTable(source=str(write(tmp_path, rows)), where={"level": ">= 3", "kind": ["x", "z"]})
    assert [one.prompt for one in read_examples(data, skipped=skipped)] == ["q3", "q5", "q6", "q8"]
    assert skipped == {"not chosen by data.where": 5}


def test_a_part_of_a_dataset_is_streamed_in_a_seeded_order(tmp_path, monkeypatch):
    """The real package's stream, of files on disk, endless where more than the part is read."""
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"q{i}", "cot": "c", "answer": "a", "kind": "xy"[i % 2]} for i in range(300)]
    path, load, asked = str(write(tmp_path, rows)), datasets.load_dataset, []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return load("json", data_files=path, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    def drawn(seed, **settings):
        data = DataTable(source="openthoughts", format="columns", **settings)
        data = data.model_copy(update={"source": "org/rows"})
        return [one.prompt for one in read_examples(data, seed)]

    first = drawn(7, stream_rows=20, where={"kind": "x"})
    assert len(first) == 20 and all(int(one[1:]) % 2 == 0 for one in first)
    assert first == drawn(7, stream_rows=20, where={"kind": "x"})
    assert first != drawn(8, stream_rows=20, where={"kind": "x"})
    assert max(int(one[1:]) for one in first) > 40, "not the first ones alone"
    assert set(asked) == {("org/rows", None, "train", True)}


def test_a_file_is_not_streamed(tmp_path):
    data = DataTable(source=str(write(tmp_path, [ROWS["gsm8k"]])), stream_rows=3)
    with pytest.raises(DataError, match=r"data.stream_rows = 3 is for a hub dataset"):
        list(read_examples(data))
