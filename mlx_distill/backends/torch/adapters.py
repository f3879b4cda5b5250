"""LoRA and DoRA on a student of transformers, by peft: added to its layers, named as mlx-lm names
them, and fused into their matrices again.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlx_distill.backends.adapters import adapted_paths, initial_matrix
from mlx_distill.backends.torch import nf4
from mlx_distill.backends.torch.affine import (
    Affine,
    TiedHead,
    dequantise,
    quantise,
    show_matrices,
)
from mlx_distill.backends.torch.model import SplitModel
from mlx_distill.backends.torch.weights import stored_weights
from mlx_distill.recipe.tables import StudentTable

LORA_PARTS = {
    "lora_A.default.weight": "lora_a",
    "lora_B.default.weight": "lora_b",
    "lora_magnitude_vector.default.weight": "m",
}


def add_adapters(split: SplitModel, table: StudentTable, seed: int) -> None:
    """Freeze the model and add peft's LoRA or DoRA to the layers that `adapted_paths` chooses;
    lora_A is `initial_matrix`, lora_B zero.
    """
    model = split.model.requires_grad_(False)
    linear = {
        id(module): path for path, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    blocks = [
        [linear[id(module)] for module in block.modules() if id(module) in linear]
        for block in split.layers
    ]
    paths = adapted_paths(blocks, table, split.name)
    if table.tuning == "dora":
        show_matrices(model, paths)
    peft = _peft()
    config = peft.LoraConfig(
        r=table.rank,
        lora_alpha=table.alpha,
        target_modules=paths,
        use_dora=table.tuning == "dora",
        lora_dropout=0.0,
        bias="none",
    )
    peft.inject_adapter_in_model(config, model)
    for path, module in adapted_modules(model).items():
        # autocast casts lora's matrices, which are small; dora's norms stay in float32
        module.cast_input_dtype_enabled = table.tuning == "dora"
        weight = module.lora_A.default.weight
        matrix = initial_matrix((weight.shape[1], weight.shape[0]), path, seed)
        weight.data = torch.from_numpy(matrix.T.copy()).to(weight.device)
        module.lora_B.default.weight.data = module.lora_B.default.weight.data.float()
        if table.tuning == "dora":  # peft's norms are rounded as the weights are
            module.lora_magnitude_vector.default.weight.data = _numbers(module.base_layer).norm(
                dim=1
            )


def _numbers(linear: nn.Module) -> Tensor:
    """A frozen layer's matrix in float32."""
    if isinstance(linear, Affine):
        packed = linear.packed, linear.scales.float(), linear.biases.float()
        return dequantise(*packed, linear.packing)
    return nf4.matrix(linear) if nf4.is_packed(linear.weight) else linear.weight.detach().float()


def _peft() -> Any:
    """peft, imported only where adapters are added: it takes longer than a small run's first step."""
    import peft

    return peft


def adapted_modules(model: nn.Module) -> dict[str, Any]:
    """Path → the layer with an adapter, a `peft.tuners.lora.Linear`."""
    return {path: module for path, module in model.named_modules() if hasattr(module, "lora_A")}


def canonical(name: str) -> str:
    """A trained parameter's name in a checkpoint, which is mlx-lm's: `PATH.lora_A.default.weight` →
    `PATH.lora_a`.
    """
    for ours, theirs in LORA_PARTS.items():
        if name.endswith(ours):
            return name.removesuffix(ours) + theirs
    return name


def parameter_count(model: nn.Module) -> int:
    """How many numbers a model holds; packed quantised weights count as what they stand for,
    adapters do not count.
    """
    packed = sum(one.numbers for one in model.modules() if isinstance(one, Affine))
    return packed + sum(
        nf4.numbers(array) for name, array in model.named_parameters() if canonical(name) == name
    )


def is_transposed(name: str) -> bool:
    """Whether a trained parameter is kept transposed: mlx-lm's lora_a is [in, rank], peft's [rank,
    in].
    """
    return canonical(name) != name


def fused_weights(split: SplitModel, base: Path) -> dict[str, Tensor]:
    """Every tensor by its Hugging Face name, adapters fused into the matrices they adapt; the model
    keeps its adapters.

    What has no adapter is as the folder `base` stores it, whatever type the frozen copy is computed
    in; a packed matrix is what it stands for, in float32.
    """
    adapted = adapted_modules(split.model)
    if not adapted:
        return {name: parameter.detach() for name, parameter in split.model.named_parameters()}
    stored = _unpacked_base(split.model, stored_weights(base, split.name))
    return stored | {
        f"{path}.weight": _fused(module, stored[f"{path}.weight"])
        for path, module in adapted.items()
    }


def _unpacked_base(model: nn.Module, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """A folder's tensors, with those in the place of the packed ones that the model computes with,
    whether they are stored packed or were packed on load.
    """
    base = {id(module.base_layer): path for path, module in adapted_modules(model).items()}
    modules = list(model.named_modules())
    packed = {base.get(id(one), path): one for path, one in modules if isinstance(one, Affine)}
    found = dict(stored)
    for path, module in packed.items():
        kept = [found.pop(f"{path}.{part}", None) for part in ("weight", "scales", "biases")]
        weight, scales, biases = quantise(kept[0], module.packing) if kept[1] is None else kept
        numbers = weight.view(torch.int32), scales.float(), biases.float()
        found[f"{path}.weight"] = dequantise(*numbers, module.packing)
    if any(isinstance(one, TiedHead) for _, one in modules):
        found.pop("lm_head.weight", None)  # which was stored all the same
    for path, layer in nf4.packed_layers(model).items():
        name = path.removesuffix(".base_layer") + ".weight"
        found = {key: kept for key, kept in found.items() if not key.startswith(name)}
        found[name] = nf4.matrix(layer)
    return found


@torch.no_grad()
def _fused(module: Any, weight: Tensor) -> Tensor:
    """The matrix that does what a LoRA or DoRA layer over `weight` does, in float32: peft's merge
    adds in the frozen one's type.
    """
    change = module.lora_B.default.weight @ module.lora_A.default.weight * module.scaling["default"]
    fused = weight.float().to(change.device) + change
    if len(module.lora_magnitude_vector):
        fused *= (module.lora_magnitude_vector.default.weight / fused.norm(dim=1))[:, None]
    return fused
