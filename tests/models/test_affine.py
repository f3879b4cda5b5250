"""MLX's affine format on torch: the same integers, the same numbers, the same models."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch
from families import FAMILIES, TOKENS

from mlx_distill.backends.mlx import loading as mlx_loading
from mlx_distill.backends.torch import loading as torch_loading
from mlx_distill.backends.torch.affine import (
    BITS,
    AffineEmbedding,
    AffineLinear,
    Packing,
    TiedHead,
    become,
    dequantise,
    quantise,
    unpack,
)
from mlx_distill.backends.torch.teacher import TorchTeacher
from mlx_distill.errors import ModelError

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# one of each kind of head and embedding: plain, tied, biased, scaled embedding, capped logits
KINDS = ("llama", "llama-tied", "qwen2", "gemma2", "phi", "cohere", "starcoder2")


def matrix(dtype: str) -> tuple[mx.array, torch.Tensor]:
    """Groups of all signs, of zeros and of one number."""
    values = np.random.default_rng(0).normal(size=(7, 256)).astype(np.float32)
    values[0, :64], values[1] = 0, 1.5
    values[2], values[3] = np.abs(values[2]), -np.abs(values[3])
    return mx.array(values).astype(getattr(mx, dtype)), torch.from_numpy(values).to(DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_integers_scales_and_numbers_are_those_of_mx_quantize(dtype, bits, group_size):
    theirs, ours = matrix(dtype)
    stored = mx.quantize(theirs, group_size, bits)
    found = quantise(ours, Packing(bits, group_size))
    np.testing.assert_array_equal(np.array(stored[0]).view(np.int32), found[0])
    for one, other in zip(stored[1:], found[1:], strict=True):
        np.testing.assert_array_equal(np.array(one.astype(mx.float32)), other.float())
    numbers = np.array(mx.dequantize(*stored, group_size, bits).astype(mx.float32))
    ours = dequantise(*found, Packing(bits, group_size)).float()
    np.testing.assert_allclose(ours, numbers, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_undone(bits: int):
    """By a definition of its own: the lowest bits first, across bytes and words."""
    weight = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32))
    packed, *_ = quantise(weight, Packing(bits, 32))
    stream = np.unpackbits(packed.numpy().view(np.uint8), axis=1, bitorder="little")
    integers = stream.reshape(3, 64, bits) @ (1 << np.arange(bits))
    np.testing.assert_array_equal(unpack(packed, bits), integers)


def test_the_gradient_of_a_product_is_that_of_the_plain_matrix():
    weight = torch.from_numpy(np.random.default_rng(2).normal(size=(5, 64)).astype(np.float32))
    plain = torch.nn.Linear(64, 5, dtype=torch.float32).requires_grad_(False)
    module = become(torch.nn.Linear(64, 5).requires_grad_(False), Packing(4, 64))
    module.hold(*quantise(weight, Packing(4, 64)))
    plain.weight.copy_(module.matrix())
    plain.bias.copy_(module.bias)
    x = torch.from_numpy(np.random.default_rng(3).normal(size=(2, 3, 64)).astype(np.float32))
    found = []
    for one in (module, plain):
        asked = x.clone().requires_grad_(True)
        one(asked).square().sum().backward()
        found.append((one(asked).detach(), asked.grad))
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right)
    assert not [name for name, _ in module.named_parameters() if name != "bias"]


def logits(folder: Path, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Of MLX, and of torch."""
    theirs = mlx_loading.load_teacher(folder, "m", bits)
    ours = torch_loading.load_teacher(folder, "m", bits, CPU, torch.float32)
    with torch.no_grad():
        found = ours.head(ours.hidden(torch.from_numpy(TOKENS))).numpy()
        walked = ours.loss_head().logits(ours.hidden(torch.from_numpy(TOKENS))[0], 40)
    np.testing.assert_allclose(walked, found[0, :, :40], rtol=1e-4, atol=1e-4)
    return np.array(theirs.head(theirs.hidden(mx.array(TOKENS)))), found


