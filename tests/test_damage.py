"""Fuzz: files of a stopped run and of a teacher cache are damaged, strangers' files are put beside
them, and the work goes on.

It ends as it would have without the damage, to the bit, or in one line of a `DistillError`; what no
run made is always left. The seed is fixed. `MLX_DISTILL_FUZZ=5000` tries that many more (with
another seed for each).
"""

import contextlib
import io
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from toy_backend import ToyBackend

from mlx_distill import pipeline
from mlx_distill.data.batches import make_batch
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.errors import DistillError
from mlx_distill.recipe.load import load_recipe
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.recipe.tables import TeacherTable
from mlx_distill.recipe.training_tables import BatchTable
from mlx_distill.runs.rows import MetricsRow
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.teaching.cached_teacher import CachedTeacher
from mlx_distill.teaching.fields import CacheFields
from mlx_distill.teaching.fill import fill
from mlx_distill.teaching.folder import TeacherCache
from mlx_distill.view import View

TRIES = int(os.environ.get("MLX_DISTILL_FUZZ", "0")) or 60
FIRST_SEED = 1000 if os.environ.get("MLX_DISTILL_FUZZ") else 0
STRANGERS = (
    "thesis.txt",
    "src/a.py",
    "checkpoints/epoch-1.pt",
    "checkpoints/notes/a.md",
    "manifest.json.bak",
    ".hidden",
    "checkpoints/step-4/weights.safetensors",
    "student-old/config.json",
    "recipe (copy).toml",
    ".step-000004.tmp",
)
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
    patch.setattr(
        pipeline, "report", lambda runs, out: (out / "report.html").write_text("of a toy")
    )


def recipe_of(folder: Path, recipe: Path) -> Recipe:
    sets = (
        f"run.folder={folder}",
        "eval.task=",
        "run.keep_checkpoints=all",
        "run.checkpoint_every=2",
        "run.validate_every=2",
    )
    return load_recipe(recipe, sets)


def run(folder: Path, recipe: Path) -> Path:
    with contextlib.suppress(Stopped):
        pipeline.run(recipe_of(folder, recipe), View(Console(file=io.StringIO())))
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
        said = io.StringIO()
        try:
            pipeline.run(
                recipe_of(folder.parent, tiny_recipe), View(Console(file=said)), fresh=fresh
            )
        except DistillError as error:
            assert len(str(error).splitlines()) == 1, (seed, stage, told, error)
            ends["one line"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}, {stage}, {told}: {error!r}") from error
        else:
            file = told.split()[-1]
            noted = file.startswith("student/") and f"note: {folder / file} is " in said.getvalue()
            assert noted or same(ending(folder), whole, told), (seed, stage, told)
            ends["equal"] += 1
        assert all(path.read_text() == "mine" for path in mine), (seed, stage, told)
        shutil.rmtree(folder.parent)
    print(ends)
    assert min(ends.values()) >= 3, f"{ends}: neither may be the only ending, or nothing was tried"


# a teacher cache


class FakeTeacher:
    """Answers that are a function of the token and its place."""

    vocabulary_rows = 50

    def numbers(self, batch, count: int, below: int) -> np.ndarray:
        place = batch.positions[:, None] * 31 + batch.tokens.ravel()[batch.positions][:, None] * 7
        return (place + np.arange(count) * 11) % below

    def top_k(self, batch, k, rows):
        numbers = self.numbers(batch, k, rows)
        return numbers, -numbers.astype(np.float32) / 8, -numbers[:, 0].astype(np.float32)

    def draw(self, batch, uniform, rows):
        numbers = self.numbers(batch, uniform.shape[1], 20)
        return numbers, numbers[:, 0].astype(np.float32), numbers[:, 0]


ROWS = [np.arange(length, dtype=np.int32) % 50 for length in (9, 12, 7, 15)]
SEQUENCES = [
    TokenSequence(f"s{length}", row, 2, length - 2, np.ones(length, bool))
    for row in ROWS
    for length in [len(row)]
]


