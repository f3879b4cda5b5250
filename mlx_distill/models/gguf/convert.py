"""A Llama- or Qwen-family `.gguf` file becomes a Hugging Face folder.

In: one GGUF file, whatever its quantisation. Out: a folder that mlx-lm and transformers open:
safetensors, `config.json`, `generation_config.json`, `tokenizer.json`, `tokenizer_config.json` with
the chat template. Decided here: the folder appears whole or not at all. What is not understood is
refused by name, because a guess would be a model that runs and is wrong. Reading and dequantising
are the `gguf` package's.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlx_distill.errors import ModelError
from mlx_distill.files import made_whole, one_line, told_as
from mlx_distill.models.gguf.config import generation_config, model_config
from mlx_distill.models.gguf.file import GGUFFile, read_gguf
from mlx_distill.models.gguf.tensors import check_shapes, number_type, read_tensor, tensor_names
from mlx_distill.models.gguf.tokenizer import build_tokenizer, tokenizer_config
from mlx_distill.models.shards import write_shards

CONVERTER_VERSION = 2  # raise it when the output changes: cached conversions are then made again
SHARD_BYTES = 4 * 1000**3
DType = Literal["auto", "float32", "float16"]


def convert(path: Path, folder: Path, dtype: DType = "auto") -> None:
    """Write the Hugging Face folder of a `.gguf` file; `folder` must not exist and appears whole or
    not at all. `dtype` "auto" is `number_type`.

    Needs disk for the weights at 2 or 4 bytes a parameter, and memory for one shard of at most 4 GB
    and one tensor. Raises `NotFound` (no such file) and `ModelError` (unknown architecture, tensor,
    quantisation, rope scaling or pre-tokenizer; damaged file;
    target in the way; disk full).
    """
    if folder.exists():
        raise ModelError(
            f"{folder}: already exists; remove it, or convert {path.name} to another folder"
        )
    file = read_gguf(path)
    names = tensor_names(file)
    check_shapes(file)
    tokenizer = build_tokenizer(file)
    number = number_type(file) if dtype == "auto" else np.dtype(dtype).type
    documents = {
        "config.json": model_config(file) | {"torch_dtype": np.dtype(number).name},
        "generation_config.json": generation_config(file),
        "tokenizer_config.json": tokenizer_config(file),
    }
    with _appearing_whole(folder) as partial:
        for name, document in documents.items():
            text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
            (partial / name).write_text(text, encoding="utf-8")
        tokenizer.save(str(partial / "tokenizer.json"))
        write_weights(file, names, number, partial)


def write_weights(
    file: GGUFFile, names: dict[str, str], number: type[np.floating[Any]], folder: Path
) -> None:
    """Safetensors of at most `SHARD_BYTES` each (a larger tensor alone), with an index if several."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    theirs = {ours: name for name, ours in names.items()}
    itemsize = np.dtype(number).itemsize
    sizes = {ours: int(file.tensors[name].n_elements) * itemsize for name, ours in names.items()}

    def save(keys: list[str], path: Path) -> None:
        arrays = {key: _stored(file, theirs[key], number) for key in keys}
        try:
            save_file(arrays, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(one_line(error)) from error

    write_shards(sizes, SHARD_BYTES, folder, save)


def _stored(file: GGUFFile, name: str, number: type[np.floating[Any]]) -> np.ndarray:
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(read_tensor(file, name), number)
    if not np.isfinite(values).all():
        raise file.refused(
            f"tensor {name} has values that are not finite in {np.dtype(number).name}"
        )
    return values


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """A folder to fill that becomes `folder` at the end, or is removed when anything fails.

    Another process that converts the same file may be faster; its folder is as good.
    """
    elsewhere = "set MLX_DISTILL_CACHE to another one"
    try:
        with told_as(ModelError, folder, otherwise=elsewhere):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with made_whole(folder) as partial:
                yield partial
    except ModelError:
        if not folder.is_dir():
            raise
