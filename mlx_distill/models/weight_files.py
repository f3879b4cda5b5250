"""Which files of a model folder hold its weights.

In: a folder. Out: the files that every backend reads and the fingerprint covers. Decided here: an
index is the truth about its folder, nothing outside of the folder is read, and two sets of weights
in one folder are refused, because mlx-lm would merge them and transformers would take one of them.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlx_distill.errors import ModelError
from mlx_distill.models.folder import read_document
from mlx_distill.models.shards import INDEX, WEIGHT_FILES, WHOLE

SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
MOST_MISSING = 1000  # shards of a set; a name that tells of more was meant by nobody


def weight_files(folder: Path, name: str) -> tuple[Path, ...]:
    """The files of a folder's weights, sorted: those that its index names, or without one the only
    set there is.

    Raises `ModelError` where there are none, one is missing, one lies outside of the folder, or
    others lie beside them.
    """
    found = sorted(file.name for file in folder.glob(WEIGHT_FILES))
    if adapter := next((file for file in ADAPTERS if (folder / file).is_file()), None):
        _refuse_adapter(folder, adapter, found, name)
    named = sorted(set(read_index(folder, name).values()))
    if not found and not named:
        raise ModelError(
            f"{name}: no weights to load in {folder} (there is no {WEIGHT_FILES}); a model folder "
            f"holds config.json and {WEIGHT_FILES}"
        )
    chosen = named or _only_set(folder, found, name)
    if missing := [file for file in chosen if file not in found]:
        others = f"; {_listed(found)} is there" if found else ""
        asked = f"{INDEX} names {_listed(named)}" if named else f"there is {_listed(found)}"
        raise ModelError(
            f"{name}: {folder / missing[0]} is missing: {asked}{others if named else ''}; fetch "
            "it, or remove what is left over"
        )
    if left_over := [file for file in found if file not in chosen]:
        raise _two_sets(folder, chosen, left_over, name, f"{INDEX} names" if named else "there is")
    files = tuple(folder / file for file in chosen)
    for file in files:
        _refuse_outside(file, folder, name)
    return files


def read_index(folder: Path, name: str) -> dict[str, str]:
    """Tensor → file name as the index says, {} where there is none."""
    path = folder / INDEX
    if not path.exists():
        return {}
    places = read_document(path, name).get("weight_map")
    if not isinstance(places, dict) or not places or not _all_text(places.values()):
        raise ModelError(f"{name}: {path} has no weight_map from tensors to files; fetch it again")
    for file in places.values():
        if Path(file).name != file or file in (".", ".."):
            raise ModelError(
                f"{name}: {path} names {file!r}, which lies not beside it; only files of the "
                "folder itself are read"
            )
        if not Path(file).match(WEIGHT_FILES):
            raise ModelError(
                f"{name}: {path} names {file!r}; weights are read from {WEIGHT_FILES} alone: "
                "rename them"
            )
    return places


def _all_text(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _only_set(folder: Path, found: list[str], name: str) -> list[str]:
    """The files that make one model where no index names them: a single one, or all shards of one
    count.
    """
    if WHOLE in found:
        return [WHOLE]
    shards = [match for file in found if (match := SHARD.fullmatch(file))]
    counts = {match[2] for match in shards}
    if len(counts) > 1:
        first = [match[0] for match in shards if match[2] == min(counts)]
        others = [match[0] for match in shards if match[2] != min(counts)]
        raise _two_sets(folder, first, others, name, "there is")
    return _all_shards(shards) if shards else found[:1]


def _all_shards(shards: list[re.Match]) -> list[str]:
    """The names of a whole set to which some shards belong, counted from 1, or from 0 where there
    is such a one.
    """
    written, digits = shards[0][2], len(shards[0][1])
    count = min(int(written), len(shards) + MOST_MISSING)
    first = 0 if any(int(match[1]) == 0 for match in shards) else 1
    numbers = range(first, first + count)
    return [f"model-{number:0{digits}}-of-{written}.safetensors" for number in numbers]


def _two_sets(
    folder: Path, chosen: list[str], left_over: list[str], name: str, how: str
) -> ModelError:
    return ModelError(
        f"{name}: two sets of weights in {folder}: {how} {_listed(chosen)}, and beside it lies "
        f"{_listed(left_over)} (mlx-lm would merge them); move away what is left over"
    )


def _refuse_adapter(folder: Path, adapter: str, found: list[str], name: str) -> None:
    if not found:
        raise ModelError(
            f"{name}: {folder} holds an adapter ({adapter}), not a model; fuse it into its base "
            "model (mlx_lm.fuse, or peft's merge_and_unload) and name the folder of the result"
        )
    raise ModelError(
        f"{name}: {folder} holds a model ({_listed(found)}) and an adapter ({adapter}): "
        "transformers would add the adapter, mlx-lm would not; move the adapter out of the folder, "
        "or fuse it"
    )


def _refuse_outside(file: Path, folder: Path, name: str) -> None:
    """A link may lead elsewhere in the folder, or into the blobs of a hub cache; no other one is
    followed.
    """
    if not file.is_file():
        raise ModelError(
            f"{name}: {file} is not a file (a folder, or a link to nothing); fetch it again"
        )
    target = file.resolve()
    in_hub_cache = target.parent.name == "blobs" and (target.parent.parent / "snapshots").is_dir()
    if not in_hub_cache and not target.is_relative_to(folder.resolve()):
        raise ModelError(
            f"{name}: {file} is a link out of the folder, to {target}; only files of the folder "
            "itself are read: name the folder that holds it, or put the file here"
        )


def _listed(names: list[str]) -> str:
    """Names in one line, the middle of many left out."""
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-1]} ({len(names)} files)"