def ask(root: Path, kind: str) -> list[np.ndarray]:
    """Complete the cache, and ask it for everything."""
    table = TeacherTable(model="teacher", cache=kind, cache_top_k=4, cache_samples=6)
    fields = CacheFields.of(table, "f" * 64, {"a": 0}, 50)
    cache = TeacherCache(root, fields)
    batches = BatchTable(micro_batch_size=2, global_batch_size=2, pad_multiple=1)
    fill(
        cache,
        SEQUENCES,
        FakeTeacher,
        ToyBackend(),
        batches,
        {},
        lambda text: None,
        lambda *_: lambda more: None,
    )
    found = CachedTeacher(cache, ToyBackend()).targets(
        make_batch(SEQUENCES, ("prompt", "cot", "answer"))
    )
    return [np.asarray(value) for value in vars(found).values()]


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_a_damaged_cache_answers_the_same_or_says_so_in_one_line(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("mlx_distill.teaching.fill.PART_TOKENS", 15)
    whole, ends = ask(tmp_path / "whole", kind), {"equal": 0, "one line": 0}
    for seed in range(FIRST_SEED, FIRST_SEED + 3 * TRIES):
        choose = random.Random(seed)
        root = Path(shutil.copytree(tmp_path / "whole", tmp_path / str(seed)))
        (cache,) = root.iterdir()
        names = (
            "part-copy/index.json",
            "part-1/a",
            ".part-000000.txt.tmp",
            "notes.txt",
            "head.txt",
            "part-000000/a.txt",
        )
        mine = [stranger(cache / name) for name in choose.sample(names, 2)]
        told = damaged(choose, cache)
        try:
            found = ask(root, kind)
        except DistillError as error:
            assert len(str(error).splitlines()) == 1, (seed, told, error)
            ends["one line"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}, {told}: {error!r}") from error
        else:
            assert all(map(np.array_equal, found, whole)), (seed, told)
            ends["equal"] += 1
        assert all(path.read_text() == "mine" for path in mine), (seed, told)
        shutil.rmtree(root)
    print(ends)
    assert min(ends.values()) >= 3, ends


# what is compared, and how files are damaged


def ending(folder: Path) -> dict:
    """What a run is worth: its student, its totals and its losses."""
    manifest = json.loads((folder / "manifest.json").read_text())
    rows = {
        row.step: row.loss for row in RunFolder(folder).rows(MetricsRow) if row.loss is not None
    }
    return {
        "student": {
            path.name: path.read_bytes()
            for path in (folder / "student").iterdir()
            if path.name != "README.md"  # it says times, and a damaged one is left as it is
        },
        "totals": {
            name: manifest.get(name)
            for name in ("exported_step", "tokens_read", "loss_tokens", "flops", "models", "steps")
        },
        "losses": rows,
    }


def same(found: dict, whole: dict, told: str) -> bool:
    """A line that was damaged is missing; digits that a person changed in a log nobody knows."""
    if "metrics.jsonl" in told:
        known = not told.startswith(("digits", "value", "flip"))
        if known and any(whole["losses"][step] != loss for step, loss in found["losses"].items()):
            return False
        found, whole = found | {"losses": 0}, whole | {"losses": 0}
    return found == whole


def stranger(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    return path


def damaged(choose: random.Random, folder: Path) -> str:
    """Damage one of our files; returns how and which."""
    ours = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.read_bytes() != b"mine"
    )
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
        file.write_bytes(
            content[:place]
            + bytes([content[place] ^ 1 << choose.randrange(8)])
            + content[place + 1 :]
        )


def removed(choose, file, content):
    file.unlink()


def emptied(choose, file, content):
    file.write_bytes(b"")


def digits(choose, file, content):
    places = [place for place, byte in enumerate(content) if chr(byte).isdigit()]
    if places:
        place = choose.choice(places)
        file.write_bytes(
            content[:place] + str((content[place] - 47) % 10).encode() + content[place + 1 :]
        )


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
    file.write_bytes(
        choose.choice(
            [
                b"\xff\xfe",
                DEEP.encode(),
                b"{" * 50,
                b"9" * 5000,
                b"null",
                b"[]",
                b"\0" * 100,
                content * 2,
            ]
        )
    )


def folder_instead(choose, file, content):
    file.unlink()
    file.mkdir()
