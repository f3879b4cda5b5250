"""A run on a base of few bits: what is scored as its base, what writes, and what cannot be cut."""

import json
import shutil

import mlx.nn as nn
import mlx_lm
import pytest

from mlx_distill.backends import choose_backend
from mlx_distill.backends.pair import Pair
from mlx_distill.data.prepare import choose
from mlx_distill.errors import ModelError
from mlx_distill.machine import Machine
from mlx_distill.pipeline import Pipeline
from mlx_distill.recipe.load import load_recipe
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.scoring.of_run import scored_models
from mlx_distill.terminal.plan import plan_of
from mlx_distill.view import silent
from mlx_distill.writing.of_recipe import Rollouts

PACKED = ("student.tuning=lora", "student.quantize_bits=4")
WRITES = ("rollouts.by=student", "truncation.span=cot")


def test_the_base_is_scored_as_the_student_begins(tiny_recipe):
    recipe = load_recipe(tiny_recipe, PACKED)
    models = scored_models(RunFolder.of(recipe), Pair.of(recipe))
    assert {one.part: one.bits for one in models}.items() >= {"base": 4, "student": 0}.items()


@pytest.mark.parametrize("packed", [True, False])
def test_who_writes_once_is_the_student_as_it_begins(packed, tiny_recipe):
    recipe = load_recipe(tiny_recipe, (*PACKED[: 1 + packed], *WRITES))
    writer = Pipeline(recipe, silent(), choose_backend("mlx"))._load_writer()
    kinds = {type(module) for module in writer.split.model.modules()}
    assert (nn.QuantizedLinear in kinds) == packed


def test_texts_of_another_base_are_others(tiny_recipe):
    folders = set()
    for settings in (PACKED, PACKED[:1]):
        recipe = load_recipe(tiny_recipe, (*settings, *WRITES))
        pair = Pair.of(recipe)
        folders.add(Rollouts(pair, choose(recipe, pair.tokenizer), "").folder)
    assert len(folders) == 2


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("stored", [True, False])
def test_bitsandbytes_format_is_refused_on_mlx_before_anything_is_read(
    role, stored, tiny_recipe, tmp_path
):
    settings = [f"{role}.quantize_bits=nf4"]
    if stored:
        folder = shutil.copytree(tiny_recipe.parent / role, tmp_path / role)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (folder / "config.json").write_text(json.dumps(config))
        settings = [f"{role}.model={folder}"]
    recipe = load_recipe(tiny_recipe, ("student.tuning=lora", "data.source=nothing", *settings))
    mac = Machine("mlx", "cpu", "float32", 10**9, "physical memory")
    for refused in (
        lambda: Pipeline(recipe, silent(), choose_backend("mlx")),
        lambda: plan_of(recipe, mac),
    ):
        with pytest.raises(ModelError, match=r"which MLX does not have: .*use --backend torch"):
            refused()


def test_a_folder_in_four_bits_is_not_cut(tiny_recipe, tmp_path):
    place = tmp_path / "packed"
    mlx_lm.convert(str(tiny_recipe.parent / "student"), str(place), quantize=True)
    settings = (f"student.model={place}", "prune.layers=1", f"prune.folder={tmp_path / 'pruned'}")
    recipe = load_recipe(tiny_recipe, ("student.tuning=lora", *settings))
    with pytest.raises(ModelError) as caught:
        Pipeline(recipe, silent(), choose_backend("mlx")).prune()
    assert "quantised" in str(caught.value)
    assert not (tmp_path / "pruned" / "packed").exists()
