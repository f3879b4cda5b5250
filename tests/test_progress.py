"""What a person sees of a sweep's children while they run, and of a run at its end."""

import io

import pytest
from made_runs import make_recipe, make_score

from mlx_distill.recipe.recipe import with_values
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.scoring.task_scores import TaskScores
from mlx_distill.sweeps.jobs import Job
from mlx_distill.sweeps.points import Point
from mlx_distill.sweeps.progress import Mirror, Runs, last_progress
from mlx_distill.terminal.last_words import last_words
from mlx_distill.view import Screen, View


@pytest.fixture
def view():
    return View(Screen(file=io.StringIO(), width=80), lambda: 0.0)


def said(view):
    return view.console.file.getvalue().splitlines()


def make_job(tmp_path):
    return Job("seed=1", ("run",), tmp_path / "run.log")


def test_a_log_says_how_far_its_child_is(tmp_path):
    log = tmp_path / "log"
    assert last_progress(log) is None
    for text, told in {
        "backend mlx\n": None,
        "training 5/100  left 2 min 03 s  loss 0.5\n  peak 1 GB\n": "training 5/100  left 2 min 03 s",
        "training 100/100  loss 0.5\nvalidation after step 100: loss 1\n": "training 100/100",
        "asking the teacher 3/9  left 4 s\n": "asking the teacher 3/9  left 4 s",
        "x" * 9000 + "\nscoring base 1/2\n": "scoring base 1/2",
    }.items():
        log.write_text(text)
        found = last_progress(log)
        assert (found and str(found)) == told


def test_runs_are_told_by_their_names_in_words_each_quarter(tmp_path, view):
    job = make_job(tmp_path)
    recipe = with_values(make_recipe("a"), run={"seed": 3})
    settings = {"truncation.fraction": 0.25, "objective.kd_weight": 0.5}
    words = Point("", settings, recipe).words
    assert words == "a quarter of the tokens, with the teacher, seed 3"
    assert Point("short", settings, recipe).words == "short, seed 3"
    assert Point("", {}, recipe).words == "as in the recipe, seed 3"
    assert Point("token-matched", settings, recipe).words.startswith("token-matched, a quarter of")
    watch = Runs(view, {job: words})
    watch(job)
    for step in (1, 25, 30, 50, 50, 74, 100):
        job.log.write_text(f"training {step}/100  left 9 s  loss 0.5\n")
        watch(job)
    assert said(view) == [
        f"{words}: training 25/100  left 9 s",
        f"{words}: training 50/100  left 9 s",
    ]


def test_the_teachers_pass_has_its_own_bar(tmp_path, view):
    job = make_job(tmp_path)
    watch = Mirror(view)
    begun, ended = "asking the teacher 2/8  left 3 min 25 s", "asking the teacher 8/8"
    for line in ("begins", begun, ended, "scoring base 1/2", "writing 2/2"):
        job.log.write_text(f"{line}\n")
        watch(job)
        watch(job)
    # the child's time: nobody here saw its first pieces
    assert said(view) == [begun, ended, "scoring base 1/2"]


def test_a_run_ends_with_its_scores_and_what_to_type(tmp_path, view):
    recipe = with_values(make_recipe("r"), run={"folder": str(tmp_path)})
    folder = RunFolder.of(recipe)
    scores = {"teacher": make_score(487), "base": make_score(119), "student": make_score(356)}
    (folder.path / "student").mkdir(parents=True)
    (folder.path / "student" / "config.json").write_text("{}")
    folder.write(TaskScores(task="t", scores=scores))
    last_words(folder, recipe, view)
    head, *rows, note, report, ask = said(view)
    assert note.startswith("note: ")
    assert head.split()[:2] == ["model", "right"] and max(map(len, [head, *rows])) <= 80
    assert [row[:15].strip() for row in rows] == ["student before", "student after", "teacher"]
    assert "71.2\u00a0%" in rows[1] and "97.4\u00a0%" in rows[2]
    assert report.startswith("report: ") and ask == f"try it: mlx-distill chat {folder.path}"
    folder.write(TaskScores())
    last_words(folder, with_values(recipe, eval={"task": ""}), view)
    note, _, score, _ = said(view)[-4:]
    assert note.startswith("note: the student was not scored, and may not finish")
    assert score == f"score it: mlx-distill eval {folder.path} --set task=embedded:chain"
