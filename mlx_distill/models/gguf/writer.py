"""A Hugging Face folder of the Llama or Qwen family becomes a `.gguf` file.

In: a folder with weights, configs and tokenizer. Out: one file that llama.cpp, LM Studio and Ollama
open, as stored or quantised. It is the inverse of `convert.py`, by the same tables. Decided here:
which tensors are quantised. Vectors never are; a matrix whose rows a block does not divide stays as
it is stored, and is named.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_distill.models.config import Meaning
from mlx_distill.models.gguf.fields import ROPE_FACTORS, add_fields, refuse_unwritable, refused
from mlx_distill.models.gguf.fields import rope_factors as factors_of
from mlx_distill.models.gguf.tensors import BLOCK_TENSORS, EXTRA_BLOCK_TENSORS, TENSORS, permute
from mlx_distill.models.gguf.vocabulary import Vocabulary
from mlx_distill.models.tokenizer import load_tokenizer
from mlx_distill.models.weights import StoredTensor, Weights, read_weights

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

AS_STORED = "as stored"
TYPES = {  # of the file, by what is asked: the type of its matrices, and its number in the format
    AS_STORED: {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"},
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}
AT_THE_ENDS = ("token_embd.weight", "output.weight")  # a coarse embedding costs more than it saves
NUMBERS = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": np.uint16}


@dataclass
class Written:
    """What became of the tensors: how many matrices, and the names of those that stay as stored
    though a quantisation was asked for; notes on what llama.cpp does otherwise.
    """

    path: Path
    matrices: int = 0
    not_divided: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write_gguf(
    folder: Path, path: Path, name: str, ends: Iterable[int], kind: str = AS_STORED
) -> Written:
    """Write the model in `folder` to the new file `path`; `kind` is "as stored", "q8_0" or "q4_0",
    `name` how messages begin and what the file says of itself, `ends` the ids that end a text.

    Needs memory for one tensor in float32. Raises `ModelError` (a family, setting, tensor or
    tokenizer that cannot be written) and `OSError`.
    """
    from gguf import GGUFWriter

    meaning = Meaning(folder, name)
    refuse_unwritable(meaning)
    weights = read_weights(folder, name)
    names = _names(weights, meaning)
    rows = weights.tensors["model.embed_tokens.weight"].shape[0]
    vocabulary = Vocabulary(load_tokenizer(folder), name, rows, sorted(ends))
    written = Written(path, notes=vocabulary.notes())
    writer = GGUFWriter(path, meaning.family)
    try:
        writer.add_type("model")
        writer.add_name(name)
        add_fields(writer, meaning)
        vocabulary.add_to(writer)
        _write_tensors(writer, weights, names, meaning, kind, written)
    finally:
        writer.close()
    return written


def tensor_type(name: str, tensor: StoredTensor, kind: str) -> "GGMLQuantizationType":
    """How a tensor is written: `name` is its GGUF name."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(tensor.shape) < 2:
        return GGMLQuantizationType.F32
    if kind != AS_STORED:
        wanted = "q8_0" if name in AT_THE_ENDS else kind
        quantised = GGMLQuantizationType[wanted.upper()]
        if tensor.shape[-1] % GGML_QUANT_SIZES[quantised][0] == 0:
            return quantised
    return GGMLQuantizationType["F32" if tensor.dtype == "F64" else tensor.dtype]


def _write_tensors(
    writer: "GGUFWriter",
    weights: Weights,
    names: dict[str, str],
    meaning: Meaning,
    kind: str,
    written: Written,
) -> None:
    """The header with all tensors' places, then the tensors, one at a time in memory."""
    from gguf import LlamaFileType, quants

    factors = factors_of(meaning)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    types = {}
    for theirs, ours in names.items():
        tensor = weights.tensors[ours]
        types[theirs] = tensor_type(theirs, tensor, kind)
        _add_info(writer, theirs, tensor, types[theirs])
        written.matrices += len(tensor.shape) > 1
        plain = types[theirs].name in ("F32", "F16", "BF16")
        if kind != AS_STORED and len(tensor.shape) > 1 and plain:
            written.not_divided.append(ours)
    of_file = TYPES[kind]
    if isinstance(of_file, dict):
        of_file = of_file[types["token_embd.weight"].name]
    writer.add_file_type(LlamaFileType[of_file])
    writer.add_quantization_version(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for theirs, ours in names.items():
        values = _reordered(_float32(weights.tensors[ours], ours, meaning.name), theirs, meaning)
        writer.write_tensor_data(quants.quantize(values, types[theirs]))


def _add_info(
    writer: "GGUFWriter", name: str, tensor: StoredTensor, kind: "GGMLQuantizationType"
) -> None:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    numbers = int(np.prod(tensor.shape))
    # the shape is in numbers and not in bytes where the type of the array is not uint8
    writer.add_tensor_info(
        name, tensor.shape, np.dtype(np.float32), numbers // block * size, raw_dtype=kind
    )


def _names(weights: Weights, meaning: Meaning) -> dict[str, str]:
    """GGUF name → Hugging Face name, in the order of the blocks; more or fewer are refused."""
    block = BLOCK_TENSORS | EXTRA_BLOCK_TENSORS[meaning.family]
    names = dict(TENSORS)
    if "lm_head.weight" in weights.tensors:
        names["output.weight"] = "lm_head.weight"
    for layer in range(meaning.declared["num_hidden_layers"]):
        for theirs, ours in block.items():
            names[f"blk.{layer}.{theirs}"] = f"model.layers.{layer}.{ours}"
    if unknown := weights.tensors.keys() - set(names.values()):
        found = f"tensor {min(unknown)} is none that a {meaning.family} has in llama.cpp"
        raise refused(meaning.name, found)
    if missing := set(names.values()) - weights.tensors.keys():
        raise refused(meaning.name, f"tensor {min(missing)} is missing")
    return names


def _float32(tensor: StoredTensor, key: str, name: str) -> np.ndarray:
    if tensor.dtype not in NUMBERS:
        raise refused(name, f"tensor {key} is stored as {tensor.dtype}")
    number: Any = NUMBERS[tensor.dtype]
    values = np.memmap(tensor.file, number, "r", tensor.begin, tensor.shape).view(np.ndarray)
    if tensor.dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _reordered(values: np.ndarray, name: str, meaning: Meaning) -> np.ndarray:
    if meaning.family != "llama":
        return values
    if name.endswith(".attn_q.weight"):
        return permute(values, meaning.declared["num_attention_heads"])
    if name.endswith(".attn_k.weight"):
        return permute(values, meaning.declared["num_key_value_heads"])
    return values
