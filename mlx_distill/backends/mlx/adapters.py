"""LoRA and DoRA on a student of mlx-lm: added to its layers, and fused into their matrices again."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_distill.backends.adapters import adapted_paths, initial_matrix
from mlx_distill.backends.mlx.model import SplitModel, unpacked
from mlx_distill.backends.mlx.weights import stored_weights
from mlx_distill.recipe.tables import StudentTable


def add_adapters(split: SplitModel, table: StudentTable, seed: int) -> None:
    """Freeze the model and add LoRA or DoRA to the layers that `adapted_paths` chooses; lora_a is
    `initial_matrix`, lora_b zero.
    """
    model = split.model
    model.freeze()
    linear = {
        id(module): path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.QuantizedLinear)
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
        if "lora_a" not in module:
            continue
        frozen = module.linear
        width = unpacked(frozen).shape[1]  # mlx-lm's DoRA takes another one for 6 bits
        module.lora_a = mx.array(initial_matrix((width, table.rank), path, seed))
        if "m" in module and "scales" in frozen:  # which mlx-lm rounds as the scales are
            module.m = mx.linalg.norm(unpacked(frozen, mx.float32), axis=1)


def fused_weights(model: nn.Module, base: Path) -> dict[str, mx.array]:
    """Every tensor by its Hugging Face name, adapters fused into the matrices they adapt; the model
    keeps its adapters.

    What has no adapter is as the folder `base` stores it, whatever type the frozen copy is computed
    in; a packed matrix is what it stands for, in float32.
    """
    adapted = {path: module for path, module in model.named_modules() if "lora_a" in module}
    if not adapted:
        return dict(tree_flatten(model.parameters()))
    stored = _unpacked_base(model, stored_weights(base))
    return stored | {
        f"{path}.weight": _fused(module, stored[f"{path}.weight"])
        for path, module in adapted.items()
    }


def _fused(module: nn.Module, weight: mx.array) -> mx.array:
    """The matrix that does what a LoRA or DoRA layer over `weight` does, in float32: mlx-lm's
    `fuse` adds in the frozen one's type.
    """
    frozen, module.linear = module.linear, nn.Linear(1, 1, bias=False)
    module.linear.weight = weight.astype(mx.float32)
    fused = module.fuse()
    module.linear = frozen
    return fused.weight


def _unpacked_base(model: nn.Module, stored: dict[str, mx.array]) -> dict[str, mx.array]:
    """A folder's tensors, with those in the place of the packed ones that the model computes with,
    whether they are stored packed or were packed on load.
    """
    modules = list(model.named_modules())
    base = {id(module.linear): path for path, module in modules if "lora_a" in module}
    packed = {base.get(id(one), path): one for path, one in modules if "scales" in one}
    found = dict(stored)
    for path, module in packed.items():
        sizes = module.group_size, module.bits
        kept = [found.pop(f"{path}.{part}", None) for part in ("weight", "scales", "biases")]
        weight, scales, biases = mx.quantize(kept[0], *sizes) if kept[1] is None else kept
        numbers = scales.astype(mx.float32), biases.astype(mx.float32)
        found[f"{path}.weight"] = mx.dequantize(weight, *numbers, *sizes)
    if packed and not any(path == "lm_head" for path, _ in modules):
        found.pop("lm_head.weight", None)  # a tied one that was stored all the same
    return found
