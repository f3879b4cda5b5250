"""The run folder: every file whole or not at all, which checkpoints stay, and when a folder is continued or refused."""

import errno
import io
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from endings import STUDENT, arguments, assert_same
from rich.console import Console

from mlx_distill import pipeline
from mlx_distill.errors import OutOfMemory, RankLost, RunError
from mlx_distill.recipe import Recipe, load_recipe
from mlx_distill.run_dir import RunFolder, TrainState
from mlx_distill.view import View


def make_recipe(folder: Path, **tables) -> Recipe:
    base = {"data": {"source": "rows.jsonl"}, "run": {"name": "one", "folder": str(folder)}}
    return Recipe.model_validate({name: base.get(name, {}) | tables.get(name, {}) for name in base | tables})


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder.open(make_recipe(tmp_path))


def write(text: str = "weights"):
    def write_files(path: Path) -> None:
        (path / "weights.safetensors").write_text(text)
        (path / "optimizer.safetensors").write_text(text)

    return write_files


def snapshot(path: Path) -> dict[str, bytes | None]:
    return {str(file.relative_to(path)): file.read_bytes() if file.is_file() else None for file in sorted(path.rglob("*"))}


# checkpoints


@pytest.mark.parametrize(("keep", "kept"), [
    ("all", [2, 4, 6, 8]), ("last", [8]), ("last_and_best", [4, 8]),
])
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
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-000001", "step-000003"]
    (folder.checkpoints / ".step-000004.tmp").mkdir()
    folder.tidy(TrainState(), "last")
    assert folder.steps() == [1, 3], "before the first step nothing is pruned"


@pytest.mark.parametrize("text", ["", "{", '{"step": 1, "unknown": 2}'])
def test_a_state_that_cannot_be_read_is_a_plain_error(folder, text):
    folder.save_checkpoint(TrainState(1), write(), "last")
    (folder.checkpoint(1) / "state.json").write_text(text)
    with pytest.raises(RunError, match=r"state\.json cannot be read .*--fresh"):
        folder.last_state()


# a disk that is full

FULL = [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[write] Unable to write 30551 bytes to file.")]


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
    assert "step-000004: the checkpoint could not be written" in text and str(error) in text and "free some disk" in text
    assert ("the checkpoint of step 2 is intact" if earlier else "there is no earlier checkpoint") in text
    assert snapshot(folder.path) == before


@pytest.mark.parametrize("error", FULL, ids=["OSError", "what mx.save_safetensors raises"])
def test_a_student_that_cannot_be_written_leaves_nothing(folder, error):
    def fail(path: Path) -> None:
        (path / "config.json").write_text("{")
        raise error

    before = snapshot(folder.path)
    with pytest.raises(RunError, match=r"the student could not be written.*the checkpoints are intact"):
        folder.write_student(fail)
    assert snapshot(folder.path) == before


@pytest.mark.parametrize("error", [RankLost("another rank is gone"), OutOfMemory("the GPU's memory")], ids=["rank", "memory"])
def test_what_fails_beside_the_disk_is_not_blamed_on_it(folder, error):
    def fail(path: Path) -> None:
        (path / "config.json").write_text("{")
        raise error

    before = snapshot(folder.path)
    for written in (lambda: folder.save_checkpoint(TrainState(4), fail, "last"), lambda: folder.write_student(fail)):
        with pytest.raises(type(error), match=f"^{error}$"):
            written()
        assert snapshot(folder.path) == before


def test_small_files_and_logs_on_a_full_disk_are_plain_errors(folder, monkeypatch):
    folder.write_json("eval.json", {"old": 1})
    before = snapshot(folder.path)

    def full(*_):
        raise FULL[0]

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match=r"eval\.json: cannot be written \(No space left on device\)"):
        folder.write_json("eval.json", {"new": 2})
    assert snapshot(folder.path) == before
    shutil.rmtree(folder.path)
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written"):
        folder.append("metrics.jsonl", {"step": 1})


