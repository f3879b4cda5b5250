"""A student's folder in Hugging Face layout: weights in shards, and of the base model's other files
those that are known.

The tensors are a framework's own; `save` writes a file of them. Decided here: names, shards, dtype
and stop ids in the configs, and which files and keys of the base belong to its student: nothing
that names code, another disk, an adapter or a quantisation that it does not have.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_distill.backends.packed import packed_by_bitsandbytes
from mlx_distill.errors import ModelError
from mlx_distill.files import all_lines
from mlx_distill.models.config import Meaning
from mlx_distill.models.folder import read_generation_config
from mlx_distill.models.shards import write_shards
from mlx_distill.models.tokenizer import copy_named_templates, make_open_as_file
from mlx_distill.models.translation import portable
from mlx_distill.models.weights import read_weights
from mlx_distill.readers import read_json

SHARD_BYTES = 5 * 2**30
TOKENIZER_FILES = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
    ),
    *(
        "merges.txt",
        "vocab.txt",
        "tokenizer.model",
        "spiece.model",
        "chat_template.jinja",
        "chat_template.json",
    ),
)
LEFT_OUT = (
    *(
        "auto_map",
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "tokenizer_file",
        "local_files_only",
        "is_local",
    ),
    *(
        "quantization",
        "quantization_config",
        "transformers_weights",
        "model_file",
        "base_model_name_or_path",
    ),
)


def save_folder(
    tensors: dict[str, Any],
    save: Callable[[dict[str, Any], Path], None],
    base: Path,
    folder: Path,
    dtype: str,
    stop_ids: list[int],
) -> None:
    """Write `tensors` (name → array with `nbytes`) beside `base`'s tokenizer and configs.

    `dtype` ("" = as the base says) goes into `config.json`; both configs stop on every id of
    `stop_ids` and of `base`'s own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _copy_tokenizer(base, folder)
    sizes = {key: tensor.nbytes for key, tensor in tensors.items()}

    def save_some(keys: list[str], path: Path) -> None:
        save({key: tensors[key] for key in keys}, path)

    write_shards(sizes, SHARD_BYTES, folder, save_some)
    _write_configs(base, folder, dtype, stop_ids)


def not_for_mlx_lm(folder: Path) -> str:
    """Why mlx-lm cannot open a student of this base model, in one line; "" where it can, or is not
    there to be asked. No weights are read.
    """
    try:
        from mlx_lm.utils import load_model
    except (ImportError, OSError):
        return ""  # a GPU's machine without MLX says nothing of the Mac that a run goes on to
    told = portable(Meaning(folder, str(folder)))
    by_name = not packed_by_bitsandbytes(told)  # of which the student has the numbers alone
    with read_weights(folder, str(folder)).alone() as alone:
        try:
            load_model(alone, lazy=True, strict=by_name, model_config=told)
        except (
            Exception
        ) as error:  # a family's code, run on a config it was not written for, fails in any way
            return all_lines(error).replace(str(alone), str(folder))
    return ""


def _copy_tokenizer(base: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    copy_named_templates(base, folder)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        _write_json(path, _without_left_overs(read_json(path, error=ModelError)))
        make_open_as_file(folder)


def _write_configs(base: Path, folder: Path, dtype: str, stop_ids: list[int]) -> None:
    config, generation = portable(Meaning(base, str(base))), read_generation_config(base)
    ends = sorted({*stop_ids, *config_stop_ids(config, generation)})
    config = _without_left_overs(config) | {"eos_token_id": ends}
    if dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json", _without_left_overs(generation) | {"eos_token_id": ends}
    )


def config_stop_ids(config: dict[str, Any], generation: dict[str, Any]) -> set[int]:
    """The ids on which a model's own configs end a text: one or a list, in either file, below the
    vocabulary's size.
    """
    ids: set[int] = set()
    for document in (config, config.get("text_config"), generation):
        given = document.get("eos_token_id") if isinstance(document, dict) else None
        ids |= {i for i in (given if isinstance(given, list) else [given]) if type(i) is int}
    size = config.get("vocab_size")
    return {i for i in ids if 0 <= i < (size if isinstance(size, int) else i + 1)}


def _without_left_overs(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in LEFT_OUT}


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
