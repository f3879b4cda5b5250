"""Scores: intervals against numbers worked out by hand or published, and what counts as finished."""

import itertools
import json
import math
import re

import pytest

from mlx_distill.backends.protocol import Sampling
from mlx_distill.errors import DataError
from mlx_distill.recipe.training_tables import EvalTable
from mlx_distill.scoring.intervals import interval, pass_at, student_t, wilson
from mlx_distill.scoring.score import Score, compare, describe, retention, score
from mlx_distill.verify.tasks import Problem, Task, answer_text

STOP = 0


class Words:
    """A tokenizer of whole words; id 0 ends a turn."""

    eos_token_id, name_or_path = STOP, "words"
    is_fast, chat_template = True, "words"

    def __init__(self):
        self.words = ["<|end|>"]

    def encode(self, text):
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids, skip_special_tokens):
        assert not skip_special_tokens, "</think> may be a special token"
        return " ".join(self.words[i] for i in ids)

    def get_chat_template(self):
        return self.chat_template

    def apply_chat_template(self, turns, add_generation_prompt, **_):
        if turns[-1]["content"] == "refused":
            raise ValueError("roles must alternate")
        return "user: " + " ".join(turn["content"] for turn in turns)

    def __call__(self, text, **_):
        offsets = [found.span() for found in re.finditer(r"\S+", text)]
        return {"input_ids": self.encode(text), "offset_mapping": offsets}


class Scripted:
    """A model that says, for the i-th prompt, the i-th of its lines."""

    def __init__(self, tokenizer, lines):
        self.tokenizer, self.lines, self.asked = tokenizer, lines, None

    def generate(self, prompts, sampling):
        self.asked = prompts, sampling
        return ((place, self.tokenizer.encode(line)) for place, line in enumerate(self.lines))


@pytest.fixture(autouse=True)
def end_of_turn(monkeypatch):
    monkeypatch.setattr("mlx_distill.data.sequences.end_of_turn", lambda tokenizer: "<|end|>")


def exact(expected, generated):
    return answer_text(generated).strip() == expected


def scored(correct, samples=1):
    low, high = interval(correct.values())
    accuracy = sum(map(sum, correct.values())) / len(correct) / samples
    return Score(
        accuracy=accuracy,
        low=low,
        high=high,
        problems=len(correct),
        samples=samples,
        correct=correct,
        unfinished=0.0,
        well_formed=1.0,
        mean_tokens=10.0,
        seconds=1.0,
    )


def marks(text):
    return {str(i): [float(mark)] for i, mark in enumerate(text)}


def test_wilson_against_published_values():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0 / 20, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1 / 29, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(1.0, 20)[1] == 1.0 and wilson(0.0, 20)[0] == 0.0


def test_students_t_against_the_table():
    for degrees, value in [(2, 4.303), (4, 2.776), (9, 2.262), (29, 2.045), (99, 1.984)]:
        assert student_t(degrees) == pytest.approx(value, abs=2e-3)


def test_one_sample_a_problem_is_wilson():
    assert interval([[1.0], [0.0], [1.0], [1.0]]) == wilson(0.75, 4)


def test_samples_of_a_problem_are_a_cluster():
    # shares 1, 1, 0, 0, .5: p = .5, SE² = 1 / (5·4) = .05, n* = .25 / .05 = 5, t(4) = 2.776
    rows = [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
    t = 2.7764
    half = t * math.sqrt(0.25 / 5 + t * t / 100) / (1 + t * t / 5)
    assert interval(rows) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-3)


def test_sixty_four_copies_of_an_answer_are_no_more_than_one():
    once, often = (
        interval([[1.0]] * 15 + [[0.0]] * 15),
        interval([[1.0] * 64] * 15 + [[0.0] * 64] * 15),
    )
    assert often[0] <= once[0] + 1e-3 and often[1] >= once[1] - 1e-3


def test_steady_problems_are_worth_all_of_their_samples():
    assert interval([[1.0, 0.0]] * 10) == wilson(0.5, 20, student_t(9))
    assert interval([[1.0, 1.0]] * 10) == wilson(1.0, 10, student_t(9))


