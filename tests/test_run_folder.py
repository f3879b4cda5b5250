"""The run folder: every file whole or not at all, which checkpoints stay, and when a folder is
continued or refused.
"""

import errno
import io
import json
import math
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from endings import STUDENT, arguments, assert_same
from rich.console import Console
from safetensors.numpy import save_file
from tiny import left_by_a_mac, recipe_of

from mlx_distill import pipeline
from mlx_distill.backends.pair import Pair
from mlx_distill.backends.stops import stops_of
from mlx_distill.data.sequences import stop_ids
from mlx_distill.errors import OutOfMemory, RankLost, RunError
from mlx_distill.models.hub import load_tokenizer
from mlx_distill.recipe.load import load_recipe
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.runs.disk import refuse_full_disk
from mlx_distill.runs.manifest import Manifest, Start
from mlx_distill.runs.provenance import identity
from mlx_distill.runs.rows import LOGS, MetricsRow, ValidationRow
from mlx_distill.runs.run_folder import RunFolder, TrainState
from mlx_distill.scoring.of_run import stops
from mlx_distill.scoring.score import Score
from mlx_distill.scoring.task_scores import TaskScores, forget_score
from mlx_distill.teaching.of_recipe import cache_of
from mlx_distill.training.loop import restore
from mlx_distill.view import View


def make_recipe(folder: Path, **tables) -> Recipe:
    run = {"name": "one", "folder": str(folder)} | tables.pop("run", {})
    return recipe_of(run=run, **tables)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder.open(make_recipe(tmp_path))


def write(text: str = "weights"):
    def write_files(path: Path) -> None:
        (path / "weights.safetensors").write_text(text)
        (path / "optimizer.safetensors").write_text(text)

    return write_files


def snapshot(path: Path) -> dict[str, bytes | None]:
    return {
        str(file.relative_to(path)): file.read_bytes() if file.is_file() else None
        for file in sorted(path.rglob("*"))
    }


# checkpoints


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("all", [2, 4, 6, 8]),
        ("last", [8]),
        ("last_and_best", [4, 8]),
    ],
)
def test_which_checkpoints_stay(folder, keep, kept):
    for step, best in ((2, 2), (4, 4), (6, 4), (8, 4)):
        folder.save_checkpoint(TrainState(step, best_step=best), write(), keep)
        assert folder.steps()[-1] == step
    assert folder.steps() == kept


def test_before_there_is_a_best_one_the_last_stays(folder):
    for step in (2, 4):
        folder.save_checkpoint(TrainState(step), write(), "last_and_best")
    assert folder.steps() == [4]


def test_steps_are_ordered_as_numbers(folder):
    for step in (999_999, 1_000_000):
        folder.save_checkpoint(TrainState(step), write(), "all")
    assert folder.steps() == [999_999, 1_000_000]
    assert folder.last_state().step == 1_000_000


def test_the_state_comes_back_whole(folder):
    state = TrainState(3, 100, 50, 1.25, 2, 0.5, "digest")
    folder.save_checkpoint(state, write(), "all")
    assert folder.last_state() == state
    folder.save_checkpoint(first := TrainState(4), write(), "all")
    assert folder.last_state() == first, "a loss that is still infinite"


def test_a_checkpoint_under_way_is_not_seen(folder):
    seen = []
    folder.save_checkpoint(TrainState(1), write(), "last")

    def look(path: Path) -> None:
        write()(path)
        seen.append((folder.steps(), folder.last_state().step))

    folder.save_checkpoint(TrainState(2), look, "last")
    assert seen == [([1], 1)] and folder.steps() == [2]


def test_what_a_kill_left_is_tidied(folder):
    for step in (1, 2, 3):
        folder.save_checkpoint(TrainState(step, best_step=1), write(), "all")
    (folder.checkpoints / ".step-000004.tmp").mkdir()
    folder.tidy(folder.last_state(), "last_and_best")
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == [
        "step-000001",
        "step-000003",
    ]
    (folder.checkpoints / ".step-000004.tmp").mkdir()
    folder.tidy(TrainState(), "last")
    assert folder.steps() == [1, 3], "before the first step nothing is pruned"


BAD_STATES = [
    "",
    "{",
    "[]",
    "null",
    '{"step": 1, "unknown": 2}',
    '{"step": 2}',
    '{"step": "1"}',
    '{"step": true}',
    '{"step": 1, "best_loss": 1e999}',
    '{"step": ' + "9" * 5000 + "}",
    "[" * 10_000,
    '{"step": 1, "flops": 5}',
]


@pytest.mark.parametrize("text", BAD_STATES, ids=range(len(BAD_STATES)))
def test_a_state_that_cannot_be_read_is_a_plain_error_and_removes_nothing(folder, text):
    folder.save_checkpoint(TrainState(1), write(), "last")
    (folder.checkpoint(1) / "state.json").write_text(text)
    (folder.checkpoint(1) / "SHA256SUMS").unlink()  # as older versions had it
    for name in ("weights.safetensors", "optimizer.safetensors"):
        save_file({"a": np.zeros(3)}, folder.checkpoint(1) / name)
    before = snapshot(folder.path)
    with pytest.raises(RunError, match=r"step-000001/state\.json.* --fresh") as told:
        RunFolder(folder.path).last_state()
    assert len(str(told.value).splitlines()) == 1 and snapshot(folder.path) == before


