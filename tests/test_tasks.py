"""Tasks: which problems are drawn, what is read as the answer, and what a wrong name or row is told."""

import json
import threading

import pytest

from mlx_distill.embedded import task as embedded
from mlx_distill.errors import DataError, NotFound
from mlx_distill.tasks import answer_text, load_task, math_equal


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def gsm8k(tmp_path):
    rows = [{"question": f"What is {i} + 1000?", "answer": f"{i} + 1000 = <<{i}+1000={i + 1000}>>\n#### 1,{i:03d}"} for i in range(20)]
    return write_rows(tmp_path / "test.jsonl", rows)


def test_gsm8k_expects_the_number_after_the_marks(gsm8k):
    problem = load_task(f"gsm8k:{gsm8k}", 20, seed=1).problems[7]
    assert (problem.prompt, problem.expected) == ("What is 7 + 1000?", "1007")


def test_the_same_arguments_draw_the_same_problems(gsm8k):
    def drawn(count, seed):
        return [problem.id for problem in load_task(f"gsm8k:{gsm8k}", count, seed).problems]

    assert drawn(5, 1) == drawn(5, 1) != drawn(5, 2)
    assert len(drawn(500, 1)) == 20
    assert set(drawn(5, 1)) <= set(drawn(500, 9)), "a problem has one id, whichever rows were drawn with it"


def test_a_repeated_row_is_one_problem(tmp_path):
    path = write_rows(tmp_path / "twice.jsonl", [{"prompt": "1+1", "answer": "2"}, {"prompt": "1+1", "answer": 2}])
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


def test_expected_answers_are_read_whole():
    assert math_equal("2x+1", r"\boxed{1+2x}")
    assert not math_equal("2x+1", "2")
    assert math_equal(r"\frac{1}{2}", "0.5")
    assert math_equal("$1,234$", "The answer is 1234.")


def test_verifying_works_outside_of_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(math_equal("42", "#### 42")))
    thread.start()
    thread.join()
    assert found == [True]


def test_the_embedded_task_is_asked_for_its_held_out_problems():
    task = load_task(f"embedded:{embedded.NAME}", 20, 7)
    examples = embedded.generate("held_out", 20, 7)
    assert [problem.prompt for problem in task.problems] == [example.prompt for example in examples]
    for problem, example in zip(task.problems, examples, strict=True):
        assert task.verify(problem.expected, f"<think>\n{example.cot}\n</think>\n\n{example.answer}")
        assert not task.verify(problem.expected, example.answer), "without </think> there is no answer"
        assert not task.verify(problem.expected, f"</think>{example.answer}9")
    with pytest.raises(NotFound, match=f"no embedded task 'chian'; did you mean embedded:{embedded.NAME}"):
        load_task("embedded:chian", 3, 7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm8:x", "no task 'gsm8:x'; did you mean gsm8k:PATH.*Choices: embedded:NAME, gsm8k:PATH, jsonl:PATH"),
        ("aime24", "no task 'aime24'.*Choices: embedded:NAME"),
        ("gsm8k", "names nothing after 'gsm8k': write gsm8k:PATH"),
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
        ('{"prompt": "x"}', r":1: no column 'answer', found prompt; this task reads prompt and answer"),
        ("[1, 2]", r":1: no column 'prompt', found list"),
        ('{"prompt": "x", "answer": null}', r":1: column 'answer' should be text or a number, found NoneType"),
        ('{"prompt": ', r":1: not a JSON object"),
        ('{"prompt": "x", "answer": ""}', r":1: answer '' is not an expression"),
    ],
)
def test_an_unusable_row_is_named(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(row, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_task(f"jsonl:{path}", 1, 0)


def test_a_gsm8k_row_without_its_marks_is_named(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"question": "x", "answer": "five"}])
    with pytest.raises(DataError, match=r":1: answer ends in 'five', expected '#### NUMBER'"):
        load_task(f"gsm8k:{path}", 1, 0)
