"""The tensors of a model on torch: counted, cast, read from a folder and written into one."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mlx_distill.backends import export
from mlx_distill.backends.torch import nf4
from mlx_distill.backends.torch.affine import cast_packed
from mlx_distill.models.weights import read_weights


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """The frozen arrays as `dtype`, the adapters as float32."""
    for parameter in model.parameters():
        if not nf4.is_packed(parameter):
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    cast_packed(model, dtype)
    nf4.compute_in(model, dtype)


def stored_weights(folder: Path, name: str = "") -> dict[str, Tensor]:
    """The tensors of a model folder's files, buffers of rotary embeddings left out."""
    files = read_weights(folder, name or str(folder)).files
    stored = {key: value for file in files for key, value in load_file(file).items()}
    return {key: value for key, value in stored.items() if "rotary_emb.inv_freq" not in key}


def save_folder(
    weights: dict[str, Tensor],
    base: Path,
    folder: Path,
    dtype: torch.dtype | None,
    stop_ids: list[int],
) -> None:
    """A Hugging Face folder; dtype None keeps each tensor's type in the base model."""
    tensors = {
        key: value.to("cpu", dtype or value.dtype).contiguous() for key, value in weights.items()
    }
    export.save_folder(
        tensors, _save, base, folder, str(dtype).rpartition(".")[2] if dtype else "", stop_ids
    )


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
