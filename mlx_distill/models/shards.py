"""Weights as files: what they are called, which tensors go into which, and the index that says so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

WEIGHT_FILES = "model*.safetensors"  # what mlx-lm loads; no adapters, no consolidated.safetensors
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def write_shards(
    sizes: dict[str, int], most: int, folder: Path, save: Callable[[list[str], Path], None]
) -> None:
    """Let `save` write the tensors of each file of `in_shards`, and write the index if there are
    several.
    """
    shards = in_shards(sizes, most)
    for file, names in shards.items():
        save(names, folder / file)
    if len(shards) > 1:
        places = {name: file for file, names in shards.items() for name in sorted(names)}
        text = json.dumps(index_of(places, sum(sizes.values())), indent=2, ensure_ascii=False)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def in_shards(sizes: dict[str, int], most: int) -> dict[str, list[str]]:
    """File name → names of its tensors, in order; `sizes` are their bytes.

    A file holds at most `most` bytes unless one tensor alone is larger; a single one is
    `model.safetensors`.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    count = len(shards)
    if count == 1:
        return {WHOLE: shards[0]}
    return {f"model-{i:05d}-of-{count:05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def index_of(places: dict[str, str], size: int) -> dict[str, Any]:
    """What the index holds: of each tensor its file; `size` is all tensors' bytes."""
    return {"metadata": {"total_size": size}, "weight_map": places}
