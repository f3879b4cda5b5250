"""Weights as files: which tensors go into which, and the index that says so."""

from typing import Any


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
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{count:05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def places_in(shards: dict[str, list[str]]) -> dict[str, str]:
    """Tensor → file."""
    return {name: file for file, names in shards.items() for name in sorted(names)}


def index_of(places: dict[str, str], size: int) -> dict[str, Any]:
    """What `model.safetensors.index.json` holds; `size` is all tensors' bytes."""
    return {"metadata": {"total_size": size}, "weight_map": places}
