"""Whether a student finishes what it says, and what to change where it does not.

In: a recipe and the scores of its models. Out: a sentence, "" where all is well. Decided here: from
which share on it is said (`WORTH_SAYING`), and which remedy belongs to which cause: a student ends
its answers if its training showed it `</think>`, an answer and an end of turn that carry loss. A
teacher is the cause where it leaves at least half as many unfinished as the student does.
Whole examples are the remedy for a cut: a student with `ending = "answer"` finishes too, but early
and mostly wrong (benchmarks/README.md, "Students that finish").
"""

from collections.abc import Mapping

from mlx_distill.recipe.recipe import Recipe
from mlx_distill.scoring.score import Score
from mlx_distill.words import percent

WORTH_SAYING = 0.01  # of the answers


def unfinished_note(recipe: Recipe, scores: Mapping[str, Score]) -> str:
    """What share of the student's answers did not finish, and the remedy."""
    student, teacher = scores.get("student"), scores.get("teacher")
    if student is None or student.unfinished < WORTH_SAYING:
        return ""
    limit = f"{recipe.eval.max_new_tokens:,} tokens"
    said = f"{percent(student.unfinished)} of the student's answers did not finish in {limit}"
    if teacher and teacher.unfinished >= max(WORTH_SAYING, student.unfinished / 2):
        also = f"nor did {percent(teacher.unfinished)} of its teacher's"
        return f"{said}, {also}: raise eval.max_new_tokens"
    return f"{said}: {_remedy(recipe)}"


def unseen_note(recipe: Recipe, scores: Mapping[str, Score]) -> str:
    """For a student that is not scored: that no text showed it an end, and the remedy."""
    if "student" in scores or not _ends_in_the_cut(recipe):
        return ""
    return f"the student was not scored, and may not finish what it says: {_remedy(recipe)}"


def _ends_in_the_cut(recipe: Recipe) -> bool:
    """Whether every text ends where it was cut; a suffix ends as the text does."""
    cut = recipe.truncation
    return cut.cuts and cut.keep != "suffix" and cut.ending == "none" and not cut.whole_share


def _remedy(recipe: Recipe) -> str:
    cut, segments = recipe.truncation, recipe.objective.segments
    if _ends_in_the_cut(recipe):
        shown = "" if "answer" in segments else ' with "answer" in objective.segments'
        return (
            "its training ended in the cut and never showed it an end; set "
            f"truncation.whole_share = 0.25{shown}"
        )
    if "answer" not in segments and cut.ending == "none":
        return 'the answer and the end of turn carried no loss; add "answer" to objective.segments'
    limits = "eval.max_new_tokens"
    if recipe.rollouts.by != "data":
        limits += ", or rollouts.max_new_tokens of what it learned from,"
    return f"train longer, or raise {limits} if texts are still under way"
