"""Tasks: which problems are drawn, what is read as the answer, and what a wrong name or row is
told.
"""

import csv
import gzip
import importlib
import json
import sys
from types import SimpleNamespace

import pytest

from mlx_distill.embedded import task as embedded
from mlx_distill.errors import DataError, NotFound
from mlx_distill.verify.named import NAMED_TASKS
from mlx_distill.verify.tasks import answer_text, load_task


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def gsm8k(tmp_path):
    rows = [
        {
            "question": f"What is {i} + 1000?",
            "answer": f"{i} + 1000 = <<{i}+1000={i + 1000}>>\n#### 1,{i:03d}",
        }
        for i in range(20)
    ]
    return write_rows(tmp_path / "test.jsonl", rows)


def test_gsm8k_expects_the_number_after_the_marks(gsm8k):
    problem = load_task(f"gsm8k:{gsm8k}", 20, seed=1).problems[7]
    assert (problem.prompt, problem.expected) == ("What is 7 + 1000?", "1007")


def test_the_same_arguments_draw_the_same_problems(gsm8k):
    def drawn(count, seed):
        return [problem.id for problem in load_task(f"gsm8k:{gsm8k}", count, seed).problems]

    assert drawn(5, 1) == drawn(5, 1) != drawn(5, 2)
    assert len(drawn(500, 1)) == 20
    assert set(drawn(5, 1)) <= set(drawn(500, 9)), (
        "a problem has one id, whichever rows were drawn with it"
    )


def test_math_reads_problems_as_math500_and_aime_have_them(tmp_path):
    rows = [
        {"problem": "Where?", "answer": r"\left( 3, \frac{\pi}{2} \right)", "level": 2},
        {"id": 60, "problem": "When?", "answer": "025", "url": "x"},
    ]
    task = load_task(f"math:{write_rows(tmp_path / 'rows.jsonl', rows)}", 9, 0)
    place, day = task.problems
    assert (place.prompt, day.prompt) == ("Where?", "When?")
    assert task.verify(place.expected, r"</think>So $\boxed{(3, \pi/2)}$.")
    assert not task.verify(place.expected, r"</think>So $\boxed{(3, \pi/3)}$.")
    assert task.verify(day.expected, "</think>The answer is 25.")
    assert task.compared() == {"mathematics": 2}


@pytest.mark.parametrize("ending", ["parquet", "json", "csv", "jsonl.gz"])
def test_a_copy_of_the_hubs_own_file_is_read(gsm8k, tmp_path, ending):
    """GSM8K lies there as Parquet."""
    rows = [json.loads(line) for line in gsm8k.read_text().splitlines()]
    copy = tmp_path / f"copy.{ending}"
    if ending == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(importlib.import_module("pyarrow").Table.from_pylist(rows), copy)
    elif ending == "csv":
        with copy.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        text = gsm8k.read_text() if "gz" in ending else json.dumps(rows)
        copy.write_bytes(gzip.compress(text.encode()) if "gz" in ending else text.encode())
    ours, theirs = (load_task(f"gsm8k:{path}", 5, seed=1) for path in (copy, gsm8k))
    assert ours.problems == theirs.problems


def test_a_repeated_row_is_one_problem(tmp_path):
    path = write_rows(
        tmp_path / "twice.jsonl", [{"prompt": "1+1", "answer": "2"}, {"prompt": "1+1", "answer": 2}]
    )
    assert len(load_task(f"jsonl:{path}", 10, 0).problems) == 1


@pytest.mark.parametrize(
    ("generated", "right"),
    [
        ("<think>\n6*7\n</think>\n\n42", True),
        ("6*7</think>The answer is 42.", True),
        ("</think>#### 42", True),
        (r"</think>so \boxed{42.0}", True),
        ("</think>It costs $42.", True),
        ("</think>#### 43", False),
        ("</think>", False),
        ("42", False),
        ("<think>42", False),
        ("42</think>41", False),
    ],
)
def test_only_what_follows_the_reasoning_is_verified(tmp_path, generated, right):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "6*7?", "answer": "42"}])
    assert load_task(f"jsonl:{path}", 1, 0).verify("42", generated) is right


def test_answer_text_starts_after_the_first_end():
    assert answer_text("a</think>b</think>c") == "b</think>c"
    assert answer_text("a") == ""