def distance(pair: tuple[np.ndarray, np.ndarray]) -> float:
    return np.abs(pair[0] - pair[1]).max() / pair[0].std()


@pytest.mark.parametrize("name", [name for name in FAMILIES if "-" not in name])
def test_a_teacher_quantised_on_load_is_the_same_on_both_backends(name: str, tmp_path: Path):
    folder = FAMILIES[name].save(tmp_path / "m")
    assert distance(logits(folder, 4)) < 1e-3
    if name in KINDS:
        plain = torch_loading.load_teacher(folder, "m", 0, CPU, torch.float32)
        with torch.no_grad():
            whole = plain.head(plain.hidden(torch.from_numpy(TOKENS))).numpy()
        assert distance((whole, logits(folder, 4)[1])) > 0.01  # it is quantised


def stored_by_mlx(folder: Path, place: Path, **options) -> Path:
    """The folder as `mlx_lm.convert -q` writes it."""
    model, config = mlx_lm.utils.load_model(folder)
    model, config = mlx_lm.utils.quantize_model(model, config, 64, 4, **options)
    place.mkdir()
    mlx_lm.utils.save_model(place, model)
    mlx_lm.utils.save_config(config, place / "config.json")
    for file in folder.iterdir():
        if not (place / file.name).exists() and file.suffix != ".safetensors":
            shutil.copy(file, place)
    return place


def mixed(path: str, module: object) -> bool | dict:
    """Heads and embeddings as they are, the MLP in more bits than the rest."""
    if "embed" in path or "head" in path:
        return False
    return {"bits": 6, "group_size": 32} if "mlp" in path else True


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("options", [{}, {"quant_predicate": mixed}], ids=["all", "mixed"])
def test_a_folder_that_mlx_quantised_teaches_on_torch(name: str, options: dict, tmp_path: Path):
    folder = stored_by_mlx(FAMILIES[name].save(tmp_path / "m"), tmp_path / "q", **options)
    assert distance(logits(folder, 0)) < 1e-3
    model = torch_loading.load_teacher(folder, "m", 0, CPU, None).model
    kinds = {type(module) for module in model.modules()}
    assert AffineLinear in kinds and not any(p.requires_grad for p in model.parameters())
    if not options:
        assert any(issubclass(kind, AffineEmbedding) for kind in kinds)
        assert (TiedHead in kinds) == model.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_the_head_that_a_cache_keeps_is_the_one_that_computes(name: str, tmp_path: Path):
    folder = stored_by_mlx(FAMILIES[name].save(tmp_path / "m"), tmp_path / "q")
    split = torch_loading.load_teacher(folder, "m", 0, CPU, torch.float32)
    head = TorchTeacher(split).head_matrix()
    assert head is not None and head.shape == (96, 64)
    hidden = np.random.default_rng(4).normal(size=(3, 64)).astype(np.float32)
    with torch.no_grad():
        wanted = split.head(torch.from_numpy(hidden)).numpy()
    np.testing.assert_allclose(hidden @ head.T, wanted, rtol=1e-4, atol=1e-4)


def test_another_format_of_mlx_is_refused(tmp_path: Path):
    folder = stored_by_mlx(FAMILIES["llama"].save(tmp_path / "m"), tmp_path / "q")
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] |= {"mode": "mxfp4", "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    expected = "lm_head is stored in mode 'mxfp4' with 4 bits in groups of 32.*--backend mlx"
    with pytest.raises(ModelError, match=expected):
        torch_loading.load_teacher(folder, "m", 0, CPU, None)


def test_a_folder_that_lacks_scales_is_refused(tmp_path: Path):
    from safetensors.numpy import load_file, save_file

    folder = stored_by_mlx(FAMILIES["llama"].save(tmp_path / "m"), tmp_path / "q")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.biases"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.biases"):
        torch_loading.load_teacher(folder, "m", 0, CPU, None)
