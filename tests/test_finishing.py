"""What a run says of a student that does not finish its answers: the remedy of its cause."""

import pytest
from tiny import recipe_of

from mlx_distill.scoring.finishing import unfinished_note, unseen_note
from mlx_distill.scoring.score import Score
from mlx_distill.scoring.unrounded import unrounded_note


def score(unfinished: float) -> Score:
    return Score.model_construct(unfinished=unfinished)


def note(student: float, teacher: float | None = None, **tables) -> str:
    recipe = recipe_of(**tables)
    scores = {"student": score(student)} | (
        {"teacher": score(teacher)} if teacher is not None else {}
    )
    return unfinished_note(recipe, scores)


HALF = {"fraction": 0.5}
ENDED, SHARED = HALF | {"ending": "answer"}, HALF | {"whole_share": 0.1}
BOTH = ("cot", "answer")


@pytest.mark.parametrize(
    ("truncation", "segments", "remedy"),
    [
        (HALF, ("cot",), 'set truncation.whole_share = 0.25 with "answer" in'),
        (HALF, BOTH, "set truncation.whole_share = 0.25$"),
        ({"max_tokens": 9}, BOTH, "set truncation.whole_share"),
        ({"keep": "cot"}, BOTH, "set truncation.whole_share"),
        ({}, ("cot",), 'add "answer" to objective.segments'),
        (SHARED, ("cot",), 'add "answer" to objective.segments'),
        (HALF | {"keep": "suffix"}, ("cot",), 'add "answer" to objective.segments'),
        (HALF | {"keep": "suffix"}, BOTH, "train longer, or raise eval.max_new_tokens"),
        (ENDED, ("cot",), "train longer, or raise eval.max_new_tokens"),
        (SHARED, BOTH, "train longer, or raise eval.max_new_tokens"),
    ],
)
def test_the_remedy_belongs_to_the_cause(truncation, segments, remedy):
    import re

    said = note(0.5, truncation=truncation, objective={"segments": segments})
    assert said.startswith("50.0\u00a0% of the student's answers did not finish in 512 tokens: ")
    assert re.search(remedy, said)


def test_texts_that_a_model_wrote_may_have_been_too_short():
    said = note(0.5, rollouts={"by": "teacher"}, objective={"segments": BOTH})
    assert "or rollouts.max_new_tokens of what it learned from" in said


def test_a_teacher_that_does_not_finish_either_needs_more_room():
    said = note(0.5, 0.25, truncation=HALF)
    assert said.endswith("nor did 25.0\u00a0% of its teacher's: raise eval.max_new_tokens")
    assert "truncation" in note(0.5, 0.0, truncation=HALF)


def test_a_teacher_that_mostly_finishes_is_not_the_cause():
    """A few of its answers did not hide that its student never saw an end."""
    assert "set truncation.whole_share" in note(1.0, 0.02, truncation=HALF)
    assert note(0.04, 0.02, truncation=HALF).endswith("raise eval.max_new_tokens")


def test_a_student_that_is_not_scored_is_judged_by_what_it_saw():
    said = unseen_note(recipe_of(truncation=HALF), {})
    assert said.startswith("the student was not scored, and may not finish what it says: its ")
    assert "set truncation.whole_share = 0.25" in said
    assert unseen_note(recipe_of(truncation=HALF), {"student": score(0.0)}) == ""
    for shown in (ENDED, SHARED, HALF | {"keep": "suffix"}, {}):
        assert unseen_note(recipe_of(truncation=shown), {}) == ""


def test_nothing_is_said_where_all_is_well():
    assert note(0.0, truncation=HALF) == "" and note(0.009) == ""
    assert unfinished_note(recipe_of(), {}) == ""


def test_a_score_without_the_rounding_that_was_learned_says_so():
    rounded = recipe_of(student={"quantize_aware_bits": 4})
    said = unrounded_note(rounded, {"student": score(0.0)})
    assert "rounded to 4 bits" in said and "`--to mlx-4bit`" in said
    assert unrounded_note(rounded, {}) == ""
    assert unrounded_note(recipe_of(), {"student": score(0.0)}) == ""