def test_every_digit_of_a_state_is_guarded(folder):
    """Among them best_step, by which checkpoints are removed."""
    state = TrainState(21, 1234, 567, 8.25, 14, 0.5, "12ab", "34cd", {"student": 56.0})
    folder.save_checkpoint(state, write(), "last")
    file = folder.checkpoint(21) / "state.json"
    text = file.read_text()
    for place, digit in enumerate(text):
        if digit.isdigit():
            file.write_text(text[:place] + str((int(digit) + 1) % 10) + text[place + 1 :])
            with pytest.raises(RunError, match="no checkpoint before it is whole"):
                RunFolder(folder.path).last_state()
    file.write_text(text)
    assert RunFolder(folder.path).last_state() == state


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "no state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(folder, damage):
    said = []
    for step in (2, 4):
        folder.save_checkpoint(TrainState(step, best_step=2), write(f"weights of {step}"), "all")
    weights = folder.checkpoint(4) / "weights.safetensors"
    if damage == "flip":
        weights.write_text("weights of 5")
    elif damage == "cut":
        weights.write_text("weights")
    else:
        (weights if damage == "missing" else weights.with_name("state.json")).unlink()
    again = RunFolder(folder.path)
    assert again.last_state(say=said.append).step == 2
    (line,) = said
    assert (
        str(folder.checkpoint(4)) in line
        and "going on from step 2" in line
        and "step 4 is intact" not in line
    )
    again.tidy(again.last_state(), "last")
    assert again.what_is_saved() == "the checkpoint of step 2 is intact" and weights.parent.exists()
    again.save_checkpoint(TrainState(4), write("weights of 4"), "last")
    assert RunFolder(folder.path).last_state().step == 4 and folder.steps() == [4]


def test_the_best_checkpoint_has_to_be_whole_where_it_will_be_exported(folder):
    for step in (2, 4, 6):
        folder.save_checkpoint(TrainState(step, best_step=min(step, 4)), write(), "all")
    (folder.checkpoint(4) / "weights.safetensors").write_text("damaged")
    assert RunFolder(folder.path).last_state().step == 6
    assert RunFolder(folder.path).last_state(needs_best=True).step == 2


def test_a_checkpoint_of_an_older_version_has_no_digests_and_is_read(folder):
    save_file({"a": np.zeros(3)}, folder.path / "whole")
    whole = (folder.path / "whole").read_bytes()
    path = folder.checkpoint(2)
    path.mkdir()
    (path / "state.json").write_text('{"step": 2, "best_loss": Infinity, "recipe_digest": "ab"}')
    for length, reads in ((len(whole), True), (len(whole) - 1, False), (5, False), (0, False)):
        for name in ("weights.safetensors", "optimizer.safetensors"):
            (path / name).write_bytes(whole)
        (path / "optimizer.safetensors").write_bytes(whole[:length])
        if reads:
            assert RunFolder(folder.path).last_state() == TrainState(
                2, recipe_digest="ab", flops=None
            )
        else:
            with pytest.raises(RunError, match=r"optimizer\.safetensors is damaged"):
                RunFolder(folder.path).last_state()


# what no run made


