"""A model folder as files: its `config.json`, and which safetensors files hold its weights.

In: a folder. Out: the config as a dict; `Weights`, exactly the files that every backend reads and
the fingerprint covers. Decided here: an index is the truth about its folder, nothing outside of the
folder is read, and two sets of weights in one folder are refused, because mlx-lm would merge them
and transformers would take one of them. `name` is how a message begins: the model as its user knows
it.
"""

import json
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mlx_distill.errors import ModelError
from mlx_distill.files import one_line
from mlx_distill.models.shards import index_of
from mlx_distill.readers import parse_json, read_json

WEIGHT_FILES = (
    "model*.safetensors"  # what mlx-lm loads; skips consolidated.safetensors and adapters
)
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
LOADED_WITH_WEIGHTS = ("config.json", "hf_quant_config.json")  # the latter is read by mlx-lm
BITS_AT_ONCE = 2**20  # numbers that are looked at together: they stay in the processor's cache

# Of each floating-point format of safetensors: the integer of its width, and the first magnitude
# that is no number.
NOT_A_NUMBER = {
    "F64": (np.int64, 0x7FF << 52),
    "F32": (np.int32, 0xFF << 23),
    "F16": (np.int16, 0x1F << 10),
    "BF16": (np.int16, 0xFF << 7),
    "F8_E5M2": (np.int8, 0x1F << 2),
    "F8_E4M3": (np.int8, 0x7F),
}

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
WIDTHS = (
    *(
        "vocab_size",
        "hidden_size",
        "n_embd",
        "d_model",
        "dim",
        "intermediate_size",
        "n_inner",
        "head_dim",
        "ffn_dim",
    ),
    *(
        "num_attention_heads",
        "num_key_value_heads",
        "n_head",
        "num_local_experts",
        "num_experts",
        "n_routed_experts",
    ),
    "moe_intermediate_size",
)
PLAIN = ("F64", "F32", "F16", "BF16")  # formats that stand for themselves


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, its format and shape as the header says, its bytes from
    `begin` to `end`.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Weights:
    """The weights of a folder: their files in order, and their tensors by name."""

    folder: Path
    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]

    def refuse_unusable(self, config: dict[str, Any], name: str) -> None:
        """Raise `ModelError` where the config cannot be of these tensors, or their numbers cannot
        be a model's.
        """
        self._refuse_absurd_sizes(config, name)
        self._refuse_unusable_numbers(config, name)

    def _refuse_absurd_sizes(self, config: dict[str, Any], name: str) -> None:
        """Counts and widths that these tensors cannot have.

        Libraries make the model that a config describes before they look at the tensors: a wrong
        digit in it would take all memory, or the day.
        """
        largest = 64 * max(
            math.prod(tensor.shape) for tensor in self.tensors.values()
        )  # quantised ones are packed
        for part in (config, config.get("text_config"), config.get("language_config")):
            for key, value in part.items() if isinstance(part, dict) else ():
                limit = (
                    len(self.tensors)
                    if key in LAYER_COUNTS
                    else largest
                    if key in WIDTHS
                    else math.inf
                )
                if isinstance(value, int | float) and value > limit:
                    what = (
                        f"{limit} tensors"
                        if key in LAYER_COUNTS
                        else f"none larger than {limit // 64:,} numbers"
                    )
                    raise ModelError(
                        f"{name}: config.json says {key} {value}, but its weights have {what}; "
                        "fetch both again from one place"
                    )

    def _refuse_unusable_numbers(self, config: dict[str, Any], name: str) -> None:
        """A tensor with an infinity or a NaN, or one of integers that nothing explains: one pass
        over the files.
        """
        described = (config, config.get("text_config"), config.get("language_config"))
        quantised = any(
            key.startswith("quant") for part in described if isinstance(part, dict) for key in part
        )
        quantised = quantised or (self.folder / "hf_quant_config.json").is_file()
        for key, tensor in self.tensors.items():
            if not quantised and key.endswith(".weight") and tensor.dtype not in PLAIN:
                raise ModelError(
                    f"{name}: tensor {key} in {tensor.file} is stored as {tensor.dtype}, but "
                    "config.json tells of no quantisation; fetch both again from one place"
                )
            if not is_finite(tensor):
                raise ModelError(
                    f"{name}: tensor {key} in {tensor.file} holds values that are not finite (NaN "
                    "or infinity), so the file is damaged or its training diverged; fetch it "
                    "again, or name another model"
                )

    @contextmanager
    def alone(self) -> Iterator[Path]:
        """A folder of links to config and weights alone, for libraries that would read what else
        lies in the folder.

        It has an index of its own unless there is one file `model.safetensors`. It may go once the
        files are opened.
        """
        with tempfile.TemporaryDirectory(prefix="mlx-distill-model-") as place:
            beside = [
                self.folder / name for name in LOADED_WITH_WEIGHTS if (self.folder / name).is_file()
            ]
            for file in (*beside, *self.files):
                (Path(place) / file.name).symlink_to(file.absolute())
            if [file.name for file in self.files] != [WHOLE]:
                (Path(place) / INDEX).write_text(json.dumps(self._index()), encoding="utf-8")
            yield Path(place)

    def _index(self) -> dict[str, Any]:
        size = sum(tensor.end - tensor.begin for tensor in self.tensors.values())
        places = {key: tensor.file.name for key, tensor in self.tensors.items()}
        return index_of(places, size)