def test_a_task_says_how_its_answers_are_compared(tmp_path):
    golds = ["42", "B", "Paris", "70%", "$18", 5, 5.0, ["3", 4], ["B"], True]
    path = write_rows(
        tmp_path / "rows.jsonl",
        [{"prompt": f"q{i}", "answer": gold} for i, gold in enumerate(golds)],
    )
    task = load_task(f"jsonl:{path}", 99, 0)
    assert [problem.expected for problem in task.problems] == [
        "42",
        "B",
        "Paris",
        "70%",
        "$18",
        "5",
        "5.0",
        "3, 4",
        "B",
        "True",
    ]
    assert task.compared() == {"mathematics": 6, "text": 4}
    assert task.describe().endswith("10 problems, compared 6 as mathematics, 4 as text")
    for problem in task.problems:
        assert task.verify(problem.expected, f"</think>The answer is {problem.expected}.")
        assert not task.verify(problem.expected, "</think>The answer is 77.")


def test_gsm8k_rows_may_ask_for_money_percentages_and_words(tmp_path):
    rows = [
        {"question": gold, "answer": f"so\n#### {gold}"}
        for gold in ("$18", "70%", "1,234", "Paris", "3/4")
    ]
    task = load_task(f"gsm8k:{write_rows(tmp_path / 'test.jsonl', rows)}", 9, 0)
    assert [problem.expected for problem in task.problems] == ["$18", "70%", "1234", "Paris", "3/4"]