def add(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    return path


FOREIGN = [
    "thesis.txt",
    "src/a.py",
    "checkpoints/epoch-1.pt",
    "checkpoints/step-000002/notes.txt",
    "checkpoints/step-9/a",
    ".step-000004.tmp",
    "part-000000/index.json",
    "manifest.json.bak",
    "student.txt",
]


def test_pruning_and_tidying_leave_what_is_not_ours(folder):
    for step in (2, 4):
        folder.save_checkpoint(TrainState(step), write(), "all")
    mine = [add(folder.path / name) for name in FOREIGN]
    folder.tidy(folder.last_state(), "last")
    folder.save_checkpoint(TrainState(6), write(), "last")
    assert all(path.read_text() == "mine" for path in mine) and folder.steps() == [6]
    assert list(folder.checkpoint(2).iterdir()) == [folder.checkpoint(2) / "notes.txt"]


def test_fresh_removes_our_files_alone_and_says_what_stays(tmp_path):
    run, said = RunFolder.open(make_recipe(tmp_path)), []
    run.save_checkpoint(TrainState(2), write(), "last")
    run.write(Manifest(exported_step=2))
    run.write_student(lambda path: (path / "config.json").write_text("{}"))
    for kind in LOGS:
        run.append(kind(step=1))
    for name in (
        "report.md",
        "report.html",
        "generations.jsonl",
        ".eval.json.tmp",
        "student/.DS_Store",
    ):
        add(run.path / name)
    mine = [add(run.path / name) for name in FOREIGN if "step-000002" not in name]
    again = RunFolder.open(make_recipe(tmp_path, run={"seed": 1}), fresh=True, say=said.append)
    found = {path for path in run.path.rglob("*") if path.is_file()} - set(mine)
    assert (
        found == {run.path / "recipe.toml", run.path / "run.lock"}
        and again.last_state() == TrainState()
    )
    assert all(path.read_text() == "mine" for path in mine)
    assert (
        len(said) == 1
        and "keeps .step-000004.tmp, manifest.json.bak" in said[0]
        and "which no run made" in said[0]
    )


def test_what_a_mac_leaves_in_a_run_harms_nothing(tmp_path):
    """Beside each file in one of its own, where the disk is FAT or a network's."""
    run, said = RunFolder.open(make_recipe(tmp_path)), []

    def written(path: Path) -> None:
        write()(path)
        left_by_a_mac(path)

    run.save_checkpoint(TrainState(2), written, "last")
    sums = (run.checkpoint(2) / "SHA256SUMS").read_text()
    assert len(sums.splitlines()) == 3 and "._" not in sums
    run.write(Manifest(exported_step=2))
    run.write_student(lambda path: (path / "config.json").write_text("{}"))
    for folder in (run.path, run.checkpoints, run.checkpoint(2), run.student):
        left_by_a_mac(folder)
    again = RunFolder.open(make_recipe(tmp_path))
    assert again.last_state() == TrainState(2) and again.has_student()
    again.save_checkpoint(TrainState(2), write(), "last")
    changed = make_recipe(tmp_path, run={"seed": 1})
    assert RunFolder.open(changed, fresh=True, say=said.append).last_state() == TrainState()
    assert said == []


def test_the_companion_of_a_persons_file_stays_with_it(tmp_path):
    run = RunFolder.open(make_recipe(tmp_path))
    mine = [add(run.path / name) for name in ("thesis.txt", "._thesis.txt")]
    RunFolder.open(make_recipe(tmp_path, run={"seed": 1}), fresh=True)
    assert all(path.read_text() == "mine" for path in mine)


@pytest.mark.parametrize(
    "name", ["checkpoints/step-000002/notes.txt", "student/thesis.txt", "student/sub/config.json"]
)
def test_fresh_is_refused_where_a_new_run_would_need_the_place(tmp_path, name):
    run = RunFolder.open(make_recipe(tmp_path))
    run.save_checkpoint(TrainState(2), write(), "last")
    run.write_student(lambda path: (path / "config.json").write_text("{}"))
    add(run.path / name)
    before = snapshot(run.path)
    with pytest.raises(RunError, match=rf"cannot start over: no run made {name}: move that away"):
        RunFolder.open(make_recipe(tmp_path), fresh=True)
    assert snapshot(run.path) == before


@pytest.mark.parametrize("fresh", [False, True])
def test_a_place_that_the_student_needs_is_asked_for_before_training(tmp_path, fresh):
    run = RunFolder.open(make_recipe(tmp_path))
    run.append(ValidationRow(step=0))
    add(tmp_path / "elsewhere" / "thesis.txt")
    run.student.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"student.* move that away"):
        RunFolder.open(make_recipe(tmp_path), fresh)
    assert run.student.is_symlink() and (tmp_path / "elsewhere" / "thesis.txt").exists()
    run.student.unlink()
    add(run.student / "thesis.txt")
    with pytest.raises(RunError, match=r"student/thesis\.txt.* move that away"):
        RunFolder.open(make_recipe(tmp_path), fresh)


def test_a_model_in_the_students_place_is_not_taken_for_it(tmp_path):
    run = RunFolder.open(make_recipe(tmp_path))
    run.append(ValidationRow(step=0))
    add(run.student / "config.json")
    with pytest.raises(RunError, match=r"student holds a model that no run wrote: move it away"):
        RunFolder.open(make_recipe(tmp_path)).has_student()


def test_a_step_folder_of_somebody_else_is_asked_for_before_training(folder):
    add(folder.path / "checkpoints/step-000004/pytorch_model.bin")
    folder.save_checkpoint(TrainState(2), write(), "last")
    assert folder.steps() == [2], "no file of ours is in it"
    with pytest.raises(
        RunError,
        match=r"needs the place of checkpoints/step-000004/pytorch_model\.bin, which no run made",
    ):
        folder.tidy(folder.last_state(), "last")


def test_the_last_file_of_a_fresh_start_is_removed_on_the_next_start(tmp_path, monkeypatch):
    """Killed after each removal in turn: the next start, with --fresh or without, finds no half of
    the old run.
    """
    for fresh in (False, True):
        for removals in range(20):
            run = RunFolder.open(make_recipe(tmp_path, run={"name": f"{fresh}{removals}"}))
            recipe = make_recipe(tmp_path, run={"name": f"{fresh}{removals}", "seed": 1})
            run.save_checkpoint(TrainState(2), write(), "last")
            run.write(Manifest(exported_step=2, finished=True))
            run.write_student(lambda path: (path / "config.json").write_text("{}"))
            run.append(MetricsRow(step=2))
            unlink, calls = os.unlink, iter(range(100))

            def stopping(*args, unlink=unlink, calls=calls, removals=removals, **kwargs):
                if next(calls) == removals:
                    raise KeyboardInterrupt
                unlink(*args, **kwargs)

            monkeypatch.setattr(os, "unlink", stopping)
            done = False
            try:
                RunFolder.open(recipe, fresh=True)
                done = True
            except KeyboardInterrupt:
                monkeypatch.undo()
                assert not RunFolder(run.path).has_results()
                assert removals == 0 or run.read(Manifest) == Manifest()
                again = RunFolder.open(recipe, fresh=fresh)
                assert again.recipe() == recipe
            monkeypatch.undo()
            left = {path.name for path in run.path.rglob("*") if path.is_file()}
            assert left == {"recipe.toml", "run.lock"} and not run.student.exists()
            if done:
                assert removals > 5
                break


