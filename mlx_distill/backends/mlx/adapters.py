"""LoRA and DoRA on a student of mlx-lm: added to its layers, and fused into their matrices again."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_distill.backends.adapters import adapted_paths, initial_matrix
from mlx_distill.backends.mlx.model import SplitModel
from mlx_distill.backends.mlx.weights import stored_weights
from mlx_distill.recipe.tables import StudentTable


def add_adapters(split: SplitModel, table: StudentTable, seed: int) -> None:
    """Freeze the model and add LoRA or DoRA to the layers that `adapted_paths` chooses; lora_a is
    `initial_matrix`, lora_b zero.
    """
    model = split.model
    model.freeze()
    linear = {
        id(module): path for path, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    blocks = [
        [linear[id(module)] for _, module in block.named_modules() if id(module) in linear]
        for block in split.layers
    ]
    paths = adapted_paths(blocks, table, split.name)
    keys = {
        path
        for block in split.layers
        for path, module in block.named_modules()
        if linear.get(id(module)) in paths
    }
    config = {"rank": table.rank, "scale": table.alpha / table.rank, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, table.lora_layers, config, use_dora=table.tuning == "dora")
    for path, module in model.named_modules():
        if "lora_a" in module:
            module.lora_a = mx.array(initial_matrix(module.lora_a.shape, path, seed))


def fused_weights(model: nn.Module, base: Path) -> dict[str, mx.array]:
    """Every tensor by its Hugging Face name, adapters fused into the matrices they adapt; the model
    keeps its adapters.

    What has no adapter is as the folder `base` stores it, whatever type the frozen copy is computed
    in.
    """
    adapted = {path: module for path, module in model.named_modules() if "lora_a" in module}
    if not adapted:
        return dict(tree_flatten(model.parameters()))
    stored = stored_weights(base)
    return stored | {
        f"{path}.weight": _fused(module, stored[f"{path}.weight"])
        for path, module in adapted.items()
    }


def _fused(module: nn.Module, weight: mx.array) -> mx.array:
    """The matrix that does what a LoRA or DoRA layer over `weight` does, in float32: mlx-lm's
    `fuse` adds in the frozen one's type.
    """
    frozen = module.linear.weight
    module.linear.weight = weight.astype(mx.float32)
    fused = module.fuse()
    module.linear.weight = frozen
    return fused.weight
