"""The tensors of a model on MLX: counted, cast, read from a folder and written into one."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from mlx_distill.backends import export, refusals
from mlx_distill.backends.failures import refuse_of_device
from mlx_distill.models.weights import read_weights


def parameter_count(model: nn.Module) -> int:
    """How many numbers a model holds; packed quantised weights count as what they stand for."""
    return mlx_lm.utils.get_total_parameters(model)


def cast_frozen(model: nn.Module, dtype: mx.Dtype) -> None:
    """The frozen arrays as `dtype`, the adapters untouched."""
    trained = dict(tree_flatten(model.trainable_parameters()))
    frozen = [(key, array) for key, array in tree_flatten(model.parameters()) if key not in trained]
    model.update(cast(tree_unflatten(frozen), dtype), strict=False)


def in_the_place_of(tree: dict, arrays: dict[str, mx.array]) -> dict:
    """A tree like this one, in its order, of the arrays by their paths. (`tree_unflatten` takes a key
    that is a number, as of a layer whose states are compared, for a place in a list.)
    """
    return tree_map_with_path(lambda path, _: arrays[path], tree)


def cast(parameters: dict, dtype: mx.Dtype, but: str = "") -> dict:
    """The tree with its floating-point arrays as `dtype`, the one at the path `but` left alone."""

    def as_asked(path: str, array: mx.array) -> mx.array:
        keeps = path == but or not mx.issubdtype(array.dtype, mx.floating)
        return array if keeps else array.astype(dtype)

    return tree_map_with_path(as_asked, parameters)


def stored_weights(folder: Path, name: str = "") -> dict[str, mx.array]:
    """The tensors of a model folder's files, buffers of rotary embeddings left out."""
    files = read_weights(folder, name or str(folder)).files
    try:
        stored = {key: value for file in files for key, value in mx.load(str(file)).items()}
    except RuntimeError as error:  # formats that MLX does not have, float64 among them
        refuse_of_device(f"loading {name or folder}", error)
        raise refusals.unloadable(name or str(folder), folder, "mlx", error) from None
    return {key: value for key, value in stored.items() if "rotary_emb.inv_freq" not in key}


def save_folder(
    weights: dict[str, mx.array],
    base: Path,
    folder: Path,
    dtype: mx.Dtype | None,
    stop_ids: list[int],
) -> None:
    """A Hugging Face folder; dtype None keeps each tensor's type in the base model."""
    tensors = {key: value.astype(dtype) if dtype else value for key, value in weights.items()}
    export.save_folder(
        tensors, _save, base, folder, str(dtype).rpartition(".")[2] if dtype else "", stop_ids
    )


def _save(tensors: dict[str, mx.array], file: Path) -> None:
    mx.save_safetensors(str(file), tensors, metadata={"format": "pt"})
