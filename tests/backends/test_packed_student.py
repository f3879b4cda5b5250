"""LoRA and DoRA on a base of few bits: the same as on that base's numbers written out, on both
backends, and what is exported is the student that trained.
"""

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch
import transformers
from frameworks import FRAMEWORKS, state_of
from packed_students import (
    ROWS,
    TOKENS,
    assert_equal_students,
    kept,
    logits_of,
    student,
    trained,
)
from safetensors.numpy import load_file, save_file
from tiny import family_folder, llama_config

from mlx_distill.errors import ModelError, RecipeError
from mlx_distill.recipe.load import load_recipe

BOTH = pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=list(FRAMEWORKS))
TUNING = pytest.mark.parametrize("tuning", ["lora", "dora"])
# bits asked for on load (0: a folder that MLX quantised), the head tied, format of the numbers;
# what leads out of the MLP is narrower than a group in one of them, and stays as it is
BASES = {
    "4": (4, True, "float32", 128),
    "6 of bfloat16": (6, False, "bfloat16", 128),
    "8, narrow": (8, True, "float32", 96),
    "stored": (0, False, "float32", 128),
}
BASE = pytest.mark.parametrize("base", BASES)


def folders(place: Path, base: str) -> tuple[Path, Path, int]:
    """A base, the same in plain numbers, and to how many bits it is quantised on load."""
    bits, tied, dtype, ffn = BASES[base]
    config = llama_config(layers=2, width=64, vocabulary=ROWS, tied=tied)
    folder = family_folder(place / "s", config | {"intermediate_size": ffn}, 3, dtype)
    written = written_out(folder, place / "written", bits or 4)
    return (folder if bits else as_mlx_lm_stores(folder, place / "q")), written, bits


def as_mlx_lm_stores(folder: Path, place: Path) -> Path:
    """As `mlx_lm.convert -q` does."""
    model, config = mlx_lm.utils.load_model(folder)
    model, config = mlx_lm.utils.quantize_model(model, config, 64, 4)
    place.mkdir()
    mlx_lm.utils.save_model(place, model)
    mlx_lm.utils.save_config(config, place / "config.json")
    return place


def written_out(folder: Path, place: Path, bits: int) -> Path:
    """Each matrix of whole groups as MLX's integers, scales and biases multiply out, in float64."""
    place.mkdir()
    tensors = {}
    for key, array in mx.load(str(folder / "model.safetensors")).items():
        tensors[key] = np.array(array.astype(mx.float32))
        if array.ndim == 2 and array.shape[1] % 64 == 0:
            packed, scales, biases = mx.quantize(array, 64, bits)
            stream = np.unpackbits(np.array(packed).view(np.uint8), axis=1, bitorder="little")
            integers = stream.reshape(len(array), -1, 64, bits) @ (1 << np.arange(bits))
            scales, biases = (
                np.array(part.astype(mx.float32), np.float64) for part in (scales, biases)
            )
            numbers = integers * scales[..., None] + biases[..., None]
            tensors[key] = numbers.reshape(array.shape).astype(np.float32)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    (place / "config.json").write_bytes((folder / "config.json").read_bytes())
    return place


@BOTH
@TUNING
@BASE
def test_it_learns_as_adapters_on_the_numbers_written_out_do(framework, tuning, base, tmp_path):
    folder, written, bits = folders(tmp_path, base)
    packed, plain = (
        student(framework, folder, tuning, bits),
        student(framework, written, tuning),
    )
    assert_equal_students(packed, plain)


@TUNING
@BASE
def test_both_backends_learn_the_same(tuning, base, tmp_path):
    folder, _, bits = folders(tmp_path, base)
    losses = [trained(student(one, folder, tuning, bits), 6) for one in FRAMEWORKS.values()]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][-1] < 0.9 * losses[0][0]


