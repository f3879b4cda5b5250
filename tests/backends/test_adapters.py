"""Which layers are adapted, with which matrices, and the two layouts on disk: what both backends
rely on, without a model.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_distill.backends.adapters import adapted_paths, initial_matrix, write_adapters
from mlx_distill.errors import ModelError
from mlx_distill.recipe.tables import StudentTable

BLOCKS = [
    [f"model.layers.{number}.{name}" for name in ("attn.q_proj", "attn.v_proj", "mlp.up_proj")]
    for number in range(3)
]


def paths(layers: int, *targets: str) -> list[str]:
    return adapted_paths(
        BLOCKS, StudentTable(tuning="lora", lora_layers=layers, lora_targets=targets), "m"
    )


def test_the_last_blocks_are_adapted_and_zero_is_all():
    assert paths(2, "q_proj") == ["model.layers.1.attn.q_proj", "model.layers.2.attn.q_proj"]
    assert (
        paths(0, "q_proj")
        == paths(3, "q_proj")
        == [f"model.layers.{number}.attn.q_proj" for number in range(3)]
    )
    assert paths(1, "up_proj", "q_proj") == [
        "model.layers.2.attn.q_proj",
        "model.layers.2.mlp.up_proj",
    ]  # the model's order


def test_a_target_is_a_whole_name():
    with pytest.raises(
        ModelError,
        match=r"^m: lora_targets proj not found in its blocks; it has q_proj, up_proj, v_proj$",
    ):
        paths(0, "proj", "q_proj")


def test_only_the_blocks_that_are_adapted_count():
    mixed = [["model.layers.0.mlp.gate"], ["model.layers.1.mlp.up_proj"]]
    table = StudentTable(tuning="lora", lora_layers=1, lora_targets=["gate"])
    with pytest.raises(
        ModelError, match=r"^m: lora_targets gate not found in its blocks; it has up_proj$"
    ):
        adapted_paths(mixed, table, "m")


def test_initial_matrices_are_these_numbers():
    """Frozen: a checkpoint, a run and a rerun on another machine start from them."""
    found = initial_matrix((4, 2), "model.layers.0.self_attn.q_proj", 7)
    assert found.dtype == np.float32 and np.abs(found).max() <= 0.5
    expected = [
        [0.45149409770965576, -0.39914754033088684],
        [-0.17983947694301605, -0.4807570278644562],
        [0.29248929023742676, 0.06381139904260635],
        [-0.13410578668117523, 0.15925686061382294],
    ]
    np.testing.assert_array_equal(found, np.array(expected, np.float32))


def test_initial_matrices_differ_by_seed_and_path():
    drawn = [initial_matrix((64, 4), path, seed) for path in ("a.q", "a.k") for seed in (0, 1)]
    assert len({matrix.tobytes() for matrix in drawn}) == 4
    assert all(0.9 / 8 < np.abs(matrix).max() <= 1 / 8 for matrix in drawn)


@pytest.mark.parametrize("tuning", ["lora", "dora"])
def test_two_layouts_of_the_same_arrays(tuning: str, tmp_path: Path):
    table = StudentTable(tuning=tuning, rank=2, alpha=6.0, lora_layers=1, lora_targets=["q_proj"])
    path, random = "model.layers.2.attn.q_proj", np.random.default_rng(0)
    arrays = {
        f"{path}.{name}": random.normal(size=shape).astype(np.float32)
        for name, shape in (("lora_a", (8, 2)), ("lora_b", (2, 5)))
    }
    if tuning == "dora":
        arrays[f"{path}.m"] = random.normal(size=5).astype(np.float32)
    write_adapters(tmp_path, arrays, table, 3, "org/base")

    kept = load_file(tmp_path / "adapters" / "adapters.safetensors")
    assert kept.keys() == arrays.keys() and all(
        np.array_equal(kept[key], arrays[key]) for key in arrays
    )
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    parameters = {"rank": 2, "scale": 3.0, "dropout": 0.0, "keys": ["attn.q_proj"]}
    assert config == {"fine_tune_type": tuning, "num_layers": 1, "lora_parameters": parameters}

    kept = load_file(tmp_path / "adapters-peft" / "adapter_model.safetensors")
    names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
    expected = {
        f"base_model.model.{path}.{names[key.rpartition('.')[2]]}": array.T
        for key, array in arrays.items()
    }
    assert kept.keys() == expected.keys() and all(
        np.array_equal(kept[key], expected[key]) for key in expected
    )
    config = json.loads((tmp_path / "adapters-peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"], config["target_modules"]) == (
        2,
        6.0,
        tuning == "dora",
        [path],
    )
    assert config["base_model_name_or_path"] == "org/base" and config["inference_mode"]


def test_all_blocks_are_counted_for_mlx_lm(tmp_path: Path):
    table = StudentTable(tuning="lora", rank=1)
    write_adapters(
        tmp_path, {"model.layers.0.q.lora_a": np.zeros((2, 1), np.float32)}, table, 28, "m"
    )
    assert (
        json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["num_layers"] == 28
    )
