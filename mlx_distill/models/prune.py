"""A smaller model out of a model's own weights: fewer blocks, narrower MLPs, fewer heads.

In: a model folder, and what stays of it. Out: a model folder of the same family with the numbers
that stay, bit for bit, in the format they are stored in. Decided here: which tensors a channel or a
head is made of, and that a block keeps what it was by its place (its window, whether it rotates).
Which parts matter least is measured elsewhere (`backends/`), or given by position.
"""

import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.errors import ModelError
from mlx_distill.files import made_whole, of_people, told_as, write_json
from mlx_distill.models.config import Meaning
from mlx_distill.models.folder import read_config
from mlx_distill.models.keys import QUANTISATION
from mlx_distill.models.shards import INDEX, write_shards
from mlx_distill.models.tokenizer import OTHER_TEMPLATES, TOKENIZER_FILES
from mlx_distill.models.weights import PLAIN, StoredTensor, read_weights

ACCOUNT = "pruned.json"  # what a folder was cut from, and what stayed
SHARD_BYTES = 4 * 1000**3
OF_A_BLOCK = re.compile(r"(.*\blayers\.)(\d+)\.(.+)")
OF_EACH_BLOCK = ("layer_types", "no_rope_layers")  # lists of config.json
# Of each tensor of a block: the axis along which its channels or heads lie. What a block has beside
# these and its norms cannot be narrowed.
CHANNELS = {
    "mlp.gate_proj.weight": 0,
    "mlp.gate_proj.bias": 0,
    "mlp.up_proj.weight": 0,
    "mlp.up_proj.bias": 0,
    "mlp.down_proj.weight": 1,
}
QUERIES = {"self_attn.q_proj.weight": 0, "self_attn.q_proj.bias": 0, "self_attn.o_proj.weight": 1}
KEYS = {
    "self_attn.k_proj.weight": 0,
    "self_attn.k_proj.bias": 0,
    "self_attn.v_proj.weight": 0,
    "self_attn.v_proj.bias": 0,
}
# those whose length is a head's, or the model's: the same for all heads and channels
WHOLE = re.compile(
    r"(.*norm\.weight|self_attn\.o_proj\.bias|mlp\.down_proj\.bias|self_attn\.rotary_emb\..*)"
)

NORMS_OF_HEADS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


