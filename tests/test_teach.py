"""`teach` and `run` with a cache, end to end: the real teacher is asked once, and never where its
answers are kept.
"""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from endings import logged
from rich.console import Console
from safetensors.numpy import load_file

from mlx_distill import pipeline, stages
from mlx_distill.backends.mlx.backend import MlxBackend
from mlx_distill.backends.torch.backend import TorchBackend
from mlx_distill.errors import CacheError
from mlx_distill.recipe.load import load_recipe
from mlx_distill.runs.manifest import Manifest
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.teaching import fill
from mlx_distill.view import View

pytestmark = pytest.mark.usefixtures("without_charts")
SHORT = ("eval.task=", "optim.steps=3", "batch.global_batch_size=3")
KINDS = ("top_k", "sampled", "hidden")
BACKENDS = {"mlx": MlxBackend, "torch": TorchBackend}


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The names of the frozen models that were loaded."""
    found = []
    for kind in BACKENDS.values():
        load = kind.load_teacher
        monkeypatch.setattr(
            kind,
            "load_teacher",
            lambda self, folder, name, *how, load=load: (
                found.append(Path(name).name) or load(self, folder, name, *how)
            ),
        )
    return found


def teach(recipe, view, backend):
    """One recipe's cache."""
    (folder,) = stages.teach([recipe], view, backend)
    return folder


