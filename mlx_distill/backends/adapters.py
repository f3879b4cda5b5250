"""LoRA and DoRA as every backend means them: which layers, which initial matrices, and the two
layouts they are kept in.

In: the linear layers of a model by block, and the recipe's `[student]` table. Out: the paths to
adapt, numpy matrices, folders that mlx-lm and peft read. An adapter is held here in mlx-lm's names
and shapes: `PATH.lora_a` [in, rank], `PATH.lora_b` [rank, out] and, for DoRA, `PATH.m` [out].
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mlx_distill.errors import ModelError
from mlx_distill.recipe.tables import StudentTable

Arrays = dict[str, np.ndarray]


def adapted_paths(blocks: Sequence[Sequence[str]], table: StudentTable, name: str) -> list[str]:
    """The layers to adapt of `blocks`, each the paths of its linear layers: `lora_targets` of the
    last `lora_layers` (0 = all).

    Raises `ModelError` where there are fewer blocks, or none has a layer of that name.
    """
    if table.lora_layers > len(blocks):
        raise ModelError(
            f"{name}: lora_layers = {table.lora_layers} asked, but it has {len(blocks)} blocks; 0 "
            "adapts all"
        )
    paths = [path for block in blocks[-table.lora_layers :] for path in block]
    names = {_last(path) for path in paths}
    if unknown := set(table.lora_targets) - names:
        raise ModelError(
            f"{name}: lora_targets {', '.join(sorted(unknown))} not found in its blocks; it has "
            f"{', '.join(sorted(names))}"
        )
    return [path for path in paths if _last(path) in table.lora_targets]


def initial_matrix(shape: tuple[int, int], path: str, seed: int) -> np.ndarray:
    """lora_a [in, rank]: uniform in ±1/sqrt(in) (mlx-lm's rule), float32, drawn from the seed and
    the layer's path; lora_b is zero.
    """
    bound = 1 / np.sqrt(shape[0])
    return (
        np.random.default_rng([seed, *path.encode()])
        .uniform(-bound, bound, shape)
        .astype(np.float32)
    )


def write_adapters(
    folder: Path, arrays: Arrays, table: StudentTable, blocks: int, base: str
) -> None:
    """`folder/adapters` as mlx-lm reads it and `folder/adapters-peft` as peft does; `blocks` is how
    many the model has.
    """
    for name, layout in (
        ("adapters", _mlx_lm(arrays, table, blocks)),
        ("adapters-peft", _peft(arrays, table, base)),
    ):
        file, tensors, config = layout
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / name / file, metadata={"format": "pt"})
        (folder / name / "adapter_config.json").write_text(json.dumps(config, indent=2))


def _mlx_lm(arrays: Arrays, table: StudentTable, blocks: int) -> tuple[str, Arrays, dict]:
    keys = sorted({_relative(path) for path in _paths(arrays)})
    parameters = {
        "rank": table.rank,
        "scale": table.alpha / table.rank,
        "dropout": 0.0,
        "keys": keys,
    }
    config = {
        "fine_tune_type": table.tuning,
        "num_layers": table.lora_layers or blocks,
        "lora_parameters": parameters,
    }
    return "adapters.safetensors", arrays, config


PEFT_NAMES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}


def _peft(arrays: Arrays, table: StudentTable, base: str) -> tuple[str, Arrays, dict]:
    tensors = {}
    for name, array in arrays.items():
        path, _, part = name.rpartition(".")
        tensors[f"base_model.model.{path}.{PEFT_NAMES[part]}"] = np.ascontiguousarray(array.T)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": table.rank,
        "lora_alpha": table.alpha,
        "target_modules": sorted(_paths(arrays)),
        "use_dora": table.tuning == "dora",
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    return "adapter_model.safetensors", tensors, config


def _paths(arrays: Arrays) -> set[str]:
    return {name.rpartition(".")[0] for name in arrays}


def _relative(path: str) -> str:
    """`model.layers.3.self_attn.q_proj` → `self_attn.q_proj`: the path within its block."""
    parts = path.split(".")
    number = next(place for place, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[number + 1 :])


def _last(path: str) -> str:
    return path.rpartition(".")[2]
