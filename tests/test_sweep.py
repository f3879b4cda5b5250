"""`mlx-distill sweep`, end to end on tiny models, each run in a process of its own: results,
failures, kills, sharing.
"""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from endings import logged

from mlx_distill.errors import RunError
from mlx_distill.recipe.load import load_recipe
from mlx_distill.reporting import study
from mlx_distill.runs.rows import MetricsRow
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.scoring.task_scores import TaskScores
from mlx_distill.signals import ended_by_signals
from mlx_distill.sweeps.outline import planned
from mlx_distill.sweeps.queue import _held
from mlx_distill.sweeps.results import collect, teacher_pass, write_best
from mlx_distill.sweeps.sweep import distinct, load_sweep
from mlx_distill.words import amount

SWEEP = """
question = "What does the fraction do?"
recipe = "{recipe}"
folder = "{out}/{name}"
runs = "{out}/runs"

[set]
optim.steps = 2
run.checkpoint_every = 0
run.validate_every = 0
teacher.cache = "hidden"
teacher.cache_folder = "{out}/cache"
"""
FRACTIONS = "[axes]\ntruncation.fraction = [0.5, 1.0]\n"
BAD = (
    '[[arms]]\nname = "too fast"\noptim.learning_rate = 1000.0\noptim.weight_decay = 1000.0\noptim.decayed = "all"\n'
    'optim.schedule = "constant"\noptim.warmup_fraction = 0.0\n'
)
BAD_RUN = (
    "learning_rate=1000.0_schedule=constant_warmup_fraction=0.0_weight_decay=1000.0_decayed=all"
    "_seed=42"
)


@pytest.fixture
def write(tiny_recipe, tmp_path):
    def write(text: str, name: str = "mine") -> Path:
        path = tmp_path / f"{name}.toml"
        path.write_text(SWEEP.format(recipe=tiny_recipe, out=tmp_path, name=name) + text)
        return path

    return write


@pytest.fixture
def sweep_line(command_line):
    """`mlx-distill sweep ARGUMENTS` whose runs are forks where the system allows it: a second each
    instead of several.
    """
    return lambda *words, **job: command_line("sweep", *words, fork_jobs=True, **job)


def rows_of(path: Path) -> dict[str, study.Row]:
    return {
        row.run if row.role == "student" else row.role: row
        for row in study.read_rows(path.with_suffix("") / "results.csv")
    }


def test_a_sweep_runs_reports_and_tells_what_failed(write, sweep_line, command_line, tmp_path):
    path = write(FRACTIONS + BAD)
    result = sweep_line(path, "--jobs", "2", "--backend", "mlx")
    assert result.code == 2 and "Traceback" not in result.out + result.err
    (line,) = result.err.strip().splitlines()
    assert "1 of 3 runs failed, the others are kept" in line and f"{BAD_RUN}: step 2: the " in line
    assert "report: " in result.out and (tmp_path / "mine" / "report.html").exists()

    rows = rows_of(path)
    assert set(rows) == {"seed=42", "fraction=1.0_seed=42", BAD_RUN, "base", "teacher"}
    half, whole, bad = rows["seed=42"], rows["fraction=1.0_seed=42"], rows[BAD_RUN]
    run = RunFolder(tmp_path / "runs" / half.run)
    steps = logged(run.path, "metrics.jsonl")
    assert (
        half.settings == {"truncation.fraction": 0.5}
        and half.status == study.DONE
        and len(half.right) == 4
    )
    assert half.tokens_read == sum(row["tokens"] for row in steps) < whole.tokens_read
    assert (
        half.flops == pytest.approx(sum(sum(row["flops"].values()) for row in steps))
        and half.flops < whole.flops
    )
    assert half.train_seconds == pytest.approx(sum(row["seconds"] for row in steps))
    assert half.kl == pytest.approx(logged(run.path, "validation.jsonl")[-1]["kl_cot"])
    assert half.accuracy == run.read(TaskScores).whole["student"].accuracy == np.mean(half.right)
    assert (
        bad.label == "too fast"
        and bad.status.startswith("step 2: the gradient norm")
        and bad.right == ()
    )

    assert (tmp_path / "runs" / "prompt_date").read_text() == ""  # this template reads no clock
    assert "asking the teacher 24/24" in (tmp_path / "mine" / "logs" / "teacher.log").read_text()
    for name in (half.run, whole.run):
        assert "asking the teacher" not in (tmp_path / "mine" / "logs" / f"{name}.log").read_text()
    kept = teacher_pass(load_sweep(path))
    assert (kept["sequences"], kept["runs"]) == (24, 2) and kept["tokens"] > 0 and kept["bytes"] > 0

    page = (tmp_path / "mine" / "report.html").read_text()
    assert "Nothing beats the student before training" in page  # in two steps
    assert not list((tmp_path / "mine" / "best").iterdir())
    addresses = [unquote(address) for address in re.findall(r'href="([^"]*)"', page)]
    assert {"results.csv", f"recipes/{half.run}.toml", f"logs/{BAD_RUN}.log"} <= {*addresses}
    assert f"../runs/{half.run}/report.html" in addresses
    assert all((tmp_path / "mine" / address).is_file() for address in addresses)
    sweep = load_sweep(path)
    write_best(sweep, [row for row in collect(sweep, {}) if row.role != "base"])
    best = load_recipe(tmp_path / "mine" / "best" / "budget-1.00.toml")
    assert best.run.name == "mine-budget-1.00" and best.optim.steps == 2 and best.eval.score_base

    # tries the failed one alone, and that in a program of its own
    again = command_line("sweep", path, "--backend", "mlx")
    assert (
        again.code == 2
        and "3 runs, 2 of them done before" in again.out
        and again.out.count(" after ") == 0
    )

    shutil.rmtree(tmp_path / "cache")  # to free some disk: what was made of it stays
    shutil.rmtree(tmp_path / "mine")
    path.write_text(path.read_text().replace(BAD, ""))
    rebuilt = sweep_line(path, "--backend", "mlx")
    assert rebuilt.code == 0 and set(rows_of(path)) == {
        "seed=42",
        "fraction=1.0_seed=42",
        "base",
        "teacher",
    }, rebuilt.err
    assert teacher_pass(load_sweep(path)) == {}