@pytest.fixture
def ask(tiny_recipe, tmp_path):
    """`run` or `teach` with settings; what it returned and what it said."""

    def ask(function, *settings: str, backend: str = "mlx"):
        console = Console(file=io.StringIO(), width=200)
        kept = (
            () if "teacher.cache=off" in settings else (f"teacher.cache_folder={tmp_path}/answers",)
        )
        recipe = load_recipe(tiny_recipe, (*SHORT, f"run.folder={tmp_path}/runs", *kept, *settings))
        with View(console) as view:
            return function(recipe, view, backend), console.file.getvalue()

    return ask


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "student" / "model.safetensors")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_asks_for_what_is_missing_and_the_next_one_asks_nothing(ask, loads, kind, backend):
    first, said = ask(pipeline.run, f"teacher.cache={kind}", "run.name=first", backend=backend)
    assert loads == ["teacher"] and "24 sequences" in said
    second, _ = ask(pipeline.run, f"teacher.cache={kind}", "run.name=second", backend=backend)
    other = ("truncation.fraction=1.0", 'objective.segments=["answer"]')
    ask(pipeline.run, f"teacher.cache={kind}", "run.name=third", *other, backend=backend)
    assert loads == ["teacher"]
    for name, array in weights(first).items():
        assert np.array_equal(array, weights(second)[name])
    rows = logged(second, "metrics.jsonl")
    assert all(np.isfinite(row["loss"]) and row["kd"] > 0 for row in rows)
    assert "teacher" not in rows[0]["flops"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_of_hidden_states_is_the_live_one(ask, backend):
    """Of each divergence: `test_cached_and_live_are_equal` in test_targets.py."""
    objective = ("objective.divergence=jsd", "objective.temperature=2.0")
    live, _ = ask(pipeline.run, "teacher.cache=off", "run.name=live", *objective, backend=backend)
    cached, _ = ask(
        pipeline.run, "teacher.cache=hidden", "run.name=cached", *objective, backend=backend
    )
    for name, array in weights(live).items():
        np.testing.assert_allclose(weights(cached)[name], array, rtol=0, atol=1e-5, err_msg=name)
    for log in ("metrics.jsonl", "validation.jsonl"):
        for one, other in zip(logged(live, log), logged(cached, log), strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_dkd_is_refused_before_training_where_the_cache_lacks_the_text(ask, tmp_path):
    """And trains where it has it; validation measures forward KL, which asks for no ids."""
    asked = ("teacher.cache=top_k", "objective.divergence=dkd", 'objective.segments=["cot"]')
    with pytest.raises(CacheError, match=r"is none of them .* raise teacher.cache_top_k"):
        ask(pipeline.run, *asked, "teacher.cache_top_k=3", "run.name=few")
    assert not (tmp_path / "runs" / "few" / "metrics.jsonl").exists()
    folder, _ = ask(pipeline.run, *asked, "teacher.cache_top_k=512", "run.name=most")
    (held_out,) = logged(folder, "validation.jsonl")[-1:]
    assert np.isfinite(held_out["loss"]) and all(
        row["kd"] > 0 for row in logged(folder, "metrics.jsonl")
    )


def test_teach_completes_and_says_what_there_is(ask, loads):
    folder, said = ask(teach, "teacher.cache=top_k", "data.train_examples=4")
    assert "8 sequences" in said and loads == ["teacher"]
    _, said = ask(teach, "teacher.cache=top_k")
    assert (
        "24 sequences" in said and "asking the teacher" in said and loads == ["teacher", "teacher"]
    )
    assert len(list(folder.glob("part-*"))) == 2
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (
        manifest["fields"]["kind"] == "top_k"
        and manifest["fields"]["top_k"] == 64
        and manifest["fields"]["dtype"] == "float16"
    )
    _, said = ask(teach, "teacher.cache=top_k", backend="torch")
    assert "asking" not in said and loads == ["teacher", "teacher"]
    _, said = ask(teach, "teacher.cache=top_k", "teacher.cache_top_k=5")
    assert "has top_k 64 (asked: 5)" in said and len(loads) == 3


def test_a_cache_deleted_while_the_teacher_is_asked_is_one_line(ask, tmp_path, monkeypatch):
    asked = fill.whole_batch

    def deleting(*arguments):
        for folder in list(tmp_path.rglob("write.lock")):
            shutil.rmtree(folder.parent, ignore_errors=True)
        return asked(*arguments)

    monkeypatch.setattr(fill, "whole_batch", deleting)
    with pytest.raises(CacheError, match="was deleted while the teacher was asked"):
        ask(teach, "teacher.cache=top_k")


def test_recipes_that_share_a_cache_share_one_pass(tiny_recipe, tmp_path, loads):
    console = Console(file=io.StringIO(), width=200)
    common = ("teacher.cache=top_k", f"teacher.cache_folder={tmp_path}", "data.train_examples=4")
    settings = ((), ("run.seed=7",), ("truncation.fraction=1.0",), ("teacher.cache_top_k=3",))
    recipes = [load_recipe(tiny_recipe, (*common, *more)) for more in settings]
    with View(console) as view:
        folders = stages.teach(recipes, view, "mlx")
    assert len(folders) == 2 and loads == ["teacher", "teacher"]
    ids = [
        {
            example
            for path in folder.glob("part-*/index.json")
            for example, *_ in json.loads(path.read_text())["examples"]
        }
        for folder in folders
    ]
    assert ids[1] < ids[0] and len(list(folders[0].glob("part-*"))) == 1


def test_teach_killed_between_parts_goes_on(tiny_recipe, command_line, tmp_path, monkeypatch):
    words = (
        "teach",
        tiny_recipe,
        "--backend",
        "mlx",
        "--set",
        "teacher.cache=top_k",
        "--set",
        f"teacher.cache_folder={tmp_path}",
    )
    assert command_line(*words, at="mlx_distill.files:flush_to_disk", when="after").code == -9
    (folder,) = tmp_path.glob("top_k-*")
    (half,) = folder.glob(".part*")
    assert re.fullmatch(r"\.part-000000-[0-9a-f]{8}\.tmp", half.name) and not list(
        folder.glob("part-*")
    )
    result = command_line(*words)
    assert result.code == 0 and "24 sequences" in result.out, result.err
    assert not list(folder.glob(".part*"))
    assert (
        command_line(*words, at="mlx_distill.teaching.fill:_teach").code == 0
    )  # which is not called any more


def test_a_teacher_that_changed_makes_another_cache(ask, loads, tiny_recipe):
    first, _ = ask(teach, "teacher.cache=hidden")
    second, said = ask(teach, "teacher.cache=hidden", f"teacher.model={tiny_recipe.parent}/student")
    assert first != second and "teacher_fingerprint" in said and loads == ["teacher", "student"]


def test_a_teacher_in_another_format_makes_another_cache(ask, loads):
    first, _ = ask(teach, "teacher.cache=hidden")
    second, said = ask(teach, "teacher.cache=hidden", "teacher.compute_dtype=bfloat16")
    assert first != second and "compute_dtype" in said and len(loads) == 2


def test_the_run_says_which_cache_it_read(ask):
    folder, _ = ask(pipeline.run, "teacher.cache=sampled")
    kept = RunFolder(folder).read(Manifest).teacher_cache
    assert (Path(folder).parents[1] / "answers" / kept / "manifest.json").exists()
    assert kept.startswith("sampled-")
