"""Fuzz: files of a stopped run and of a teacher cache are damaged, strangers' files are put beside them, and the work goes on.

It ends as it would have without the damage, to the bit, or in one line of a `DistillError`; what no run made is always left.
The seed is fixed. `MLX_DISTILL_FUZZ=5000` tries that many more (with another seed for each).
"""

import io
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.numpy import load_file
from toy_backend import ToyBackend

from mlx_distill import pipeline
from mlx_distill.errors import DistillError
from mlx_distill.recipe import Recipe, load_recipe
from mlx_distill.run_dir import RunFolder
from mlx_distill.view import View

TRIES = int(os.environ.get("MLX_DISTILL_FUZZ", "0")) or 60
FIRST_SEED = 1000 if os.environ.get("MLX_DISTILL_FUZZ") else 0
STRANGERS = ("thesis.txt", "src/a.py", "checkpoints/epoch-1.pt", "checkpoints/notes/a.md", "manifest.json.bak", ".hidden",
             "checkpoints/step-4/weights.safetensors", "student-old/config.json", "recipe (copy).toml", ".step-000004.tmp")
DEEP = "[" * 3000 + "]" * 3000
VALUES = (None, True, -1, 10**30, 1.5, "", "text", [], [1], {}, {"a": {}}, "\ud800")


class Stopped(BaseException):
    """As a kill: nobody handles it."""


@pytest.fixture(scope="module")
def stages(tiny_recipe, tmp_path_factory):
    """A toy's run as it ends, and as it lies there when it was stopped at three places."""
    root = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        toy(patch)
        made = {"finished": run(root / "finished", tiny_recipe)}
        save = RunFolder.save_checkpoint

        def stopping(self, state, write, keep):
            save(self, state, write, keep)
            if state.step == 4:
                raise Stopped

        patch.setattr(RunFolder, "save_checkpoint", stopping)
        made["in training"] = run(root / "in training", tiny_recipe)
        patch.setattr(RunFolder, "save_checkpoint", save)
        patch.setattr(pipeline.Pipeline, "_finish", stop)
        made["before the report"] = run(root / "before the report", tiny_recipe)
        patch.setattr(RunFolder, "write_student", stop)
        made["before the export"] = run(root / "before the export", tiny_recipe)
    return made


def stop(*_):
    raise Stopped


def toy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pipeline, "choose_backend", lambda name: ToyBackend())
    patch.setattr(pipeline, "announce", lambda *_: None)
    patch.setattr(pipeline, "report", lambda runs, out: (out / "report.html").write_text("of a toy"))


def recipe_of(folder: Path, recipe: Path) -> Recipe:
    sets = (f"run.folder={folder}", "eval.task=", "run.keep_checkpoints=all", "run.checkpoint_every=2", "run.validate_every=2")
    return load_recipe(recipe, sets)


def run(folder: Path, recipe: Path) -> Path:
    try:
        pipeline.run(recipe_of(folder, recipe), View(Console(file=io.StringIO())))
    except Stopped:
        pass
    return folder / "tiny"


def test_a_damaged_run_ends_equal_or_in_one_line(stages, tiny_recipe, tmp_path, monkeypatch):
    toy(monkeypatch)
    whole, ends = ending(stages["finished"]), {"equal": 0, "one line": 0}
    for seed in range(FIRST_SEED, FIRST_SEED + TRIES):
        choose = random.Random(seed)
        stage = choose.choice(sorted(stages))
        folder = Path(shutil.copytree(stages[stage], tmp_path / str(seed) / "tiny", symlinks=True))
        if choose.random() < 0.6:  # as keep_checkpoints = "last" leaves it
            newest = RunFolder(folder).steps()[-1]
            for step in RunFolder(folder).steps():
                if step != newest:
                    shutil.rmtree(RunFolder(folder).checkpoint(step))
        mine = [stranger(folder / name) for name in choose.sample(STRANGERS, 3)]
        told = damaged(choose, folder)
        fresh = choose.random() < 0.1
        try:
            pipeline.run(recipe_of(folder.parent, tiny_recipe), View(Console(file=io.StringIO())), fresh=fresh)
        except DistillError as error:
            assert len(str(error).splitlines()) == 1, (seed, stage, told, error)
            ends["one line"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}, {stage}, {told}: {error!r}") from error
        else:
            assert same(ending(folder), whole, told), (seed, stage, told)
            ends["equal"] += 1
        assert all(path.read_text() == "mine" for path in mine), (seed, stage, told)
        shutil.rmtree(folder.parent)
    print(ends)
    assert min(ends.values()) >= 3, f"{ends}: neither may be the only ending, or nothing was tried"


