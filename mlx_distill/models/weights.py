"""A model folder's weights: its tensors by name, known from the headers of their files.

In: a folder. Out: `Weights`. Decided here: every file is whole, every tensor lies in one file, and
what cannot be a model's numbers is refused before a library makes the model that a config describes.
"""

import json
import math
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
from mlx_distill.models.keys import LAYER_COUNTS, WIDTHS
from mlx_distill.models.shards import INDEX, WHOLE, index_of
from mlx_distill.models.weight_files import read_index, weight_files
from mlx_distill.readers import parse_json

LOADED_WITH_WEIGHTS = ("config.json", "hf_quant_config.json")  # the latter is read by mlx-lm
NUMBERS_AT_ONCE = 2**20  # that are looked at together: they stay in the processor's cache
PLAIN = ("F64", "F32", "F16", "BF16")  # formats that stand for themselves
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
PARTS = ("text_config", "language_config")  # of a config, where a model of language has its own
QUANT_STATE = ".quant_state."  # after a packed tensor's name, in that of what bitsandbytes adds
PACKED = 64  # numbers of a quantised tensor in one that is stored, at most


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
        parts = [config, *(config[key] for key in PARTS if isinstance(config.get(key), dict))]
        self._refuse_absurd_sizes(parts, name)
        self._refuse_unusable_numbers(parts, name)

    def _refuse_absurd_sizes(self, parts: list[dict[str, Any]], name: str) -> None:
        """Counts and widths that these tensors cannot have.

        Libraries make the model that a config describes before they look at the tensors: a wrong
        digit in it would take all memory, or the day.
        """
        count = len(self.tensors)
        largest = max(math.prod(tensor.shape) for tensor in self.tensors.values())
        limits = {key: (count, f"{count} tensors") for key in LAYER_COUNTS}
        limits |= {
            key: (PACKED * largest, f"none larger than {largest:,} numbers") for key in WIDTHS
        }
        for part in parts:
            for key, value in part.items():
                limit, what = limits.get(key, (math.inf, ""))
                if isinstance(value, int | float) and value > limit:
                    raise ModelError(
                        f"{name}: config.json says {key} {value}, but its weights have {what}; "
                        "fetch both again from one place"
                    )

    def _refuse_unusable_numbers(self, parts: list[dict[str, Any]], name: str) -> None:
        """A tensor with an infinity or a NaN, or one of integers that nothing explains: one pass
        over the files. What bitsandbytes packed may lie there as if it were bfloat16.
        """
        packed = {key.partition(QUANT_STATE)[0] for key in self.tensors if QUANT_STATE in key}
        quantised = (self.folder / "hf_quant_config.json").is_file()
        quantised = quantised or any(key.startswith("quant") for part in parts for key in part)
        for key, tensor in self.tensors.items():
            if not quantised and key.endswith(".weight") and tensor.dtype not in PLAIN:
                raise ModelError(
                    f"{name}: tensor {key} in {tensor.file} is stored as {tensor.dtype}, but "
                    "config.json tells of no quantisation; fetch both again from one place"
                )
            if key not in packed and not is_finite(tensor):
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
            beside = [self.folder / name for name in LOADED_WITH_WEIGHTS]
            for file in (*(file for file in beside if file.is_file()), *self.files):
                (Path(place) / file.name).symlink_to(file.absolute())
            if [file.name for file in self.files] != [WHOLE]:
                (Path(place) / INDEX).write_text(json.dumps(self._index()), encoding="utf-8")
            yield Path(place)

    def _index(self) -> dict[str, Any]:
        size = sum(tensor.end - tensor.begin for tensor in self.tensors.values())
        return index_of({key: tensor.file.name for key, tensor in self.tensors.items()}, size)


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
    for key, place in read_index(folder, name).items():
        if key not in tensors or tensors[key].file.name != place:
            raise ModelError(
                f"{name}: {folder / place} lacks tensor {key}, which {INDEX} says is in it; fetch "
                "the folder again"
            )
    if not tensors:
        raise ModelError(f"{name}: {files[0]} holds no tensor; fetch it again")
    return Weights(folder, files, tensors)


def is_finite(tensor: StoredTensor) -> bool:
    """Whether no number of a stored tensor is NaN or infinite; what is not floating-point is
    finite.
    """
    if tensor.dtype not in NOT_A_NUMBER or tensor.begin == tensor.end:
        return True
    integer, limit = NOT_A_NUMBER[tensor.dtype]
    unsigned = np.dtype(f"u{np.dtype(integer).name}")
    sign = 1 << (8 * unsigned.itemsize - 1)
    length = tensor.end - tensor.begin
    content = np.memmap(tensor.file, np.uint8, "r", tensor.begin, (length,)).view(np.ndarray)
    step = NUMBERS_AT_ONCE * unsigned.itemsize
    for start in range(0, length, step):
        bits = np.frombuffer(content[start : start + step], integer)
        # As signed integers the positive numbers are the largest, as unsigned ones the negative
        # numbers are.
        if bits.max() >= limit or bits.view(unsigned).max() >= sign + limit:
            return False
    return True


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