def test_fresh_works_through_a_link(tmp_path):
    target = tmp_path / "big disk" / "x"
    target.mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one").symlink_to(target)
    recipe = make_recipe(tmp_path / "runs")
    run = RunFolder.open(recipe)
    run.save_checkpoint(TrainState(2), write(), "last")
    again = RunFolder.open(recipe, fresh=True)
    assert again.path.is_symlink() and again.last_state() == TrainState()
    assert {path.name for path in target.iterdir()} == {"checkpoints", "recipe.toml", "run.lock"}
    target.rename(tmp_path / "gone")
    with pytest.raises(
        RunError,
        match=r"one is a link to .*, which is not there: make that folder or remove the link",
    ):
        RunFolder.open(recipe)


def test_checkpoints_may_lie_on_another_disk(tmp_path):
    run = RunFolder.open(make_recipe(tmp_path))
    run.checkpoints.rmdir()
    (tmp_path / "disk").mkdir()
    run.checkpoints.symlink_to(tmp_path / "disk")
    again = RunFolder.open(make_recipe(tmp_path))
    for step in (2, 4):
        again.save_checkpoint(TrainState(step), write(), "last")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["step-000004"]
    RunFolder.open(make_recipe(tmp_path), fresh=True)
    assert run.checkpoints.is_symlink() and not list((tmp_path / "disk").iterdir())


def test_what_an_older_version_left_beside_goes(tmp_path):
    run = RunFolder.open(make_recipe(tmp_path))
    run.save_checkpoint(TrainState(2), write(), "last")
    run.path.rename(tmp_path / ".one.removed")
    RunFolder.open(make_recipe(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("owner", ["another recipe's", "this one's"])
def test_a_run_that_left_nothing_but_a_recipe_keeps_what_is_not_its_own(tmp_path, owner):
    run = RunFolder.open(make_recipe(tmp_path))
    mine = [add(run.path / name) for name in FOREIGN]
    seed = 1 if owner.startswith("another") else 42
    again = RunFolder.open(make_recipe(tmp_path, run={"seed": seed}))
    assert again.recipe().run.seed == seed and all(path.read_text() == "mine" for path in mine)


def test_a_recipe_that_a_person_wrote_makes_no_run_folder(tmp_path):
    path = add(tmp_path / "one" / "recipe.toml")
    path.write_text(make_recipe(tmp_path).toml() + "# mine\n")
    (tmp_path / "one" / "checkpoints").mkdir()
    add(tmp_path / "one" / "thesis.txt")
    before = snapshot(tmp_path)
    for fresh in (False, True):
        with pytest.raises(RunError, match="holds no run"):
            RunFolder.open(make_recipe(tmp_path), fresh)
    assert snapshot(tmp_path) == before


def test_a_folder_of_somebody_else_that_has_a_lock_and_a_report_is_not_ours(tmp_path):
    (tmp_path / "one" / "checkpoints").mkdir(parents=True)
    (tmp_path / "one" / "run.lock").touch()
    mine = add(tmp_path / "one" / "report.md")
    for fresh in (False, True):
        with pytest.raises(RunError, match="holds no run"):
            RunFolder.open(make_recipe(tmp_path), fresh)
    assert mine.read_text() == "mine"
    RunFolder(tmp_path / "one").write(Manifest(recipe_digest="of a run that lost its recipe"))
    RunFolder.open(make_recipe(tmp_path), fresh=True)
    assert not mine.exists()


@pytest.mark.parametrize(
    "name", ["run.lock", "metrics.jsonl", "recipe.toml", "manifest.json", "state"]
)
def test_a_folder_in_the_place_of_a_file_is_one_line(tmp_path, name):
    run = RunFolder.open(make_recipe(tmp_path))
    run.append(MetricsRow(step=2))
    run.save_checkpoint(TrainState(2), write(), "last")
    path = run.path / name if name != "state" else run.checkpoint(2) / "state.json"
    path.unlink(missing_ok=True)
    path.mkdir()
    with pytest.raises(RunError) as told:
        again = RunFolder.open(make_recipe(tmp_path))
        again.read(Manifest)
        again.last_state()
        again.cut_logs(2)
    assert len(str(told.value).splitlines()) == 1 and path.name in str(told.value)


def test_a_recipe_that_cannot_be_read_is_written_again_where_the_run_is_of_this_one(tmp_path):
    recipe, said = make_recipe(tmp_path), []
    run = RunFolder.open(recipe)
    run.save_checkpoint(TrainState(2, recipe_digest=recipe.digest()), write(), "last")
    (run.path / "recipe.toml").write_bytes(b"[run\xff")
    other = make_recipe(tmp_path, run={"seed": 1})
    with pytest.raises(RunError, match=r"recipe\.toml is damaged"):
        RunFolder.open(other)
    assert (
        RunFolder.open(recipe, say=said.append).recipe() == recipe
        and "recipe.toml cannot be read" in said[0]
    )
    (run.path / "recipe.toml").unlink()
    with pytest.raises(RunError, match=r"recipe\.toml is missing"):
        RunFolder.open(other)
    assert RunFolder.open(recipe).recipe() == recipe


def test_two_that_start_over_at_once_do_not_mix(tmp_path):
    recipe = make_recipe(tmp_path)
    with RunFolder.held(recipe, fresh=True) as run:
        run.append(MetricsRow(step=1))
        for fresh in (False, True):
            with pytest.raises(RunError, match="in use by another"):
                RunFolder.open(make_recipe(tmp_path, run={"seed": 1}), fresh)
        assert run.recipe() == recipe and run.rows(MetricsRow)


# a disk that is full

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("[write] Unable to write 30551 bytes to file."),
]


@pytest.mark.parametrize("error", FULL, ids=["OSError", "what mx.save_safetensors raises"])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(folder, error, earlier):
    if earlier:
        folder.save_checkpoint(TrainState(2), write("good"), "last")
    before = snapshot(folder.path)

    def fail(path: Path) -> None:
        (path / "weights.safetensors").write_text("half")
        raise error

    with pytest.raises(RunError) as raised:
        folder.save_checkpoint(TrainState(4), fail, "last")
    text = str(raised.value)
    assert (
        "step-000004: the checkpoint could not be written" in text
        and str(error) in text
        and "free some disk" in text
    )
    assert (
        "the checkpoint of step 2 is intact" if earlier else "there is no earlier checkpoint"
    ) in text
    assert snapshot(folder.path) == before


@pytest.mark.parametrize("error", FULL, ids=["OSError", "what mx.save_safetensors raises"])
def test_a_student_that_cannot_be_written_leaves_nothing(folder, error):
    def fail(path: Path) -> None:
        (path / "config.json").write_text("{")
        raise error

    before = snapshot(folder.path)
    with pytest.raises(
        RunError, match=r"the student could not be written.*the checkpoints are intact"
    ):
        folder.write_student(fail)
    assert snapshot(folder.path) == before


@pytest.mark.parametrize(
    "error",
    [RankLost("another rank is gone"), OutOfMemory("the GPU's memory")],
    ids=["rank", "memory"],
)
def test_what_fails_beside_the_disk_is_not_blamed_on_it(folder, error):
    def fail(path: Path) -> None:
        (path / "config.json").write_text("{")
        raise error

    before = snapshot(folder.path)
    for written in (
        lambda: folder.save_checkpoint(TrainState(4), fail, "last"),
        lambda: folder.write_student(fail),
    ):
        with pytest.raises(type(error), match=f"^{error}$"):
            written()
        assert snapshot(folder.path) == before


def test_small_files_and_logs_on_a_full_disk_are_plain_errors(folder, monkeypatch):
    folder.write(Manifest(name="old"))
    before = snapshot(folder.path)

    def full(*_):
        raise FULL[0]

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        RunError, match=r"manifest\.json: cannot be written \(No space left on device\)"
    ):
        folder.write(Manifest(name="new"))
    assert snapshot(folder.path) == before
    shutil.rmtree(folder.path)
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written"):
        folder.append(MetricsRow(step=1))