def read_config(folder: Path, name: str = "") -> dict[str, Any]:
    """A model folder's `config.json`: an object with a `model_type`. Raises `ModelError`."""
    path = folder / "config.json"
    begin = f"{name}: {path}" if name else f"{path}"
    if not path.is_file():
        raise ModelError(
            f"{begin} is not there; a model folder holds config.json and {WEIGHT_FILES}"
        )
    config = _document(path, f"{name}: " if name else "")
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        found = "has no model_type" if kind is None else f"has model_type {kind!r}"
        raise ModelError(
            f"{begin} {found}, which names the model's family (as \"llama\"); take the model's own"
        )
    if config.get("transformers_weights"):
        raise ModelError(
            f"{begin} has transformers_weights {config['transformers_weights']!r}, which mlx-lm "
            f"does not read: name the file {WHOLE} and remove the key"
        )
    return config


def read_generation_config(folder: Path, name: str = "") -> dict[str, Any]:
    """A model folder's `generation_config.json`, {} where there is none. Raises `ModelError`."""
    path = folder / "generation_config.json"
    return _document(path, f"{name}: " if name else "") if path.exists() else {}


def read_weights(folder: Path, name: str) -> Weights:
    """The weights of a model folder by their headers; the numbers are not read.

    Raises `ModelError` where `weight_files` does, for a file that is not a whole safetensors file,
    for a tensor that the index names and its file lacks, and for one that lies in two files.
    """
    files = weight_files(folder, name)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for key, tensor in _read_header(file, name).items():
            if key in tensors:
                raise ModelError(
                    f"{name}: tensor {key} lies in two files, {tensors[key].file} and {file.name}; "
                    "which one counts is not said; fetch the folder again"
                )
            tensors[key] = tensor
    for key, place in _index_of(folder, name).items():
        if key not in tensors or tensors[key].file.name != place:
            raise ModelError(
                f"{name}: {folder / place} lacks tensor {key}, which {INDEX} says is in it; fetch "
                "the folder again"
            )
    if not tensors:
        raise ModelError(f"{name}: {files[0]} holds no tensor; fetch it again")
    return Weights(folder, files, tensors)


def weight_files(folder: Path, name: str) -> tuple[Path, ...]:
    """The files of a folder's weights, sorted: those that its index names, or without one the only
    set there is.

    Raises `ModelError` where there are none, one is missing, one lies outside of the folder, or
    others lie beside them.
    """
    found = sorted(file.name for file in folder.glob(WEIGHT_FILES))
    if adapter := next((file for file in ADAPTERS if (folder / file).is_file()), None):
        _refuse_adapter(folder, adapter, found, name)
    named = sorted(set(_index_of(folder, name).values()))
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


