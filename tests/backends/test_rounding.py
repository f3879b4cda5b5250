"""A student that learns with rounded weights computes what its export to so many bits will compute."""

from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from tiny import family_folder, llama_config, recipe_of

from mlx_distill.backends import choose_backend
from mlx_distill.data.batches import make_batch
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.errors import ModelError, RecipeError
from mlx_distill.objective import Objective
from mlx_distill.recipe.load import load_recipe

ROWS = 96
TOKENS = np.random.default_rng(0).integers(1, ROWS, 24).astype(np.int32)
BATCH = make_batch([TokenSequence("a", TOKENS, 4, 20, np.ones(24, bool))], ("cot", "answer"))
ALONE = Objective(kd_weight=0.0)
BOTH = pytest.mark.parametrize("name", ["mlx", "torch"])
TIED = pytest.mark.parametrize("tied", [True, False])
BITS = pytest.mark.parametrize("bits", [4, 8])


def folder_of(place: Path, tied: bool, width: int = 64) -> Path:
    # the MLP is as wide as the heads, so that its way back is of whole groups too
    config = llama_config(layers=2, width=width, vocabulary=ROWS, tied=tied)
    return family_folder(place, config, seed=3)


def rounded_by_mlx(folder: Path, place: Path, bits: int) -> Path:
    """As `mlx_lm.convert -q` writes it, put back into floats: another way to the same numbers."""
    model, config = mlx_lm.utils.load_model(folder)
    model, config = mlx_lm.utils.quantize_model(model, config, 64, bits)
    place.mkdir()
    mlx_lm.utils.save_model(place, model)
    mlx_lm.utils.save_config(config, place / "config.json")
    return place


def student(name: str, folder: Path, bits: int = 0):
    recipe = recipe_of(student={"model": "s", "quantize_aware_bits": bits})
    return choose_backend(name).load_student(folder, "s", recipe)


@BOTH
@TIED
@BITS
def test_its_loss_is_that_of_the_exported_folder_in_mlx_lm(name, tied, bits, tmp_path):
    folder = folder_of(tmp_path / "s", tied)
    exported, _ = mlx_lm.utils.load_model(rounded_by_mlx(folder, tmp_path / "q", bits))
    logits = np.array(exported(mx.array(TOKENS[None])), np.float64)[0]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = BATCH.positions[BATCH.weight > 0]
    wanted = -log_probs[places, TOKENS[places + 1]].sum()
    found = student(name, folder, bits).score(BATCH, None, ALONE).terms["ce"].sum()
    assert found == pytest.approx(wanted, rel=1e-5)
    plain = student(name, folder).score(BATCH, None, ALONE).terms["ce"].sum()
    assert abs(plain - wanted) > 1e-4 * abs(wanted)  # rounding shows


def dequantised(folder: Path, place: Path, bits: int) -> Path:
    """The folder with each matrix rounded, in floats."""
    from safetensors.numpy import load_file, save_file

    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for key, value in tensors.items():
        if value.ndim == 2 and value.shape[1] % 64 == 0:
            packed = mx.quantize(mx.array(value), 64, bits)
            tensors[key] = np.array(mx.dequantize(*packed, 64, bits))
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


@BOTH
@TIED
def test_its_gradient_is_that_of_the_rounded_weights(name, tied, tmp_path):
    """Straight through: as large as that of a student whose weights were rounded before."""
    folder = folder_of(tmp_path / "s", tied)
    dequantised(folder, tmp_path / "r", 4)
    norms = []
    for one in (student(name, folder, 4), student(name, tmp_path / "r")):
        one.accumulate(BATCH, None, ALONE, 20.0)
        norms.append(one.apply(0.0))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@BOTH
def test_a_student_without_whole_groups_is_refused(name, tmp_path):
    folder = folder_of(tmp_path / "s", True, width=16)
    with pytest.raises(ModelError, match=r"multiple of 64.*set student\.quantize_aware_bits = 0"):
        student(name, folder, 4)


def test_what_does_not_go_together_is_refused(tiny_recipe):
    for setting, said in (
        ("student.gradient_checkpointing=true", "rounds weights for one pass"),
        ("student.tuning=lora", "quantize_aware_bits"),
    ):
        with pytest.raises(RecipeError, match=said):
            load_recipe(tiny_recipe, ("student.quantize_aware_bits=4", setting))