def test_a_real_write_that_fails_exits_with_2_and_the_run_goes_on_from_the_checkpoint(
    run_tiny, never_stopped, tmp_path
):
    """With a limit on the size of files: MLX's writer fails in the middle of a checkpoint, then in
    the middle of the export.
    """
    folder = RunFolder(tmp_path / "tiny")
    assert run_tiny(at=f"{STUDENT}.apply", call=2, signals=["INT"]).code == 130
    good = snapshot(folder.checkpoint(2))
    limit = min(map(len, filter(None, good.values()))) + 20_000
    result = run_tiny(file_limit=limit)
    assert result.code == 2
    assert result.err.startswith(
        f"error: {folder.checkpoint(3)}: the checkpoint could not be written ([write] Unable to "
        "write"
    )
    assert (
        len(result.err.strip().splitlines()) == 1
        and "the checkpoint of step 2 is intact" in result.err
    )
    assert snapshot(folder.checkpoint(2)) == good
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-000002"]
    assert run_tiny(at=f"{STUDENT}.export").code == -9
    result = run_tiny(file_limit=limit)
    assert (
        result.code == 2
        and "the student could not be written ([write] Unable to write" in result.err
    )
    assert not folder.student.exists() and not (folder.path / ".student.tmp").exists()
    assert run_tiny().code == 0
    assert_same(folder.path, never_stopped("full"))


def test_free_disk_is_checked_before_the_first_step(tiny_recipe, tmp_path, monkeypatch):
    usage, asked = namedtuple("usage", "total used free"), []
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: asked.append(path) or usage(10**12, 10**12, 10**4)
    )
    recipe = load_recipe(tiny_recipe, (f"run.folder={tmp_path}",))
    with pytest.raises(
        RunError,
        match=r"tiny: checkpoints and student need [\d.]+ MB more, 10 kB are free: .*run\.folder",
    ):
        pipeline.run(recipe, View(Console(file=io.StringIO())))
    assert asked == [tmp_path / "tiny"]
    assert not RunFolder(tmp_path / "tiny").rows(ValidationRow)
    needed = []
    for change in (
        {"keep_checkpoints": "last", "export": "last"},
        {},
        {"keep_checkpoints": "all", "validate_every": 1},
    ):
        table = recipe.run.model_copy(update=change)
        student = type(
            "Student", (), {"state_bytes": lambda self: 1000, "export_bytes": lambda self: 10}
        )()
        for free in range(0, 10**5, 10):
            monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(0, 0, free))
            try:
                refuse_full_disk(RunFolder(tmp_path / "tiny"), table, student, 6)
            except RunError:
                continue
            needed.append(free)
            break
    assert needed == [2010, 3010, 6010]  # one written beside what stays; all: at most one a step


# opening


