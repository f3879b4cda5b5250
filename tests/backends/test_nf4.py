"""bitsandbytes' NF4 on torch, on a CPU as on a GPU: its numbers are the paper's, adapters learn on
them as on the same numbers written out, and what is exported is the student that trained.
"""

import json
import sys
from pathlib import Path

import numpy as np
import peft
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
from safetensors.torch import load_file as load_tensors
from scipy.stats import norm
from tiny import family_folder, llama_config

from mlx_distill.backends import choose_backend
from mlx_distill.backends.export import not_for_mlx_lm
from mlx_distill.backends.torch import nf4
from mlx_distill.errors import ModelError, RecipeError
from mlx_distill.recipe.load import load_recipe

TORCH, MLX = FRAMEWORKS["torch"], FRAMEWORKS["mlx"]
TUNING = pytest.mark.parametrize("tuning", ["lora", "dora"])
# the head tied, format of the numbers, width of the MLP (of 36, groups go on in the next row and the
# last one is not whole), family
BASES = {
    "tied": (True, "float32", 128, "llama"),
    "bfloat16, biases": (False, "bfloat16", 128, "qwen2"),
    "narrow": (True, "float32", 36, "llama"),
}
BASE = pytest.mark.parametrize("base", BASES)


def levels() -> np.ndarray:
    """Quantiles of a normal distribution, 0 among them, from −1 to 1 (appendix E of the paper)."""
    tail = 0.9677083
    above = norm.ppf(np.linspace(tail, 0.5, 9))
    below = -norm.ppf(np.linspace(tail, 0.5, 8)[:-1])
    found = np.sort(np.concatenate([above, below]))
    return found / found.max()


def written_out(folder: Path, place: Path) -> Path:
    """Each matrix of a block as the nearest levels times the largest of 64 numbers, in float64."""
    place.mkdir()
    tensors = {}
    for key, tensor in load_tensors(folder / "model.safetensors").items():
        tensors[key] = array = tensor.double().numpy()
        if key.endswith("_proj.weight"):
            flat = np.concatenate([array.ravel(), np.zeros(-array.size % 64)]).reshape(-1, 64)
            scale = np.abs(flat).max(axis=1, keepdims=True)
            nearest = np.abs((flat / scale)[..., None] - levels()).argmin(axis=-1)
            rounded = (levels()[nearest] * scale).ravel()[: array.size]
            tensors[key] = rounded.reshape(array.shape)
    single = {key: array.astype(np.float32) for key, array in tensors.items()}
    save_file(single, place / "model.safetensors", {"format": "pt"})
    (place / "config.json").write_bytes((folder / "config.json").read_bytes())
    return place


def folders(place: Path, base: str) -> tuple[Path, Path]:
    """A base, and the numbers that NF4 makes of it."""
    tied, dtype, ffn, family = BASES[base]
    config = llama_config(layers=2, width=64, vocabulary=ROWS, tied=tied, family=family)
    folder = family_folder(place / "s", config | {"intermediate_size": ffn}, 3, dtype)
    return folder, written_out(folder, place / "written")


def stored(folder: Path, place: Path, kept_as: torch.dtype) -> Path:
    """As transformers stores what bitsandbytes packed, the scales packed in turn, and the integers
    kept as numbers of some format, as FSDP wants them.
    """
    chosen = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=kept_as,
    )
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=chosen)
    opened.save_pretrained(place)
    return place


@BASE
def test_the_numbers_are_the_papers(base, tmp_path):
    folder, written = folders(tmp_path, base)
    one = student(TORCH, folder, bits="nf4")
    expected = load_file(written / "model.safetensors")
    layers = nf4.packed_layers(one.split.model)
    assert len(layers) == 2 * 7
    for path, layer in layers.items():
        name = path.replace(".base_layer", "") + ".weight"
        found = nf4.matrix(layer).numpy()
        # the table that bitsandbytes has in float32
        np.testing.assert_allclose(found, expected[name], atol=2e-6 * np.abs(found).max(), rtol=0)


@TUNING
@BASE
def test_it_learns_as_adapters_on_the_numbers_written_out_do(tuning, base, tmp_path):
    folder, written = folders(tmp_path, base)
    packed, plain = student(TORCH, folder, tuning, "nf4"), student(TORCH, written, tuning)
    assert_equal_students(packed, plain)