def ending(folder: Path) -> dict:
    """What a run is worth: its student, the last checkpoint's weights, its totals and its losses."""
    manifest = json.loads((folder / "manifest.json").read_text())
    last = load_file(folder / "checkpoints" / "step-000006" / "weights.safetensors")
    rows = {row["step"]: row["loss"] for row in RunFolder(folder).rows("metrics.jsonl") if isinstance(row.get("loss"), float)}
    return {
        "student": {path.name: path.read_bytes() for path in (folder / "student").iterdir()},
        "weights": {name: array.tobytes() for name, array in last.items()},
        "totals": {name: manifest.get(name) for name in ("exported_step", "tokens_read", "loss_tokens", "flops", "models", "steps")},
        "losses": rows,
    }


def same(found: dict, whole: dict, told: str) -> bool:
    """A line that was damaged is missing; digits that a person changed in a manifest or a log nobody knows."""
    if told.endswith("manifest.json") and told.startswith(("digits", "value")):
        found, whole = found | {"totals": 0}, whole | {"totals": 0}
    if "metrics.jsonl" in told:
        if not told.startswith(("digits", "value", "flip")) and any(whole["losses"][step] != loss for step, loss in found["losses"].items()):
            return False
        found, whole = found | {"losses": 0}, whole | {"losses": 0}
    return found == whole


def stranger(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    return path


def damaged(choose: random.Random, folder: Path) -> str:
    """Damage one of our files; returns how and which."""
    ours = sorted(path for path in folder.rglob("*") if path.is_file() and path.read_bytes() != b"mine")
    file = choose.choice(ours)
    content = file.read_bytes()
    ways = [truncated, flipped, removed, emptied, digits, value, garbage, folder_instead]
    way = choose.choice(ways)
    way(choose, file, content)
    return f"{way.__name__} {file.relative_to(folder)}"


def truncated(choose, file, content):
    file.write_bytes(content[: choose.randrange(len(content) + 1)])


def flipped(choose, file, content):
    if content:
        place = choose.randrange(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << choose.randrange(8)]) + content[place + 1 :])


def removed(choose, file, content):
    file.unlink()


def emptied(choose, file, content):
    file.write_bytes(b"")


def digits(choose, file, content):
    places = [place for place, byte in enumerate(content) if chr(byte).isdigit()]
    if places:
        place = choose.choice(places)
        file.write_bytes(content[:place] + str((content[place] - 47) % 10).encode() + content[place + 1 :])


def value(choose, file, content):
    """Another value for one key of a JSON object, or of one line."""
    try:
        lines = content.decode().splitlines() if file.suffix == ".jsonl" else [content.decode()]
        number = choose.randrange(len(lines))
        found = json.loads(lines[number])
        found[choose.choice(sorted(found))] = choose.choice(VALUES)
        lines[number] = json.dumps(found)
        file.write_text("\n".join(lines) + "\n")
    except (ValueError, IndexError, TypeError):
        garbage(choose, file, content)


def garbage(choose, file, content):
    file.write_bytes(choose.choice([b"\xff\xfe", DEEP.encode(), b"{" * 50, b"9" * 5000, b"null", b"[]", b"\0" * 100, content * 2]))


def folder_instead(choose, file, content):
    file.unlink()
    file.mkdir()