@BOTH
@TUNING
@BASE
def test_the_exported_folder_is_the_student_in_transformers(framework, tuning, base, tmp_path):
    folder, _, bits = folders(tmp_path, base)
    one = student(framework, folder, tuning, bits)
    trained(one)
    wanted = framework.logits(one.split, TOKENS[None])
    one.export(tmp_path / "out", [1])
    np.testing.assert_allclose(logits_of(tmp_path / "out"), wanted, atol=1e-4, rtol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32" and not [key for key in config if "quant" in key]
    half = student(framework, folder, tuning, bits, save_dtype="bfloat16")
    with state_of(one) as state:
        half.restore_state(state)
    half.export(tmp_path / "half", [1])
    exact = mx.load(str(tmp_path / "out" / "model.safetensors"))
    for key, array in mx.load(str(tmp_path / "half" / "model.safetensors")).items():
        assert mx.array_equal(exact.pop(key).astype(mx.bfloat16), array).item()
    assert not exact
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


@BOTH
@TUNING
def test_the_adapters_are_the_students_in_mlx_lm_and_peft(framework, tuning, tmp_path):
    import peft

    folder, written, _ = folders(tmp_path, "stored")
    one = student(framework, folder, tuning)
    trained(one)
    one.export(tmp_path / "out", [1])
    wanted = framework.logits(one.split, TOKENS[None])
    model, _ = mlx_lm.utils.load_model(folder)
    model = mlx_lm.utils.load_adapters(model, str(tmp_path / "out" / "adapters"))
    found = np.array(model(mx.array(TOKENS[None])))
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)
    plain = transformers.AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(plain, tmp_path / "out" / "adapters-peft")
    with torch.no_grad():
        found = model(torch.from_numpy(TOKENS[None]).long()).logits.numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)
    config = json.loads((tmp_path / "out" / "adapters-peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"


@BOTH
@TUNING
def test_it_resumes_to_the_bit(framework, tuning, tmp_path):
    folder, _, bits = folders(tmp_path, "6 of bfloat16")
    straight, begun = (student(framework, folder, tuning, bits) for _ in range(2))
    trained(straight, 4)
    trained(begun, 2)
    resumed = student(framework, folder, tuning, bits)
    with state_of(begun) as state:
        resumed.restore_state(state)
    trained(resumed, 2)
    one, other = kept(straight), kept(resumed)
    assert all(np.array_equal(one[key], other[key]) for key in one)


@BOTH
@pytest.mark.parametrize(
    "setting", [{"gradient_checkpointing": True}, {"compute_dtype": "bfloat16"}]
)
@TUNING
def test_with_other_settings_too(framework, tuning, setting, tmp_path):
    folder, _, bits = folders(tmp_path, "4")
    plain = trained(student(framework, folder, tuning, bits))
    found = trained(student(framework, folder, tuning, bits, **setting))
    assert found == pytest.approx(plain, rel=3e-2 if "compute_dtype" in setting else 1e-5)


def test_a_tied_head_that_is_stored_all_the_same_is_exported_once(tmp_path):
    folder, _, bits = folders(tmp_path, "4")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for framework in FRAMEWORKS.values():
        one, place = student(framework, folder, "lora", bits), tmp_path / framework.name
        one.export(place, [1])
        assert "lm_head.weight" not in load_file(place / "model.safetensors")
        wanted = framework.logits(one.split, TOKENS[None])
        np.testing.assert_allclose(logits_of(place), wanted, atol=1e-4, rtol=0)


@BOTH
def test_what_cannot_be_such_a_base_is_refused(framework, tmp_path):
    folder, _, _ = folders(tmp_path, "stored")
    with pytest.raises(ModelError, match=r'they cannot train: set \[student\] tuning = "lora"'):
        student(framework, folder, "full")
    with pytest.raises(ModelError, match=r"student\.quantize_bits = 8 .*in 4 bits: set 0"):
        student(framework, folder, "lora", 8)
    narrow = family_folder(tmp_path / "n", llama_config(width=16, vocabulary=ROWS))
    with pytest.raises(ModelError, match=r"multiple of 64.*set student\.quantize_bits = 0"):
        student(framework, narrow, "lora", 4)
    config = json.loads((folder / "config.json").read_text())
    for said, found in (
        ({"quantization": config["quantization"] | {"mode": "mxfp4"}}, "mode 'mxfp4'"),
        ({"quantization": None, "quantization_config": {"quant_method": "gptq"}}, "'gptq'"),
    ):
        (folder / "config.json").write_text(json.dumps(config | said))
        with pytest.raises(ModelError, match=f"quantised as {found}.*MLX's affine format"):
            student(framework, folder, "lora")


def test_all_weights_cannot_train_in_few_bits(tiny_recipe):
    expected = r"quantize_bits is set but.*only with tuning = \"lora\" or \"dora\""
    with pytest.raises(RecipeError, match=expected):
        load_recipe(tiny_recipe, ("student.quantize_bits=4",))