@dataclass(frozen=True)
class Kept:
    """What stays of a model: `layers`, ascending; of each of these, by its number in the model that
    is cut, the `channels` of the MLP and the `kv_heads` (each with the query heads that share it).
    An empty mapping: all of them.
    """

    layers: tuple[int, ...]
    channels: dict[int, np.ndarray] = field(default_factory=dict)
    kv_heads: dict[int, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """How much of a model there is to choose from."""

    layers: int
    channels: int
    kv_heads: int
    queries_a_head: int  # that share a key-value head
    head_dim: int

    @classmethod
    def of(cls, config: dict[str, Any], name: str) -> "Sizes":
        """Raises `ModelError` for a config that does not say them."""
        try:
            layers, channels, heads = (
                config[key]
                for key in ("num_hidden_layers", "intermediate_size", "num_attention_heads")
            )
            width = config.get("head_dim") or config["hidden_size"] // heads
        except KeyError as error:
            raise ModelError(
                f"{name}: its config.json has no {error.args[0]}: only dense decoders are pruned"
            ) from None
        kv_heads = config.get("num_key_value_heads") or heads
        return cls(layers, channels, kv_heads, heads // kv_heads, width)

    @classmethod
    def of_meaning(cls, meaning: Meaning) -> "Sizes":
        """As transformers reads a config, its defaults filled in."""
        return cls.of(meaning.declared | meaning.stored, meaning.name)


def evenly(count: int, stay: int) -> tuple[int, ...]:
    """Of `count` blocks the `stay` that lie at even distances, the first one among them."""
    return tuple(place * count // stay for place in range(stay))


def pruned_config(
    config: dict[str, Any], name: str, layers: int, channels: int, kv_heads: int
) -> dict[str, Any]:
    """The sizes of a config.json after pruning, 0 for all; for a plan, which needs no weights."""
    sizes = Sizes.of(config, name)
    changed = {"num_hidden_layers": layers or sizes.layers}
    return config | changed | _widths(sizes, channels, kv_heads)


def prune(
    folder: Path, target: Path, kept: Kept, name: str = "", account: dict[str, Any] | None = None
) -> None:
    """Write what is `kept` of the model in `folder` as a Hugging Face folder, which appears whole or
    not at all; an `account` of it goes into its `pruned.json`.

    Raises `ModelError`: for a quantised model, for a family whose parts are not known here by their
    names, where narrowing was asked; for a disk that is full.
    """
    name = name or str(folder)
    config = read_config(folder, name)
    if config.keys() & set(QUANTISATION):
        raise ModelError(f"{name} is quantised, and packed numbers cannot be pruned: name its base")
    meaning = Meaning(folder, name)
    document = _document(meaning, kept)
    tensors = dict(_renamed(meaning, folder, kept))
    with told_as(ModelError, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with made_whole(target) as partial:
            _copy_documents(folder, partial)
            text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
            (partial / "config.json").write_text(text, encoding="utf-8")
            if account:
                write_json(partial / ACCOUNT, account)
            _write(tensors, partial)


def refuse_unknown(folder: Path, kept: Kept, name: str) -> None:
    """Raise `ModelError` where `prune` would, for what it reads of a model's documents and names."""
    meaning = Meaning(folder, name)
    _document(meaning, kept)
    for _ in _renamed(meaning, folder, kept):
        pass


def gone(names: Iterable[str], kept: Kept, sizes: Sizes) -> dict[str, tuple[int, np.ndarray]]:
    """Tensor's name → its axis, and the places along it that do not stay, of all that are cut; for
    blocks that all stay.
    """
    found = {}
    for key in names:
        match = OF_A_BLOCK.fullmatch(key)
        for axes, stay, width, count in _families(kept, sizes):
            if match and stay and match[3] in axes:
                whole = np.ones(count, bool)
                whole[stay[int(match[2])]] = False
                found[key] = axes[match[3]], np.flatnonzero(np.repeat(whole, width))
    return found


# config.json


def _document(meaning: Meaning, kept: Kept) -> dict[str, Any]:
    """The whole config.json; lists with an entry for each block keep those of the blocks that stay,
    also where the family derives them from a block's number.
    """
    sizes = Sizes.of_meaning(meaning)
    by_block = {
        key: [meaning.declared[key][layer] for layer in kept.layers]
        for key in OF_EACH_BLOCK
        if meaning.declared.get(key)
    }
    channels, kv_heads = (
        len(next(iter(found.values()), ())) for found in (kept.channels, kept.kv_heads)
    )
    widths = _widths(sizes, channels, kv_heads)
    if "num_attention_heads" in widths and "head_dim" not in meaning.declared:
        raise ModelError(
            f"{meaning.name}: a {meaning.family} has no head_dim of its own in config.json, so that "
            "its heads cannot be pruned: prune layers or channels"
        )
    changed = {"num_hidden_layers": len(kept.layers)} | by_block | widths
    if not meaning.nested:
        return meaning.whole | changed
    return meaning.whole | {"text_config": meaning.stored | changed}


def _widths(sizes: Sizes, channels: int, kv_heads: int) -> dict[str, int]:
    """The keys of config.json that narrowing changes; 0 leaves one as it is."""
    changed = {"intermediate_size": channels} if channels else {}
    if kv_heads:
        changed |= {
            "num_key_value_heads": kv_heads,
            "num_attention_heads": kv_heads * sizes.queries_a_head,
            "head_dim": sizes.head_dim,
        }
    return changed


def documents(folder: Path) -> list[Path]:
    """The tokenizer's files and generation_config.json, which stay as they are, and config.json."""
    found = [file for pattern in TOKENIZER_FILES for file in of_people(folder, pattern)]
    return [
        file
        for file in (*found, *of_people(folder / OTHER_TEMPLATES, "*.jinja"))
        if not file.name.startswith(".") and file.name not in (INDEX, ACCOUNT)
    ]


def _copy_documents(folder: Path, target: Path) -> None:
    for file in documents(folder):
        there = target / file.relative_to(folder)
        there.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, there)


# weights


@dataclass(frozen=True)
class _Part:
    """A stored tensor, and what stays of it: `places` along `axis`, None for all."""

    tensor: StoredTensor
    axis: int = 0
    places: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.tensor.shape)
        if self.places is not None:
            shape[self.axis] = len(self.places)
        return tuple(shape)

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return (self.tensor.end - self.tensor.begin) // max(math.prod(self.tensor.shape), 1)

    @property
    def nbytes(self) -> int:
        return self.itemsize * math.prod(self.shape)

    def numbers(self) -> np.ndarray:
        """As integers of their width, which no arithmetic touches."""
        tensor = self.tensor
        array: np.ndarray = np.memmap(
            tensor.file, f"u{self.itemsize}", "r", tensor.begin, tensor.shape
        )
        if self.places is not None:
            array = array.take(self.places, self.axis)
        return np.ascontiguousarray(array)


def _renamed(meaning: Meaning, folder: Path, kept: Kept) -> Iterator[tuple[str, _Part]]:
    """New name → what stays of the tensor, of all that stay."""
    name, sizes = meaning.name, Sizes.of_meaning(meaning)
    place = {layer: new for new, layer in enumerate(kept.layers)}
    for key, tensor in read_weights(folder, name).tensors.items():
        match = OF_A_BLOCK.fullmatch(key)
        if not match:
            yield key, _Part(tensor)
        elif int(match[2]) in place:
            layer = int(match[2])
            part = _part(tensor, match[3], layer, kept, sizes, f"{name}: tensor {key}")
            yield f"{match[1]}{place[layer]}.{match[3]}", part


def _part(
    tensor: StoredTensor, tail: str, layer: int, kept: Kept, sizes: Sizes, named: str
) -> _Part:
    if tensor.dtype not in PLAIN:
        raise ModelError(f"{named} is stored as {tensor.dtype}: only plain numbers are pruned")
    for axes, found, width, _ in _families(kept, sizes):
        if found and tail in axes:
            places = (found[layer][:, None] * width + np.arange(width)).ravel()
            return _Part(tensor, axes[tail], places)
    known = tail in CHANNELS | QUERIES | KEYS or bool(WHOLE.fullmatch(tail))
    if kept.kv_heads and tail in NORMS_OF_HEADS:
        known = tensor.shape == (sizes.head_dim,)  # others are over all heads together
    if (kept.channels or kept.kv_heads) and not known:
        raise ModelError(
            f"{named} is not of a gated MLP or an attention with separate projections, which are "
            "the ones that can be narrowed: prune layers alone"
        )
    return _Part(tensor)


def _families(
    kept: Kept, sizes: Sizes
) -> tuple[tuple[dict[str, int], dict[int, np.ndarray], int, int], ...]:
    """(the axes of tensors, what stays of each block, rows of one part, parts there are)."""
    queries = sizes.queries_a_head * sizes.head_dim
    return (
        (CHANNELS, kept.channels, 1, sizes.channels),
        (QUERIES, kept.kv_heads, queries, sizes.kv_heads),
        (KEYS, kept.kv_heads, sizes.head_dim, sizes.kv_heads),
    )


def _write(parts: dict[str, _Part], folder: Path) -> None:
    """Safetensors, with an index if several."""
    sizes = {key: part.nbytes for key, part in parts.items()}
    write_shards(
        sizes,
        SHARD_BYTES,
        folder,
        lambda keys, path: _save({key: parts[key] for key in keys}, path),
    )


def _save(parts: dict[str, _Part], path: Path) -> None:
    """A safetensors file: the header's length, the header, the numbers; one tensor at a time, in
    formats that numpy has no name for.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, part in parts.items():
        begin, end = end, end + part.nbytes
        header[key] = {
            "dtype": part.tensor.dtype,
            "shape": list(part.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts.values():
            part.numbers().tofile(file)