def test_a_real_write_that_fails_exits_with_2_and_the_run_goes_on_from_the_checkpoint(run_tiny, never_stopped, tmp_path):
    """With a limit on the size of files: MLX's writer fails in the middle of a checkpoint, then in the middle of the export."""
    folder = RunFolder(tmp_path / "tiny")
    assert run_tiny(at=f"{STUDENT}.apply", call=2, signals=["INT"]).code == 130
    good = snapshot(folder.checkpoint(2))
    limit = min(map(len, filter(None, good.values()))) + 20_000
    result = run_tiny(file_limit=limit)
    assert result.code == 2
    assert result.err.startswith(f"error: {folder.checkpoint(3)}: the checkpoint could not be written ([write] Unable to write")
    assert len(result.err.strip().splitlines()) == 1 and "the checkpoint of step 2 is intact" in result.err
    assert snapshot(folder.checkpoint(2)) == good
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-000002"]
    assert run_tiny(at=f"{STUDENT}.export").code == -9
    result = run_tiny(file_limit=limit)
    assert result.code == 2 and "the student could not be written ([write] Unable to write" in result.err
    assert not folder.student.exists() and not (folder.path / ".student.tmp").exists()
    assert run_tiny().code == 0
    assert_same(folder.path, never_stopped("full"))


def test_free_disk_is_checked_before_the_first_step(tiny_recipe, tmp_path, monkeypatch):
    usage, asked = namedtuple("usage", "total used free"), []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage(10**12, 10**12, 10**4))
    recipe = load_recipe(tiny_recipe, (f"run.folder={tmp_path}",))
    with pytest.raises(RunError, match=r"tiny: checkpoints and student need 0\.0 GB more, 0\.0 GB are free: .*run\.folder"):
        pipeline.run(recipe, View(Console(file=io.StringIO())))
    assert asked == [tmp_path / "tiny"]
    assert not RunFolder(tmp_path / "tiny").rows("validation.jsonl")
    needed = []
    for change in ({"keep_checkpoints": "last", "export": "last"}, {}, {"keep_checkpoints": "all", "validate_every": 1}):
        made = pipeline.Pipeline(recipe.model_copy(update={"run": recipe.run.model_copy(update=change)}), None, None)
        student = type("Student", (), {"state_bytes": lambda self: 1000, "export_bytes": lambda self: 10})()
        for free in range(0, 10**5, 10):
            monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(0, 0, free))
            try:
                made._check_disk(RunFolder(tmp_path / "tiny"), student, 6)
            except RunError:
                continue
            needed.append(free)
            break
    assert needed == [2010, 3010, 6010]  # one written beside what stays; all: at most one a step


# opening


def test_an_equal_recipe_is_continued_and_a_changed_one_refused_with_the_difference(tmp_path):
    run = RunFolder.open(make_recipe(tmp_path))
    (run.path / "kept").touch()
    run.append("validation.jsonl", {"step": 0})
    assert RunFolder.open(make_recipe(tmp_path)).path == run.path
    changed = make_recipe(tmp_path, optim={"learning_rate": 0.5}, objective={"segments": ["cot", "answer"]})
    before = snapshot(run.path)
    with pytest.raises(RunError) as error:
        RunFolder.open(changed)
    assert "(objective.segments: ['cot'] → ['cot', 'answer']; optim.learning_rate: 0.0001 → 0.5)" in str(error.value)
    assert "--set run.name=NAME" in str(error.value) and "--fresh" in str(error.value)
    assert snapshot(run.path) == before
    assert RunFolder.open(changed, fresh=True).recipe() == changed
    assert not (run.path / "kept").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["one"], "nothing of the old run is left beside"