def test_the_embedded_task_is_asked_for_its_held_out_problems():
    task = load_task(f"embedded:{embedded.NAME}", 20, 7)
    examples = embedded.generate("held_out", 20, 7)
    assert [problem.prompt for problem in task.problems] == [example.prompt for example in examples]
    for problem, example in zip(task.problems, examples, strict=True):
        assert task.verify(
            problem.expected, f"<think>\n{example.cot}\n</think>\n\n{example.answer}"
        )
        assert not task.verify(problem.expected, example.answer), (
            "without </think> there is no answer"
        )
        assert not task.verify(problem.expected, f"</think>{example.answer}9")
    with pytest.raises(
        NotFound, match=f"no embedded task 'chian'; did you mean embedded:{embedded.NAME}"
    ):
        load_task("embedded:chian", 3, 7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "gsm8:x",
            "no task 'gsm8:x'; did you mean gsm8k:PATH.*Choices: embedded:NAME, gsm8k:PATH, "
            "math:PATH, jsonl:PATH",
        ),
    ],
)
def test_an_unknown_task_is_told_the_choices(name, message):
    with pytest.raises(NotFound, match=message) as caught:
        load_task(name, 1, 0)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_told_the_nearest_name(gsm8k):
    with pytest.raises(NotFound, match=r"did you mean .*test.jsonl"):
        load_task(f"gsm8k:{gsm8k.parent / 'tset.jsonl'}", 1, 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            '{"prompt": "x"}',
            r", line 1: no column 'answer', found prompt; this task reads prompt and answer",
        ),
        ("[1, 2]", r", line 1: no column 'prompt', found list"),
        (
            '{"prompt": "x", "answer": null}',
            r", line 1: column 'answer' should be text, a number or a list of those, found NoneType",
        ),
        ('{"prompt": ', r", line 1"),
        (
            '{"prompt": "x", "answer": ""}',
            r", line 1: answer '' cannot be compared with \(it says nothing\)",
        ),
        ('{"prompt": "x", "answer": []}', r", line 1: answer '' cannot be compared with"),
        ('{"prompt": "x", "answer": NaN}', r", line 1: column 'answer' should be .*found NoneType"),
        ('{"prompt": "x", "answer": " . "}', r", line 1: answer ' . ' cannot be compared with"),
        (
            '{"prompt": "x", "answer": {"a": 1}}',
            r", line 1: column 'answer' should be .*found dict",
        ),
    ],
)
def test_an_unusable_row_is_named(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(row, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_task(f"jsonl:{path}", 1, 0)


def test_a_gsm8k_row_without_its_marks_is_named(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"question": "x", "answer": "five"}])
    with pytest.raises(DataError, match=r", line 1: answer ends in 'five', expected '#### ANSWER'"):
        load_task(f"gsm8k:{path}", 1, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it has no rows, so there is nothing to score"),
        (
            '[{"prompt": "p", "answer": 1}]',
            "line 1: no column 'prompt', found list.*: write one JSON object on each line",
        ),
        ('{"prompt": " ", "answer": 1}', "column 'prompt' is empty, so nothing is asked"),
        ('{"prompt": "\\ud83d", "answer": 1}', "line 1: holds half of a character"),
    ],
)
def test_a_row_that_asks_nothing_is_refused_before_training(text, message, tmp_path):
    (tmp_path / "task.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        load_task(f"jsonl:{tmp_path / 'task.jsonl'}", 5, 0)


@pytest.mark.parametrize(
    ("written", "gold"),
    [("1,234", "1234"), ("-1,000.50", "-1000.50"), ("1.234,5", "1.234,5"), ("3,5", "3,5")],
)
def test_only_commas_between_thousands_are_taken_out_of_a_gsm8k_answer(written, gold, tmp_path):
    (tmp_path / "task.jsonl").write_text(
        json.dumps({"question": "q", "answer": f"x\n#### {written}"})
    )
    (problem,) = load_task(f"gsm8k:{tmp_path / 'task.jsonl'}", 5, 0).problems
    assert problem.expected == gold


# tasks by name

AIME = {"id": 60, "problem": "When?", "answer": "025"}
NAMED_ROWS = {
    "gsm8k": {"question": "When?", "answer": "20 + 5 = <<20+5=25>>25\n#### 25"},
    "math500": {"problem": "When?", "answer": "25", "level": 2, "subject": "Algebra"},
    "aime24": AIME,
    "aime25": AIME,
    "aime26": AIME,
    "amc23": {"question": "When?", "answer": 25.0},
    "olympiadbench": {"question": "When?", "final_answer": ["$25$"], "is_multiple_answer": False},
}


@pytest.mark.parametrize("name", NAMED_TASKS)
def test_a_named_task_asks_the_hub_for_its_rows(name, monkeypatch):
    asked = []
    fake = SimpleNamespace(
        load_dataset=lambda *names, split: asked.append((*names, split)) or [NAMED_ROWS[name]]
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    task = load_task(name, 10, 0)
    named = NAMED_TASKS[name]
    assert asked == [(named.id, named.config or None, named.split)]
    (problem,) = task.problems
    assert problem.prompt == (
        "When?\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    assert task.verify(problem.expected, r"<think>x</think>So \boxed{25}.")
    assert not task.verify(problem.expected, r"<think>x</think>So \boxed{26}.")
    assert "put as '{problem}\\n\\nPlease reason" in task.describe()


@pytest.mark.parametrize("name", ["math500", "olympiadbench"])
def test_a_named_task_reads_a_file_of_its_rows(name, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [NAMED_ROWS[name]])
    (problem,) = load_task(f"{name}:{path}", 10, 0).problems
    assert problem.prompt.startswith("When?\n\nPlease")


def test_a_named_task_that_is_not_there_is_called_by_its_name(tmp_path, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach it on the Hub")

    fake = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(NotFound, match=r"^task aime25: .* a copy on disk is aime25:FILE$"):
        load_task("aime25", 5, 1)
    missing = tmp_path / "no.jsonl"
    with pytest.raises(NotFound, match=rf"^task aime25:{missing}: {missing} is not there"):
        load_task(f"aime25:{missing}", 5, 1)


def test_a_prompt_may_be_put_otherwise_and_the_problem_keeps_its_id(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"problem": "a {b}?", "answer": "1"}])
    bare, put = (
        load_task(f"math:{path}", 1, 0),
        load_task(f"math500:{path}", 1, 0, "Q: {problem}\n"),
    )
    assert (bare.problems[0].prompt, put.problems[0].prompt) == ("a {b}?", "Q: a {b}?\n")
    assert bare.problems[0].id == put.problems[0].id
    assert put.prompt == "Q: {problem}\n"


@pytest.mark.parametrize(
    ("generated", "after", "anywhere"),
    [
        (r"x</think>\boxed{42}", True, True),
        (r"so \boxed{42}", False, True),
        (r"\boxed{42}</think>\boxed{41}", False, False),
        (r"\boxed{41}</think>\boxed{42}", True, True),
        ("no idea", False, False),
    ],
)
def test_the_answer_is_looked_for_after_the_reasoning_or_anywhere(
    tmp_path, generated, after, anywhere
):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "6*7?", "answer": "42"}])
    strict, loose = (
        load_task(f"jsonl:{path}", 1, 0, answer=place) for place in ("after_think", "anywhere")
    )
    assert (strict.verify("42", generated), loose.verify("42", generated)) == (after, anywhere)
    assert "anywhere" in loose.describe() and "anywhere" not in strict.describe()


def test_fewer_tokens_than_a_task_is_reported_with_are_said(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [AIME])
    task = load_task(f"aime24:{path}", 1, 0)
    assert "reported with 32,768 new tokens, and eval.max_new_tokens is 512" in (
        task.short_of_tokens(512)
    )
    assert not task.short_of_tokens(32_768)
    assert not load_task(f"math:{path}", 1, 0).short_of_tokens(1)
