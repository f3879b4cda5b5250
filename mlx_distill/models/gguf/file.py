"""An opened `.gguf` file: its metadata as plain values that are in range, its tensors still on disk.

In: a path. Out: a `GGUFFile`. Decided here: which architectures are understood, which keys of
llama.cpp would change what a model computes, and what is said of a value that is not.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_distill.errors import ModelError, NotFound
from mlx_distill.files import first_line
from mlx_distill.models.gguf.header import check_header

if TYPE_CHECKING:
    from gguf import ReaderTensor

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
LARGEST = {"context_length": 2**30, "attention.head_count": 2**16, "attention.head_count_kv": 2**16}

# What llama.cpp computes otherwise where a file sets it, and the values with which it does not.
NEUTRAL = {
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.causal": (True,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (0, 1),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
}


@dataclass(frozen=True)
class Sizes:
    """The counts and widths of a model; `rows` are those of its embedding."""

    layers: int
    width: int
    inner: int  # of the feed-forward part
    heads: int
    kv_heads: int
    head_dim: int
    rows: int


@dataclass(frozen=True)
class GGUFFile:
    """An opened file; tensors go by their GGUF names and are still quantised."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, "ReaderTensor"]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own section, as `get("rope.freq_base")`; floats as short
        decimals.
        """
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def need(self, key: str) -> int:
        """A whole number that the architecture cannot do without."""
        value, largest = self.get(key), LARGEST.get(key, 2**31 - 1)
        if type(value) is not int or not 0 < value <= largest:
            raise self._unexpected(key, value, f"a whole number from 1 to {largest:,}")
        return value

    def number(self, key: str, default: float, low: float, high: float) -> float:
        """A number of the architecture in a range, `default` where the file has none."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not low <= value <= high:
            raise self._unexpected(key, value, f"a number from {low:g} to {high:g}")
        return value

    def listed(self, key: str, kind: type) -> list:
        """A list of the tokenizer, all of one kind."""
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list) or any(type(entry) is not kind for entry in value):
            raise self.refused(
                f"tokenizer.ggml.{key} is {short(value)}, a list of {kind.__name__} was expected"
            )
        return value

    def token_id(self, name: str) -> int | None:
        """The id of a special token, None where the file names none."""
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        tokens = len(self.listed("tokens", str))
        if value is not None and not (type(value) is int and 0 <= value < tokens):
            raise self.refused(
                f"tokenizer.ggml.{name}_token_id is {short(value)}, but there are {tokens} tokens"
            )
        return value

    @cached_property
    def sizes(self) -> Sizes:
        """Raises `ModelError` where they contradict each other."""
        width, heads = self.need("embedding_length"), self.need("attention.head_count")
        kv_heads, head_dim = heads, width // heads
        if self.get("attention.head_count_kv") is not None:
            kv_heads = self.need("attention.head_count_kv")
        if self.get("attention.key_length") is not None:
            head_dim = self.need("attention.key_length")
        if head_dim == 0 or head_dim % 2:
            raise self.refused(f"a head is {head_dim} wide, an even width was expected")
        if heads % kv_heads:
            raise self.refused(f"{heads} heads are no multiple of {kv_heads} of keys and values")
        return Sizes(
            layers=self.need("block_count"),
            width=width,
            inner=self.need("feed_forward_length"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rows=self._vocabulary_rows(),
        )

    def _vocabulary_rows(self) -> int:
        """Rows of the embedding, which may be more than there are tokens but not fewer."""
        embedding = self.tensors.get("token_embd.weight")
        rows = int(embedding.shape[-1]) if embedding is not None else 0
        tokens = len(self.listed("tokens", str))
        if rows < tokens:
            raise self.refused(f"{rows} embedding rows for {tokens} tokens")
        if self.get("vocab_size", rows) not in (rows, tokens):
            raise self.refused(
                f"vocab_size {short(self.get('vocab_size'))} for {rows} embedding rows and "
                f"{tokens} tokens"
            )
        return rows

    def refused(self, found: str) -> ModelError:
        return ModelError(
            f"model {str(self.path)!r}: {found}; use the model's Hugging Face folder instead"
        )

    def _unexpected(self, key: str, value: Any, expected: str) -> ModelError:
        return self.refused(f"{self.architecture}.{key} is {short(value)}, {expected} was expected")


def read_gguf(path: Path) -> GGUFFile:
    """Open a `.gguf` file; refuse unknown architectures, mixtures of experts and parts of a split
    file.
    """
    from gguf import GGUFReader

    if not path.is_file():
        raise NotFound(f"model {str(path)!r}: no such file; check the path")
    try:
        check_header(path)  # before the library reads it, which believes every length
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError) as error:
        raise ModelError(
            f"model {str(path)!r}: not a whole .gguf file ({first_line(error)}); fetch it again"
        ) from error
    file = GGUFFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})
    if file.architecture not in ARCHITECTURES:
        raise file.refused(
            f"architecture {file.architecture!r} is not one of {', '.join(ARCHITECTURES)}"
        )
    if file.get("expert_count", 0):
        raise file.refused("a mixture of experts")
    if metadata.get("split.count", 0) not in (0, 1):
        raise file.refused("one part of a split file")
    for key, neutral in NEUTRAL.items():
        if file.get(key, neutral[0]) not in neutral:
            raise file.refused(
                f"{file.architecture}.{key} is {short(file.get(key))}, which is not understood"
            )
    return file


def short(value: Any) -> str:
    """A value in a message, cut where it is long."""
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}…"