def test_a_score_counts_what_was_generated():
    tokenizer = Words()
    lines = [
        "<think> a </think> 1 <|end|>",  # right
        "<think> a </think> 9 <|end|>",  # wrong, finished
        "<think> a </think> 3",  # no stop: unfinished, so wrong
        "4 <|end|>",  # no </think>: unfinished, so wrong
        # two ends: finished, not well formed; verified from the first end on
        "</think> 5 </think> <|end|>",
        "",  # nothing at all
    ]
    task = Task("t", [Problem(f"id{i}", f"q{i}", str(i)) for i in range(1, 7)], exact)
    model, seen = Scripted(tokenizer, lines), []
    result = score(
        model, tokenizer, task, EvalTable(max_new_tokens=9, seed=5), progress=seen.append
    )
    assert result.correct == {
        "id1": [1.0],
        "id2": [0.0],
        "id3": [0.0],
        "id4": [0.0],
        "id5": [0.0],
        "id6": [0.0],
    }
    assert result.accuracy == 1 / 6 and (result.low, result.high) == wilson(1 / 6, 6)
    assert result.unfinished == 3 / 6
    assert result.well_formed == 2 / 6
    assert result.mean_tokens == (5 + 5 + 4 + 2 + 4 + 0) / 6
    assert (result.problems, result.samples) == (6, 1) and result.seconds >= 0
    assert seen == [1] * 6
    prompts, sampling = model.asked
    assert prompts[0] == tokenizer.encode("user: q1")
    assert sampling == Sampling(9, 0.0, 1.0, 5, 64, frozenset([STOP]), (0,) * 6)


def test_samples_of_a_problem_stand_together():
    tokenizer = Words()
    right, wrong = "</think> 1 <|end|>", "</think> 2 <|end|>"
    model = Scripted(tokenizer, [right, right, wrong, wrong])
    task = Task("t", [Problem("a", "q", "1"), Problem("b", "r", "1")], exact)
    result = score(model, tokenizer, task, EvalTable(samples=2, temperature=0.6))
    assert result.correct == {"a": [1.0, 1.0], "b": [0.0, 0.0]}
    assert result.accuracy == 0.5


def test_other_stop_ids_may_be_named():
    tokenizer = Words()
    line = "</think> 1 <|im_end|>"
    other = tokenizer.encode(line)[-1]
    task = Task("t", [Problem("a", "q", "1")], exact)
    assert score(Scripted(tokenizer, [line]), tokenizer, task, EvalTable()).accuracy == 0
    assert (
        score(
            Scripted(tokenizer, [line]), tokenizer, task, EvalTable(), stop_ids=frozenset([other])
        ).accuracy
        == 1
    )


def test_an_empty_task_has_no_score():
    with pytest.raises(DataError, match="task 'none' has no problems to score"):
        score(Scripted(Words(), []), Words(), Task("none", [], exact), EvalTable())


def test_a_problem_that_the_template_refuses_is_named():
    task = Task("t", [Problem("a", "refused", "1")], exact)
    with pytest.raises(
        DataError, match=r"task 't': problem 'refused' cannot be asked: .*roles must alternate"
    ):
        score(Scripted(Words(), []), Words(), task, EvalTable())


def test_a_score_in_one_line():
    line = describe(scored(marks("1" * 15 + "0" * 5)))
    for part in ("75.0%", "53.1% to 88.8%", "20 problems", "0.0% unfinished", "10 tokens", "1 s"):
        assert part in line


def test_a_score_survives_json():
    before = scored(marks("1101"))
    assert Score.model_validate(json.loads(json.dumps(before.content()))) == before


def test_compare_by_hand():
    # 3 problems only a solves, 1 only b: Σd = 2, Σd² = 4, n + 2 = 12
    a, b = scored(marks("1111100000")), scored(marks("0011000001"))
    difference = compare(a, b)
    middle, variance = 2 / 12, 6 / 12 - (2 / 12) ** 2
    half = 1.959964 * math.sqrt(variance / 12)
    assert difference.mean == pytest.approx(0.2)
    assert (difference.low, difference.high) == pytest.approx(
        (middle - half, middle + half), abs=1e-6
    )
    assert (difference.problems, difference.verdict) == (10, "no clear difference")