def is_finite(tensor: StoredTensor) -> bool:
    """Whether no number of a stored tensor is NaN or infinite; what is not floating-point is
    finite.
    """
    if tensor.dtype not in NOT_A_NUMBER or tensor.begin == tensor.end:
        return True
    integer, limit = NOT_A_NUMBER[tensor.dtype]
    unsigned = np.dtype(f"u{np.dtype(integer).name}")
    sign = 1 << (8 * unsigned.itemsize - 1)
    numbers = np.memmap(
        tensor.file, np.uint8, "r", tensor.begin, (tensor.end - tensor.begin,)
    ).view(np.ndarray)
    for start in range(0, len(numbers), BITS_AT_ONCE * unsigned.itemsize):
        bits = np.frombuffer(numbers[start : start + BITS_AT_ONCE * unsigned.itemsize], integer)
        # As signed integers the positive numbers are the largest, as unsigned ones the negative
        # numbers are.
        if bits.max() >= limit or bits.view(unsigned).max() >= sign + limit:
            return False
    return True


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


def _only_set(folder: Path, found: list[str], name: str) -> list[str]:
    """The files that make one model where no index names them: a single one, or all shards of one
    count.
    """
    shards = [match for file in found if (match := SHARD.fullmatch(file))]
    counts = {match[2] for match in shards}
    if WHOLE in found:
        return [WHOLE]
    if len(counts) > 1:
        first = [match[0] for match in shards if match[2] == min(counts)]
        others = [match[0] for match in shards if match[2] != min(counts)]
        raise _two_sets(folder, first, others, name, "there is")
    if not shards:
        return found[:1]
    return _all_shards(shards)


def _all_shards(shards: list[re.Match]) -> list[str]:
    """The names of a whole set to which some shards belong, counted from 1, or from 0 where there
    is such a one.
    """
    count, digits, written = int(shards[0][2]), len(shards[0][1]), shards[0][2]
    if (
        count > len(shards) + 1000
    ):  # a number that no folder means: what is there shows that others are missing
        count = len(shards) + 1
    first = min(int(match[1]) for match in shards)
    numbers = range(0, count) if first == 0 else range(1, count + 1)
    return [f"model-{number:0{digits}}-of-{written}.safetensors" for number in numbers]


def _two_sets(
    folder: Path, chosen: list[str], left_over: list[str], name: str, how: str
) -> ModelError:
    return ModelError(
        f"{name}: two sets of weights in {folder}: {how} {_listed(chosen)}, and beside it lies "
        f"{_listed(left_over)} (mlx-lm would merge them); move away what is left over"
    )


def _index_of(folder: Path, name: str) -> dict[str, str]:
    """Tensor → file name as the index says, {} where there is none."""
    path = folder / INDEX
    if not path.exists():
        return {}
    places = _document(path, f"{name}: ").get("weight_map")
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(file, str) for file in places.values())
    ):
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


def _read_header(file: Path, name: str) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, after the format's own library has found it whole."""
    try:
        with safe_open(file, "np"):
            pass
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = parse_json(stream.read(size), f"{name}: {file}", ModelError)
    except (SafetensorError, OSError) as error:
        reason = one_line(error) if file.stat().st_size else "it is empty"
        raise ModelError(
            f"{name}: {file} is not a whole safetensors file ({reason}); fetch it again"
        ) from None
    tensors = {}
    for key, entry in header.items():
        if key != "__metadata__":
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            tensors[key] = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), begin, end)
    return tensors


def _document(path: Path, begin: str) -> dict[str, Any]:
    """A JSON object, or a `ModelError` of one line that starts with `begin`."""
    document = read_json(path, f"{begin}{path}", ModelError)
    if not isinstance(document, dict):
        kind = type(document).__name__
        raise ModelError(f"{begin}{path} is not a JSON object but {kind}; fetch it again")
    return document


def _listed(names: list[str]) -> str:
    """Names in one line, the middle of many left out."""
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-1]} ({len(names)} files)"
