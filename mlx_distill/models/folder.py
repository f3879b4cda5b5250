"""A model folder's documents: `config.json` and `generation_config.json`.

In: a folder. Out: the documents as dicts. Decided here: what a config cannot be without. `name` is
how a message begins: the model as its user knows it.
"""

from pathlib import Path
from typing import Any

from mlx_distill.errors import ModelError
from mlx_distill.models.shards import WEIGHT_FILES, WHOLE
from mlx_distill.readers import read_json


def read_config(folder: Path, name: str = "") -> dict[str, Any]:
    """A model folder's `config.json`: an object with a `model_type`. Raises `ModelError`."""
    path = folder / "config.json"
    begin = f"{name}: {path}" if name else f"{path}"
    if not path.is_file():
        raise ModelError(
            f"{begin} is not there; a model folder holds config.json and {WEIGHT_FILES}"
        )
    config = read_document(path, name)
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        found = "has no model_type" if kind is None else f"has model_type {kind!r}"
        raise ModelError(
            f"{begin} {found}, which names the model's family (as \"llama\"); take the model's own"
        )
    if elsewhere := config.get("transformers_weights"):
        raise ModelError(
            f"{begin} has transformers_weights {elsewhere!r}, which mlx-lm does not read: name the "
            f"file {WHOLE} and remove the key"
        )
    return config


def read_generation_config(folder: Path, name: str = "") -> dict[str, Any]:
    """A model folder's `generation_config.json`, {} where there is none. Raises `ModelError`."""
    path = folder / "generation_config.json"
    return read_document(path, name) if path.exists() else {}


def read_document(path: Path, name: str = "") -> dict[str, Any]:
    """A JSON object of a model folder, or a `ModelError` of one line that starts with `name`."""
    begin = f"{name}: {path}" if name else f"{path}"
    document = read_json(path, begin, ModelError)
    if not isinstance(document, dict):
        kind = type(document).__name__
        raise ModelError(f"{begin} is not a JSON object but {kind}; fetch it again")
    return document