def test_an_equal_recipe_is_continued_and_a_changed_one_refused_with_the_difference(tmp_path):
    run = RunFolder.open(make_recipe(tmp_path))
    (run.path / "kept").touch()
    run.append(ValidationRow(step=0))
    assert RunFolder.open(make_recipe(tmp_path)).path == run.path
    changed = make_recipe(
        tmp_path, optim={"learning_rate": 0.5}, objective={"segments": ["cot", "answer"]}
    )
    before = snapshot(run.path)
    with pytest.raises(RunError) as error:
        RunFolder.open(changed)
    assert (
        "(objective.segments: ['cot'] → ['cot', 'answer']; optim.learning_rate: 2e-05 → 0.5)"
        in str(error.value)
    )
    assert "--set run.name=NAME" in str(error.value) and "--fresh" in str(error.value)
    assert snapshot(run.path) == before
    assert RunFolder.open(changed, fresh=True).recipe() == changed
    assert (run.path / "kept").exists(), "no run made it"


def test_a_run_from_before_a_field_was_there_goes_on_as_it_began_or_is_refused(tmp_path):
    """It decayed norms and biases too, and its recipe.toml does not say so."""
    as_then = make_recipe(tmp_path, optim={"weight_decay": 0.1, "decayed": "all"})
    run = RunFolder.open(as_then)
    run.append(ValidationRow(step=0))
    kept = (run.path / "recipe.toml").read_text()
    (run.path / "recipe.toml").write_text(kept.replace('decayed = "all"\n', ""))
    assert run.recipe() == as_then
    with pytest.raises(RunError, match=r"\(optim.decayed: 'all' → 'matrices'\).* --fresh") as error:
        RunFolder.open(make_recipe(tmp_path, optim={"weight_decay": 0.1}))
    assert "\n" not in str(error.value)
    assert RunFolder.open(as_then).recipe() == as_then
    assert (run.path / "recipe.toml").read_text() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["one"], (
        "nothing of the old run is left beside"
    )


def test_a_moved_run_is_continued_and_what_it_is_compared_with_may_change(tmp_path):
    run = RunFolder.open(make_recipe(tmp_path / "here"))
    run.write(TaskScores(task="kept"))
    run.append(ValidationRow(step=0))
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = make_recipe(tmp_path / "there", eval={"compare": ["other"]})
    again = RunFolder.open(moved)
    assert again.recipe() == moved and again.read(TaskScores).task == "kept"


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        ["notes.txt"],
        ["recipe.toml", "thesis.tex"],
        ["checkpoints/mine.txt", "notes.txt"],
        ["checkpoints/mine.txt"],
        ["checkpoints"],
        [".hidden"],
    ],
)
def test_a_folder_that_holds_no_run_is_refused_and_untouched(tmp_path, fresh, content):
    recipe = make_recipe(tmp_path)
    for name in content:
        file = tmp_path / "one" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(
        RunError,
        match=r"one is not empty and holds no run: choose another --set run.name=NAME or move it away",
    ):
        RunFolder.open(recipe, fresh)
    assert snapshot(tmp_path) == before


def test_a_run_killed_while_its_folder_was_made_is_opened(tmp_path):
    (tmp_path / "one" / "checkpoints").mkdir(parents=True)
    recipe = make_recipe(tmp_path)
    assert RunFolder.open(recipe).recipe() == recipe
    (tmp_path / "one" / "recipe.toml").rename(tmp_path / "one" / ".recipe.toml.tmp")
    assert RunFolder.open(recipe).recipe() == recipe


def test_a_folder_that_cannot_be_made_is_a_plain_error(tmp_path):
    (tmp_path / "one").write_text("a file")
    with pytest.raises(
        RunError, match=r"one is a file: move it away, or choose another --set run\.name=NAME"
    ):
        RunFolder.open(make_recipe(tmp_path))


def test_a_run_that_failed_before_its_first_step_does_not_keep_its_name(tmp_path):
    run = RunFolder.open(make_recipe(tmp_path))
    run.write(Manifest(data_digest="of a file with a typo"))
    changed = make_recipe(tmp_path, optim={"learning_rate": 0.5})
    again = RunFolder.open(changed)
    assert again.recipe() == changed and again.read(Manifest) == Manifest()


def test_a_recipe_of_another_version_is_a_plain_error(folder, tmp_path):
    folder.append(ValidationRow(step=0))
    (folder.path / "recipe.toml").write_text("[run]\nunheard_of = 1\n")
    with pytest.raises(
        RunError, match=r"another version of mlx-distill .*unheard_of.*; use --fresh"
    ):
        RunFolder.open(make_recipe(tmp_path))


