"""A student's folder in Hugging Face layout: safetensors in shards, and the base model's config and tokenizer files.

The tensors are a framework's own; `save` writes a file of them. Decided here: names, shards, dtype and stop ids in the configs.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHARD_BYTES = 5 * 2**30
COPIED = (".json", ".jinja", ".txt", ".model")


def save_folder(
    tensors: dict[str, Any], save: Callable[[dict[str, Any], Path], None], base: Path, folder: Path, dtype: str, stop_ids: list[int],
) -> None:
    """Write `tensors` (name → array with `nbytes`) beside copies of `base`'s other files.

    `dtype` ("" = as the base says) goes into `config.json`; `generation_config.json` stops on every id of `stop_ids`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        if file.suffix in COPIED and not file.name.startswith("model.safetensors"):
            shutil.copy(file, folder)
    shards = _shards(tensors)
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else ["model.safetensors"]
    for shard, file in zip(shards, names, strict=True):
        save(shard, folder / file)
    if count > 1:
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
                 "weight_map": {key: file for shard, file in zip(shards, names, strict=True) for key in sorted(shard)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    _write_configs(folder, dtype, stop_ids)


def _shards(tensors: dict[str, Any]) -> list[dict[str, Any]]:
    """In order, each of at most `SHARD_BYTES` unless one tensor alone is larger."""
    shards: list[dict[str, Any]] = [{}]
    filled = 0
    for key, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled += tensor.nbytes
    return shards


def _write_configs(folder: Path, dtype: str, stop_ids: list[int]) -> None:
    config = json.loads((folder / "config.json").read_text())
    if dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    config["eos_token_id"] = stop_ids
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(generation | {"eos_token_id": stop_ids}, indent=2))