@pytest.mark.parametrize(("signals", "code"), [(["KILL"], -9), (["INT"], 130)])
def test_a_sweep_that_was_stopped_goes_on(write, sweep_line, tmp_path, signals, code):
    """Stopped after its first run; the child beside it may still be at work when the sweep is
    started again.
    """
    path = write(FRACTIONS)
    words = (path, "--jobs", "2", "--backend", "mlx")
    stopped = sweep_line(
        *words, at="mlx_distill.sweeps.queue:student_row", when="after", signals=signals
    )
    assert stopped.code == code, stopped.err
    if code == 130:
        assert (
            "report: " in stopped.out
            and "The same command continues" in stopped.out
            and rows_of(path)
        )
    result = sweep_line(*words)
    assert result.code == 0, result.err
    rows = rows_of(path)
    assert {row.status for row in rows.values()} == {study.DONE} and len(rows) == 4
    assert not list((tmp_path / "runs").glob("*/checkpoints/.*.tmp"))


def test_sweeps_over_one_folder_share_runs_and_one_teacher_pass(write, sweep_line, tmp_path):
    one, two = (
        write(FRACTIONS, "one"),
        write("[axes]\nobjective.segments = [['cot'], ['answer']]\n", "two"),
    )
    result = sweep_line(one, two, "--backend", "mlx", "--set", "truncation.fraction=1.0")
    assert result.code == 0 and "3 runs" in result.out, result.err
    assert rows_of(one)["seed=42"].right == rows_of(two)["seed=42"].right
    assert rows_of(one)["seed=42"].settings == {"truncation.fraction": 1.0}
    assert rows_of(two)["seed=42"].settings == {"objective.segments": ["cot"]}
    manifests = [
        json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/manifest.json")
    ]
    assert len({manifest["teacher_cache"] for manifest in manifests}) == 1 and len(manifests) == 3
    assert len(list((tmp_path / "cache").glob("*/part-*"))) == 1

    changed = write(FRACTIONS.replace("[axes]", "data.train_examples = 9\n[axes]"), "one")
    refused = sweep_line(changed, "--set", "truncation.fraction=1.0")
    assert (
        refused.code == 2
        and "holds another run than this sweep's (data.train_examples: 0 → 9)" in refused.err
    )


