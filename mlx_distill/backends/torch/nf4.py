"""bitsandbytes' four bits: each 64 numbers of a matrix as steps of a normal distribution's quantiles,
NF4, times a float32 scale (QLoRA, Dettmers et al. 2023).

In: a model of transformers. Out: the same, in which bitsandbytes holds the matrices and multiplies
with them, on a CPU too. Decided here: all linear layers but the head are packed, as transformers
packs them; the scales are not packed in turn, unless a folder stores them so; and a layer computes
with the same numbers with and without gradients.
"""

import copy
import logging
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from mlx_distill.backends import refusals

# It warns on CPUs of a kernel that nothing here uses, whichever library imports it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def library(name: str, field: str = "") -> Any:
    """bitsandbytes, which `field` asks for, or else the folder; `ModelError` where it is missing."""
    try:
        import bitsandbytes
    except ImportError:
        raise refusals.no_bitsandbytes(name, field) from None
    return bitsandbytes


def options(name: str) -> dict[str, Any]:
    """What `from_pretrained` needs to pack a teacher while it reads it."""
    library(name, "teacher.quantize_bits")
    chosen = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return {"quantization_config": chosen}


def quantise_model(model: transformers.PreTrainedModel, device: torch.device, name: str) -> None:
    """Pack a student's base as `options` has a teacher packed, layer by layer on `device`."""
    bitsandbytes = library(name, "student.quantize_bits")
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            packed = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, False, device="meta"
            )
            packed.weight = bitsandbytes.nn.Params4bit(
                module.weight.detach(),
                compress_statistics=False,
                quant_type="nf4",
                module=packed,
            ).to(device)
            packed.bias = module.bias
            model.set_submodule(path, packed)
    compute_in(model, model.dtype)


def packed_layers(model: nn.Module) -> dict[str, Any]:
    """Path → bitsandbytes' layer."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_packed(module._parameters.get("weight"))
    }


def is_packed(parameter: Tensor | None) -> bool:
    """Whether a parameter holds packed numbers, without importing bitsandbytes."""
    return type(parameter).__name__ == "Params4bit"


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Have packed layers multiply in `dtype`, forwards and backwards with the same numbers."""
    for layer in packed_layers(model).values():
        layer.compute_dtype, layer.compute_type_is_set = dtype, True
        layer.weight.quant_state.dtype = dtype
        # Without gradients it would pack them anew for some CPUs: with scales in bfloat16, and
        # without a way back for training.
        layer.support_avx512bf16_for_cpu = False


def matrix(layer: Any) -> Tensor:
    """[rows, width] in float32, on the layer's device."""
    import bitsandbytes

    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32
    found: Tensor = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
    return found


def numbers(parameter: Tensor) -> int:
    """How many a parameter has, packed or not."""
    return parameter.quant_state.shape.numel() if is_packed(parameter) else parameter.numel()


def stored_parts(model: nn.Module) -> dict[str, Tensor]:
    """What packed layers hold beside their integers, by the names that it is stored under."""
    return {
        f"{path}.weight.{part}": tensor
        for path, layer in packed_layers(model).items()
        for part, tensor in layer.weight.quant_state.as_dict(packed=True).items()
    }