def test_compare_says_which_is_better():
    strong, weak = scored(marks("1" * 40 + "0" * 10)), scored(marks("1" * 20 + "0" * 30))
    assert compare(strong, weak).verdict == "better" and compare(strong, weak).low > 0
    assert compare(weak, strong).verdict == "worse" and compare(weak, strong).high < 0
    same = compare(weak, weak)
    assert same.mean == 0 and same.low == -same.high < 0 and same.verdict == "no clear difference"


def test_compare_pairs_the_shared_problems():
    a = scored({"x": [1.0], "y": [1.0], "only a": [0.0]})
    b = scored({"y": [0.0], "x": [1.0], "only b": [1.0]})
    assert compare(a, b).mean == 0.5 and compare(a, b).problems == 2
    with pytest.raises(DataError, match="share no problem"):
        compare(a, scored({"z": [1.0]}))


def test_retention_of_accuracy_and_of_gain():
    student, base, teacher = (
        scored(marks("1110000000")),
        scored(marks("1" + "0" * 9)),
        scored(marks("11111" + "0" * 5)),
    )
    kept = retention(student, base, teacher)
    assert kept.accuracy == pytest.approx(0.6)
    assert kept.gain == pytest.approx(0.5)


def test_nothing_to_keep_is_not_a_number():
    none, some = scored(marks("0000")), scored(marks("1000"))
    assert retention(some, none, none).accuracy is None
    assert retention(some, none, none).gain is None
    assert retention(some, some, some).gain is None


# several samples, lengths, and where the answer stands


def test_pass_at_k_against_every_subset():
    """The formula beside the share of all subsets of k samples that hold a right one."""
    rows = [[1.0, 0.0, 0.0, 1.0, 0.0], [0.0] * 5, [1.0] * 5, [0.0, 0.0, 0.0, 0.0, 1.0]]
    for k in range(1, 6):
        shares = [sum(map(any, itertools.combinations(row, k))) / math.comb(5, k) for row in rows]
        found = pass_at(rows, k)
        assert found.mean == pytest.approx(sum(shares) / 4)
        assert (found.low, found.high) == wilson(found.mean, 4)


def last_word(expected, generated):
    return generated.split()[-1] == expected


def sampled(answer, lines, samples, verify=exact):
    words = Words()
    task = Task("t", [Problem("a", "q", "1"), Problem("b", "r", "1")], verify, answer=answer)
    settings = EvalTable(samples=samples, temperature=1.0, max_new_tokens=99)
    return score(Scripted(words, lines), words, task, settings)


def test_a_score_has_pass_at_k_and_the_spread_of_lengths():
    lines = ["x </think> 1 <|end|>", "y y y </think> 2 <|end|>", "y </think> 2 <|end|>", "z " * 9]
    found = sampled("after_think", lines, 2)
    assert found.accuracy == 0.25
    assert found.pass_at["2"] == (0.5, *wilson(0.5, 2))
    assert found.pass_at["1"][0] == 0.25
    assert found.tokens_at == {"0.5": 5.0, "0.9": pytest.approx(8.1), "1": 9.0}
    assert "pass@2 50.0%" in describe(found) and "(median 5, longest 9)" in describe(found)
    assert Score.model_validate_json(found.model_dump_json()) == found


def test_anywhere_judges_texts_without_an_end_of_thinking_too():
    def right(answer):
        return sampled(answer, ["1 <|end|>", "2 <|end|>", "1", "</think> 1 <|end|>"], 2, last_word)

    exactly_said = right("anywhere")
    assert exactly_said.correct == {"a": [1.0, 0.0], "b": [1.0, 1.0]}
    assert exactly_said.unfinished == 0.25, "that one did not stop by itself"
    assert right("after_think").accuracy == 0.25


def test_a_setting_in_which_no_answer_fits_is_refused():
    words = Words()
    task = Task("aime24", [Problem("a", "q", "1 2 3"), Problem("b", "r", "1 2")], exact, tokens=9)
    with pytest.raises(
        DataError, match="max_new_tokens is 2, and its shortest answer alone takes 3"
    ):
        score(Scripted(words, []), words, task, EvalTable(max_new_tokens=2))
    lines = ["</think>1 2 3 <|end|>"] * 2
    assert score(Scripted(words, lines), words, task, EvalTable(max_new_tokens=3)).problems == 2