def test_a_run_that_failed_before_its_first_step_does_not_stand_in_the_way(write):
    """It left a recipe and nothing that another one could not have made; `run` replaces such a
    folder.
    """
    (point,) = load_sweep(write("[axes]\nbatch.global_batch_size = [400]\n")).points
    RunFolder.open(point.recipe)
    corrected = load_sweep(write("[axes]\nbatch.micro_batch_size = [1]\n"))
    corrected.points[0].folder.path.symlink_to(point.folder.path)
    assert list(distinct([corrected])) == [corrected.points[0].folder.path]
    RunFolder(point.folder.path).append(MetricsRow(step=1))
    with pytest.raises(RunError, match="holds another run than this sweep's"):
        distinct([corrected])


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGHUP])
def test_a_polite_kill_is_a_ctrl_c(which):
    before = signal.getsignal(which)
    with pytest.raises(KeyboardInterrupt), ended_by_signals():
        os.kill(os.getpid(), which)
        time.sleep(1)
    assert signal.getsignal(which) is before


def test_two_sweeps_that_would_overwrite_each_other_are_refused(write, sweep_line):
    one, two = (
        write("optim.warmup_fraction = 0.0\n" + FRACTIONS, "one"),
        write("optim.warmup_fraction = 0.5\n" + FRACTIONS, "two"),
    )
    result = sweep_line(one, two)
    assert (
        result.code == 2
        and "would hold two different runs (optim.warmup_fraction: 0.0 → 0.5)" in result.err
    )
    twice = sweep_line(one, one)
    assert twice.code == 2 and "another of these sweeps has the folder" in twice.err


def test_results_have_a_folder_of_their_own(write, sweep_line, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.toml").touch()
    result = sweep_line(write(FRACTIONS))
    assert (
        result.code == 2
        and "holds a run, and" in result.err
        and "name another `folder`" in result.err
    )
    (tmp_path / "other").write_text("a file")
    result = sweep_line(write(FRACTIONS, "other"))
    assert (
        result.code == 2
        and "cannot write to" in result.err
        and len(result.err.strip().splitlines()) == 1
    )


def test_what_a_run_needs_is_planned_and_told_before_anything_runs(write, sweep_line, tmp_path):
    path = write("[axes]\nbatch.micro_batch_size = [1, 4]\nobjective.kd_weight = [0.5, 0.0]\n")
    plans = [planned(point, "mlx") for point in load_sweep(path).points]
    assert (
        0 < plans[0].peak.total < plans[2].peak.total
        and plans[0].total_flops > plans[1].total_flops
    )
    result = sweep_line(path, "--dry-run")
    assert (
        result.code == 0
        and f"{amount(sum(plan.total_flops for plan in plans), 'FLOP')} of training are left"
        in result.out
    )
    assert "kept" in result.out and "none" in result.out and not (tmp_path / "mine").exists()


def test_what_cannot_be_planned_is_told_and_not_summed_as_nothing(write, sweep_line):
    broken_arm = '[[arms]]\nname = "a"\ndata.source = "nowhere.jsonl"\n'
    path = write(broken_arm + '[[arms]]\nname = "b"\nobjective.kd_weight = 0.0\n')
    broken, whole = load_sweep(path).points
    assert planned(broken, "mlx") is None and planned(whole, "mlx")
    result = sweep_line(path, "--dry-run")
    assert "1 of 2 runs cannot be planned; the first: " in result.out
    assert "nowhere.jsonl" in result.out.split("the first: ")[1]
    assert "left to do in the others" in result.out
    result = sweep_line(write("[axes]\ndata.source = ['nowhere.jsonl']\n"), "--dry-run")
    assert "1 of 1 runs cannot be planned" in result.out and "left to do" not in result.out


def test_nothing_run_yet_is_an_empty_result(write):
    assert (
        collect(load_sweep(write(FRACTIONS)), {}) == []
        and teacher_pass(load_sweep(write(FRACTIONS))) == {}
    )


@pytest.mark.parametrize(
    "name",
    ["recipes/seed=42.toml", "results.csv", "report.md", "best/budget-1.00.toml", "logs/a.log"],
)
def test_files_of_others_with_a_sweeps_names_are_not_overwritten(write, tmp_path, name):
    mine = tmp_path / "mine" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with (
        pytest.raises(RunError, match="no sweep made it: move it away, or name another `folder`"),
        _held(load_sweep(write(FRACTIONS))),
    ):
        pass
    assert [path for path in (tmp_path / "mine").rglob("*") if path.is_file()] == [
        mine
    ] and mine.read_text() == "mine"


@pytest.mark.parametrize("gone", ["results.csv", "run.lock"])
def test_a_sweeps_folder_is_known_by_its_lock_and_by_its_results(write, tmp_path, gone):
    one = load_sweep(write(FRACTIONS))
    with _held(one):
        (one.folder / "recipes" / "a.toml").touch()
        (one.folder / "results.csv").write_text(study.rows_text([]))
    (one.folder / gone).unlink()
    with _held(one):
        pass