@TUNING
@BASE
def test_the_exported_folder_is_the_student_in_transformers(tuning, base, tmp_path):
    folder, _ = folders(tmp_path, base)
    one = student(TORCH, folder, tuning, "nf4")
    trained(one)
    wanted = TORCH.logits(one.split, TOKENS[None])
    one.export(tmp_path / "out", [1])
    np.testing.assert_allclose(logits_of(tmp_path / "out"), wanted, atol=1e-4, rtol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32" and not [key for key in config if "quant" in key]
    half = student(TORCH, folder, tuning, "nf4", save_dtype="bfloat16")
    with state_of(one) as state:
        half.restore_state(state)
    half.export(tmp_path / "half", [1])
    exact = load_tensors(tmp_path / "out" / "model.safetensors")
    found = load_tensors(tmp_path / "half" / "model.safetensors")
    assert found.keys() == exact.keys()
    assert all(torch.equal(exact[key].bfloat16(), tensor) for key, tensor in found.items())


@TUNING
def test_the_adapters_are_the_students_in_peft(tuning, tmp_path):
    folder, _ = folders(tmp_path, "tied")
    one = student(TORCH, folder, tuning, "nf4")
    trained(one)
    one.export(tmp_path / "out", [1])
    chosen = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=chosen
    )
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapters-peft")
    model.train()  # without which bitsandbytes computes in bfloat16 on some CPUs
    with torch.no_grad():
        found = model(torch.from_numpy(TOKENS[None]).long()).logits.numpy()
    np.testing.assert_allclose(found, TORCH.logits(one.split, TOKENS[None]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("tuning, kept_as", [("lora", torch.uint8), ("dora", torch.bfloat16)])
def test_a_folder_that_bitsandbytes_packed_is_a_base_as_it_is(tuning, kept_as, tmp_path):
    folder, written = folders(tmp_path, "bfloat16, biases")
    packed = stored(folder, tmp_path / "packed", kept_as)
    one, other = student(TORCH, packed, tuning), student(TORCH, written, tuning)
    assert one.parameters == other.parameters
    losses = trained(one)
    assert losses == pytest.approx(trained(other), rel=1e-2)  # the scales were rounded in turn
    one.export(tmp_path / "out", [1])
    wanted = TORCH.logits(one.split, TOKENS[None])
    np.testing.assert_allclose(logits_of(tmp_path / "out"), wanted, atol=1e-4, rtol=0)
    assert not not_for_mlx_lm(packed) and not not_for_mlx_lm(tmp_path / "out")
    taught = TORCH.load_teacher(packed)
    assert taught.stored_dtype is None and len(nf4.packed_layers(taught.model)) == 14
    for refused, expected in (
        (lambda: student(TORCH, packed, "full"), "they cannot train"),
        (lambda: student(TORCH, packed, bits="nf4"), r'bits = "nf4" asked, .*in 4 bits: set 0'),
        (lambda: TORCH.load_teacher(packed, "nf4"), r'bits = "nf4" asked, .*in 4 bits: set 0'),
        (lambda: student(MLX, packed), "as bitsandbytes packs it, which MLX does not have"),
        (lambda: MLX.load_teacher(packed), "as bitsandbytes packs it, which MLX does not have"),
    ):
        with pytest.raises(ModelError, match=expected):
            refused()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_teacher_and_student_are_the_same_model(dtype, tmp_path):
    """Also after answers without gradients, for which bitsandbytes packs anew on some CPUs."""
    folder, written = folders(tmp_path, "bfloat16, biases")
    backend = choose_backend("torch")
    taught = backend.load_teacher(folder, "t", "nf4", dtype)
    one = student(TORCH, folder, bits="nf4", compute_dtype=dtype)
    with torch.no_grad(), one.precision():
        found, wanted = (TORCH.logits(split, TOKENS[None]) for split in (one.split, taught.split))
    np.testing.assert_array_equal(found, wanted)
    plain = student(TORCH, written, compute_dtype=dtype)
    rel = 1e-5 if dtype == "float32" else 2e-2
    assert trained(one) == pytest.approx(trained(plain), rel=rel)


@TUNING
def test_it_resumes_to_the_bit(tuning, tmp_path):
    folder, _ = folders(tmp_path, "narrow")
    straight, begun = (student(TORCH, folder, tuning, "nf4") for _ in range(2))
    trained(straight, 4)
    trained(begun, 2)
    resumed = student(TORCH, folder, tuning, "nf4")
    with state_of(begun) as state:
        resumed.restore_state(state)
    trained(resumed, 2)
    one, other = kept(straight), kept(resumed)
    assert all(np.array_equal(one[key], other[key]) for key in one)


@TUNING
def test_activations_may_be_computed_again(tuning, tmp_path):
    folder, _ = folders(tmp_path, "tied")
    plain = trained(student(TORCH, folder, tuning, "nf4"))
    again = trained(student(TORCH, folder, tuning, "nf4", gradient_checkpointing=True))
    assert again == pytest.approx(plain, rel=1e-5)


def test_what_cannot_be_is_refused(tmp_path, tiny_recipe, monkeypatch):
    folder, _ = folders(tmp_path, "tied")
    asked = {
        "student": lambda one: student(one, folder, bits="nf4"),
        "teacher": lambda one: one.load_teacher(folder, "nf4"),
    }
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for role, load in asked.items():
        said = f'{role}.quantize_bits = "nf4" asked, '
        with pytest.raises(ModelError, match=f"{said}which MLX does not have: set 4, or use --ba"):
            load(MLX)
        with pytest.raises(
            ModelError, match=f"{said}but bitsandbytes is not installed: .*or set 4"
        ):
            load(TORCH)
    settings = "student.quantize_bits=nf4", "student.quantize_aware_bits=4", "prune.rounds=2"
    expected = r"quantize_bits is set but.*only with tuning = \"lora\" or \"dora\""
    for some in (settings[:1], settings[:2], (settings[0], *settings[2:], "prune.channels=8")):
        with pytest.raises(RecipeError, match=expected):
            load_recipe(tiny_recipe, some)