@pytest.mark.parametrize("what", ["data", "student", "teacher"])
def test_changed_data_or_models_are_refused_on_resume(tiny_recipe, command_line, tmp_path, what):
    world = shutil.copytree(tiny_recipe.parent, tmp_path / "world")
    recipe = world / "tiny.toml"
    recipe.write_text(recipe.read_text().replace(str(tiny_recipe.parent), str(world)))
    words = arguments(recipe, tmp_path)
    assert command_line(*words, at=f"{STUDENT}.apply", call=4).code == -9
    before = snapshot(tmp_path / "tiny")
    if what == "data":
        rows = (world / "rows.jsonl").read_text().replace("1+0=1.", "1+0=2.")
        (world / "rows.jsonl").write_text(rows)
    else:
        config = json.loads((world / what / "config.json").read_text())
        (world / what / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    result = command_line(*words)
    assert result.code == 2
    changed = "the data" if what == "data" else "a model's files"
    assert (
        result.err.startswith(
            f"error: {tmp_path / 'tiny'}: {changed} changed since this run began; "
        )
        and "--fresh" in result.err
    )
    assert snapshot(tmp_path / "tiny") == before
    assert (
        command_line(*words, "--fresh", "--set", "optim.steps=1", "--set", "eval.task=").code == 0
    )


# logs


def test_an_unreadable_line_costs_itself_and_is_told(folder):
    lines, said = [json.dumps({"step": step}).encode() for step in range(1, 7)], []
    lines[1:4] = [b'{"step": 2, "lo', b'{"step": 3, "a": "\xff"}', b"[4]"]
    (folder.path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n\xff")
    folder.cut_logs(5, said.append)
    assert [row.step for row in folder.rows(MetricsRow)] == [1, 5]
    assert "metrics.jsonl: line 2, 3, 4 cannot be read and is left out" in said[0]
    (folder.path / "metrics.jsonl").unlink()
    folder.cut_logs(5, said.append)
    assert (
        "metrics.jsonl lacks 5 of 5 rows" in said[-2]
        and "validation.jsonl lacks 1 of 1 rows" in said[-1]
    )


def test_logs_are_cut_to_a_step_and_survive_a_torn_line(folder):
    for step in (0, 1, 2, 3):
        folder.append(MetricsRow(step=step))
    (folder.path / "validation.jsonl").write_text('{"step": 0}\n{"step": 2}\n{"ste')
    assert [row.step for row in folder.rows(ValidationRow)] == [0, 2]
    folder.cut_logs(1)
    assert [row.step for row in folder.rows(MetricsRow)] == [0, 1]
    assert (folder.path / "validation.jsonl").read_text() == '{"step": 0}\n'
    folder.cut_logs(-1)
    assert folder.rows(MetricsRow) == [] == folder.rows(ValidationRow)


# runs and scores of versions that read config.json as mlx-lm alone does


@pytest.fixture
def world(tiny_recipe, tmp_path) -> Path:
    """A recipe of its own, whose teacher says its rotary base where mlx-lm's Llama does not look."""
    world = shutil.copytree(tiny_recipe.parent, tmp_path / "world")
    recipe = world / "tiny.toml"
    recipe.write_text(recipe.read_text().replace(str(tiny_recipe.parent), str(world)))
    config = json.loads((world / "teacher" / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    (world / "teacher" / "config.json").write_text(json.dumps(config))
    return recipe


@pytest.mark.parametrize(
    "kill",
    [
        dict(at=f"{STUDENT}.apply", call=4),
        dict(at="mlx_distill.view:Counter.__call__", call=6),
    ],
    ids=["training", "scoring"],
)
def test_a_run_of_a_version_that_computed_the_teacher_otherwise_is_refused(
    world, command_line, tmp_path, kill
):
    words = arguments(world, tmp_path)
    assert command_line(*words, **kill).code == -9
    manifest = tmp_path / "tiny" / "manifest.json"
    whole = json.loads(manifest.read_text())
    assert (
        whole["models"]["teacher"]["arithmetic"] == "1"
        and "arithmetic" not in whole["models"]["student"]
    )
    older = json.loads(manifest.read_text())
    del older["models"]["teacher"]["arithmetic"], older["sha256"]
    manifest.write_text(json.dumps(older))
    result = command_line(*words)
    assert result.code == 2 and result.err.count("\n") == 1
    assert result.err.startswith(
        f"error: {tmp_path / 'tiny'}: this run was begun by a version that read the teacher's "
        "config.json"
    )
    assert "start over with --fresh" in result.err
    manifest.write_text(json.dumps(whole))
    assert command_line(*words).code == 0


def test_a_cache_and_kept_texts_say_whose_arithmetic_they_are_of(world, tmp_path):
    recipe = load_recipe(world, ("teacher.cache=top_k", f"teacher.cache_folder={tmp_path}/answers"))
    pair = Pair.of(recipe)
    assert cache_of(pair, "").fields.arithmetic == "1"
    assert identity(pair.teacher)["arithmetic"] == "1"
    assert set(identity(pair.student)) == {"fingerprint"}
    table = recipe.teacher.model_copy(update={"model": recipe.student.model})
    plain = Pair.of(recipe.model_copy(update={"teacher": table}))
    assert cache_of(plain, "").fields.arithmetic == ""


def test_texts_end_where_configs_tokenizer_or_template_say(world):
    recipe = load_recipe(world, ())
    pair = Pair.of(recipe)
    folder, common = pair.teacher, set(stop_ids(pair.tokenizer))
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [7, 10**6]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert stops(pair, "teacher", folder) == common | {7, 9}
    assert not {7, 9} & stops(pair, "base", pair.student)
    assert stops_of(folder, load_tokenizer(pair.student)) == common | {7, 9}
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": None}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert stops(pair, "teacher", folder) == common | {7, 9}


# what was changed by hand


SCORE = Score(
    accuracy=0.5,
    low=0.1,
    high=0.9,
    problems=2,
    samples=1,
    correct={"é": [1.0], "b": [0.0]},
    unfinished=0.0,
    well_formed=1.0,
    mean_tokens=3.5,
    seconds=1e-3,
)
SEALED = [
    Manifest(name="é", steps=6, finished=True, flops={"total": 1e18}, starts=[Start(at_step=1)]),
    TaskScores(task="é", compared={"text": 6}, scores={"base": SCORE, "student": SCORE}),
]


@pytest.mark.parametrize("record", SEALED, ids=lambda record: record.FILE)
@pytest.mark.parametrize(
    "change",
    [{"task": "x"}, {"steps": 7}, {"finished": False}, {"new": 1}, {"sha256": ""}, {"sha256": 1}],
)
def test_a_changed_digit_is_damage_and_a_file_of_an_older_version_is_believed(
    folder, record, change
):
    folder.write(record)
    assert folder.read(type(record)) == record
    file = folder.path / record.FILE
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | change))
    with pytest.raises(RunError, match=rf"{file.name} is damaged: it is not as the run wrote it"):
        folder.read(type(record))
    del kept["sha256"]
    file.write_text(json.dumps(kept | {"finished": False, "task": "other"}))
    assert folder.read(type(record)) != record


def test_what_a_newer_version_says_is_kept_and_what_an_older_one_lacks_has_a_default(folder):
    file = folder.path / "manifest.json"
    file.write_text('{"steps": 6, "seen": {"a": [1, null]}, "models": {"student": {"size": 3}}}')
    folder.update(Manifest, finished=True)
    kept = json.loads(file.read_text())
    del kept["sha256"]
    assert kept == {
        "steps": 6,
        "seen": {"a": [1, None]},
        "models": {"student": {"size": 3}},
        "finished": True,
    }
    read = folder.read(Manifest)
    assert read.prompt_date is None and read.data is None and read.models["student"].name == ""


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ('{"steps": "6"}', "its steps is '6'"),
        ('{"steps": true}', "its steps is True"),
        ('{"steps": -1}', "its steps is -1"),
        ('{"elapsed_seconds": 1e300}', "its elapsed_seconds is 1e[+]300"),
        ('{"models": {"student": [1]}}', r"its models.student is \[1\]"),
        ('{"flops": {"head": "x"}}', "its flops.head is 'x'"),
        ('{"starts": [{"at_step": null}]}', "its starts.0.at_step is None"),
        ('{"data": {"segments": {"cot": {"before": 1}}}}', "it has no data.segments.cot.after"),
        ("[]", r"it holds \[\]"),
    ],
)
def test_a_manifest_that_no_run_wrote_is_one_line(folder, content, wrong):
    (folder.path / "manifest.json").write_text(content)
    with pytest.raises(RunError, match=rf"^{folder.path}/manifest.json is damaged: {wrong}$"):
        folder.read(Manifest)