def test_a_moved_run_is_continued_and_what_it_is_compared_with_may_change(tmp_path):
    run = RunFolder.open(make_recipe(tmp_path / "here"))
    run.write_json("eval.json", {"kept": 1})
    run.append("validation.jsonl", {"step": 0})
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = make_recipe(tmp_path / "there", eval={"compare": ["other"]})
    again = RunFolder.open(moved)
    assert again.recipe() == moved and again.read_json("eval.json") == {"kept": 1}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("content", [
    ["notes.txt"], ["recipe.toml", "thesis.tex"], ["checkpoints/mine.txt", "notes.txt"], ["checkpoints/mine.txt"], ["checkpoints"],
    [".hidden"],
])
def test_a_folder_that_holds_no_run_is_refused_and_untouched(tmp_path, fresh, content):
    recipe = make_recipe(tmp_path)
    for name in content:
        file = tmp_path / "one" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(RunError, match=r"one is not empty and holds no run: choose another --set run.name=NAME or move it away"):
        RunFolder.open(recipe, fresh)
    assert snapshot(tmp_path) == before


def test_a_run_killed_while_its_folder_was_made_is_opened(tmp_path):
    (tmp_path / "one" / "checkpoints").mkdir(parents=True)
    recipe = make_recipe(tmp_path)
    assert RunFolder.open(recipe).recipe() == recipe
    (tmp_path / "one" / "recipe.toml").rename(tmp_path / "one" / ".recipe.toml.tmp")
    assert RunFolder.open(recipe).recipe() == recipe


def test_fresh_takes_the_old_run_away_by_one_rename(tmp_path, monkeypatch):
    """Stopped in between, no half of the old run is left where a new one would continue it."""
    run = RunFolder.open(make_recipe(tmp_path))
    run.save_checkpoint(TrainState(2), write(), "last")

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else stop())
    with pytest.raises(KeyboardInterrupt):
        RunFolder.open(make_recipe(tmp_path, run={"seed": 1}), fresh=True)
    assert not run.path.exists()
    monkeypatch.undo()
    again = RunFolder.open(make_recipe(tmp_path, run={"seed": 1}))
    assert again.last_state() == TrainState()
    RunFolder.open(make_recipe(tmp_path, run={"seed": 2}), fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_folder_that_cannot_be_made_is_a_plain_error(tmp_path):
    (tmp_path / "one").write_text("a file")
    with pytest.raises(RunError, match=r"cannot write the run folder .*one: Not a directory; choose another --set run\.folder"):
        RunFolder.open(make_recipe(tmp_path))


def test_a_run_that_failed_before_its_first_step_does_not_keep_its_name(tmp_path):
    run = RunFolder.open(make_recipe(tmp_path))
    run.write_json("manifest.json", {"data_digest": "of a file with a typo"})
    changed = make_recipe(tmp_path, optim={"learning_rate": 0.5})
    again = RunFolder.open(changed)
    assert again.recipe() == changed and again.read_json("manifest.json") == {}


def test_a_recipe_of_another_version_is_a_plain_error(folder, tmp_path):
    folder.append("validation.jsonl", {"step": 0})
    (folder.path / "recipe.toml").write_text("[run]\nunheard_of = 1\n")
    with pytest.raises(RunError, match=r"another version of mlx-distill .*unheard_of.*; use --fresh"):
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
    assert result.err.startswith(f"error: {tmp_path / 'tiny'}: {changed} changed since this run began; ") and "--fresh" in result.err
    assert snapshot(tmp_path / "tiny") == before
    assert command_line(*words, "--fresh", "--set", "optim.steps=1", "--set", "eval.task=").code == 0


# logs


def test_logs_are_cut_to_a_step_and_survive_a_torn_line(folder):
    for step in (0, 1, 2, 3):
        folder.append("metrics.jsonl", {"step": step})
    (folder.path / "validation.jsonl").write_text('{"step": 0}\n{"step": 2}\n{"ste')
    assert [row["step"] for row in folder.rows("validation.jsonl")] == [0, 2]
    folder.cut_logs(1)
    assert [row["step"] for row in folder.rows("metrics.jsonl")] == [0, 1]
    assert (folder.path / "validation.jsonl").read_text() == '{"step": 0}\n'
    folder.cut_logs(-1)
    assert folder.rows("metrics.jsonl") == [] == folder.rows("validation.jsonl")
