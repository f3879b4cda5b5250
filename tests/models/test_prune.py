"""A pruned folder is, in transformers, the model it was cut from with the parts that went switched
off."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, TOKENS, transformers_logits
from safetensors.torch import load_file, save_file

from mlx_distill.errors import ModelError
from mlx_distill.models.prune import Kept, Sizes, evenly, prune, pruned_config

TOLERANCE = 1e-5  # of the logits' standard deviation
LAYERS = (0, 2, 3)
EVERY_WINDOW = (
    "llama-tied",
    "mistral-window",
    "qwen2-window",
    "qwen3-window",
    "smollm3",
    "smollm3-every-second",
    "gemma2-window",
    "cohere2",
    "phi3-longrope",
    "granite",
)
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """Name of a family → its folder, made once."""
    root = tmp_path_factory.mktemp("families")

    def made(name: str) -> Path:
        return root / name if (root / name).exists() else FAMILIES[name].save(root / name)

    return made


def kept_places(stay: int, of: int) -> dict[int, np.ndarray]:
    """Others in each layer that stays, in order."""
    random = np.random.default_rng(1)
    return {layer: np.sort(random.permutation(of)[:stay]) for layer in LAYERS}


def switched_off(path: Path, kept: Kept) -> np.ndarray:
    """The logits of the whole model whose other blocks hand on what they are given, and whose other
    channels and heads reach nothing."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    sizes = Sizes.of(json.loads((path / "config.json").read_text()), "m")
    for number, layer in enumerate(model.model.layers):
        if number not in kept.layers:
            layer.forward = lambda hidden_states, *_, **__: hidden_states
            continue
        for found, matrix, width in (
            (kept.channels, "mlp.down_proj", 1),
            (kept.kv_heads, "self_attn.o_proj", sizes.queries_a_head * sizes.head_dim),
        ):
            if found:
                weight = layer.get_submodule(matrix).weight.data
                stay = np.isin(np.arange(weight.shape[1]) // width, found[number])
                weight[:, torch.from_numpy(~stay)] = 0
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


def assert_same(path: Path, target: Path, kept: Kept) -> None:
    prune(path, target, kept, "m")
    wanted = switched_off(path, kept)
    assert np.abs(transformers_logits(target) - wanted).max() / wanted.std() < TOLERANCE
    whole = transformers_logits(path)
    assert np.abs(whole - wanted).max() / whole.std() > 0.1  # something went


@pytest.mark.parametrize("name", EVERY_WINDOW)
def test_blocks_that_stay_are_what_they_were_at_their_place(name: str, folder, tmp_path: Path):
    assert_same(folder(name), tmp_path / "pruned", Kept(LAYERS))


@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "mistral", "gemma2"])
def test_a_narrower_model_is_the_whole_one_with_columns_of_zero(name: str, folder, tmp_path: Path):
    kept = Kept(LAYERS, kept_places(40, 96), kept_places(1, 2))
    assert_same(folder(name), tmp_path / "pruned", kept)


@pytest.mark.parametrize("part", ["float32", "bfloat16", "float16"])
def test_numbers_stay_bit_for_bit_in_their_format(part: str, folder, tmp_path: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder("llama"), dtype=getattr(torch, part)
    )
    model.save_pretrained(tmp_path / "base")
    before = load_file(tmp_path / "base" / "model.safetensors")
    channels = kept_places(32, 96)
    prune(tmp_path / "base", tmp_path / "pruned", Kept(LAYERS, channels))
    after = load_file(tmp_path / "pruned" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {getattr(torch, part)}
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    name = "model.layers.{}.mlp.down_proj.weight"
    wanted = before[name.format(3)][:, torch.from_numpy(channels[3])]
    assert torch.equal(after[name.format(2)], wanted)
    assert not any(key.startswith("model.layers.3.") for key in after)


def test_even_distances_begin_with_the_first():
    assert evenly(30, 15) == tuple(range(0, 30, 2))
    assert evenly(7, 3) == (0, 2, 4)
    assert evenly(4, 4) == (0, 1, 2, 3)


def test_a_plan_knows_the_sizes_without_weights(folder, tmp_path: Path):
    path = folder("llama")
    prune(path, tmp_path / "pruned", Kept(LAYERS, kept_places(32, 96), kept_places(1, 2)))
    config = json.loads((path / "config.json").read_text())
    written = json.loads((tmp_path / "pruned" / "config.json").read_text())
    said = pruned_config(config, "m", 3, 32, 1)
    sizes = ("num_hidden_layers", "intermediate_size", "num_attention_heads", "head_dim")
    assert [said[key] for key in sizes] == [written[key] for key in sizes] == [3, 32, 2, 16]


@pytest.mark.parametrize(
    "name, kept, said",
    [
        ("phi3", {"channels": kept_places(32, 96)}, "is not of a gated MLP or an attention with"),
        ("qwen2", {"kv_heads": kept_places(1, 2)}, "has no head_dim of its own"),
    ],
)
def test_what_cannot_be_narrowed_is_refused(
    name: str, kept: dict, said: str, folder, tmp_path: Path
):
    with pytest.raises(ModelError, match=said):
        prune(folder(name), tmp_path / "pruned", Kept(LAYERS, **kept), "m")
    assert not list(tmp_path.iterdir())


def test_a_norm_over_all_heads_cannot_be_narrowed(folder, tmp_path: Path):
    path = tmp_path / "base"
    shutil.copytree(folder("qwen3"), path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(64)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"q_norm\.weight is not of"):
        prune(path, tmp_path / "pruned", Kept(LAYERS, kv_heads=kept_places(1, 2)))