def test_a_broken_score_costs_itself_and_no_other(folder):
    folder.write(TaskScores(task="dial", scores={"base": SCORE, "student": SCORE}))
    content = json.loads((folder.path / "eval.json").read_text())
    del content["sha256"]
    for change in ({"accuracy": "1"}, {"correct": {}}, {"correct": {"a": []}}, {"low": None}):
        broken = content["scores"]["student"] | change
        scores = {"scores": content["scores"] | {"student": broken}}
        (folder.path / "eval.json").write_text(json.dumps(content | scores))
        read = folder.read(TaskScores)
        assert read.whole == {"base": SCORE} and read.broken == ["student"], change


def test_a_row_says_all_of_its_numbers_and_none_that_nothing_can_have(folder):
    folder.append(MetricsRow(step=1, loss=0.5, kd_cot=0.25, flops={"head": 2.0}, odd=math.nan))
    folder.append(MetricsRow(step=2, loss=math.inf))
    first, second = folder.rows(MetricsRow)
    assert first.numbers == {"step": 1, "loss": 0.5, "kd_cot": 0.25}
    assert second.loss is None and first.flops == {"head": 2.0}


@pytest.mark.parametrize("name", ["eval.json", "generations.jsonl"])
def test_scores_are_results_that_another_recipe_does_not_replace(tmp_path, name):
    mine = add(RunFolder.open(make_recipe(tmp_path)).path / name)
    with pytest.raises(RunError, match="holds a run of another recipe"):
        RunFolder.open(make_recipe(tmp_path, optim={"learning_rate": 0.5}))
    RunFolder.open(make_recipe(tmp_path))
    assert mine.read_text() == "mine"


def test_a_student_that_is_written_again_is_scored_again(folder):
    folder.write(TaskScores(task="dial", scores={"teacher": SCORE, "student": SCORE}))
    forget_score(folder, "student")
    assert folder.read(TaskScores) == TaskScores(task="dial", scores={"teacher": SCORE})


def test_a_new_disk_holds_no_more_than_its_own_folder(tmp_path):
    (tmp_path / "one" / "lost+found").mkdir(parents=True)
    assert RunFolder.open(make_recipe(tmp_path), fresh=True).path == tmp_path / "one"
    assert (tmp_path / "one" / "lost+found").is_dir()


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OutOfMemory("step-000002 does not fit"), OutOfMemory, "does not fit"),
        (
            RuntimeError("[load_safetensors] Invalid json header length"),
            RunError,
            "cannot be loaded",
        ),
    ],
)
def test_a_restore_that_fails_says_whether_memory_was_missing(folder, error, kind, words):
    class Student:
        def restore_state(self, path, optimizer):
            raise error

    with pytest.raises(kind, match=f"step-000002.*{words}"):
        restore(Student(), folder.checkpoint(2))
