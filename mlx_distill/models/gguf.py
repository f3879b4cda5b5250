"""A Llama- or Qwen-family `.gguf` file becomes a Hugging Face folder.

In: one GGUF file, whatever its quantisation. Out: a folder that mlx-lm and transformers open:
safetensors, `config.json`, `generation_config.json`, `tokenizer.json`, `tokenizer_config.json` with
the chat template. Decided here: which architectures, tensors, rope scalings and pre-tokenizers are
understood; everything else is refused by name, because a guess would be a model that runs and is
wrong. Reading and dequantising are the `gguf` package's, our extra.

Numbers are stored as float32 where every matrix of the file is float32, else as float16 (a
quantised weight has at most 15 significant bits; float16 keeps 11, well below the quantisation's
own error). `dtype="float32"` keeps all of them.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mlx_distill.errors import DistillError, ModelError, NotFound
from mlx_distill.files import made_whole, one_line, remedy
from mlx_distill.models.folder import INDEX
from mlx_distill.models.gguf_header import check_header
from mlx_distill.models.shards import in_shards, index_of, places_in

if TYPE_CHECKING:
    from gguf import ReaderTensor
    from tokenizers import Tokenizer

CONVERTER_VERSION = 2  # raise it when the output changes: cached conversions are then made again
SHARD_BYTES = 4 * 1000**3
DType = Literal["auto", "float32", "float16"]

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
BLOCK_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
EXTRA_BLOCK_TENSORS = {
    "llama": {},
    "qwen2": {f"attn_{name}.bias": f"self_attn.{name}_proj.bias" for name in "qkv"},
    "qwen3": {f"attn_{name}_norm.weight": f"self_attn.{name}_norm.weight" for name in "qk"},
}
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # token types of the format
LARGEST = {"context_length": 2**30, "attention.head_count": 2**16, "attention.head_count_kv": 2**16}

# What llama.cpp computes otherwise where a file sets it, and the values with which it does not.
NEUTRAL = {
    **dict.fromkeys(("attention.clamp_kqv", "attention.max_alibi_bias", "attention.scale"), (0,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (0,)),
    **dict.fromkeys(("logit_scale", "embedding_scale", "residual_scale"), (0, 1)),
    "attention.causal": (True,),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (0, 1),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
}

# The split patterns of the families' own tokenizer.json; compared with those files in
# tests/test_gguf.py.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
SPLIT += r"|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DIGIT_PATTERNS = {"qwen2": r"\p{N}", "deepseek-r1-qwen": r"\p{N}", "llama-bpe": r"\p{N}{1,3}"}
PRE_TOKENIZERS = ("smollm", *DIGIT_PATTERNS)


@dataclass(frozen=True)
class GGUFFile:
    """An opened file: its metadata as plain values, its tensors by GGUF name (still on disk, still
    quantised).
    """

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
            expected = f"a whole number from 1 to {largest:,} was expected"
            raise self.refused(f"{self.architecture}.{key} is {_short(value)}, {expected}")
        return value

    def number(self, key: str, default: float, low: float, high: float) -> float:
        """A number of the architecture in a range, `default` where the file has none."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not low <= value <= high:
            expected = f"a number from {low:g} to {high:g} was expected"
            raise self.refused(f"{self.architecture}.{key} is {_short(value)}, {expected}")
        return value

    def listed(self, key: str, kind: type) -> list:
        """A list of the tokenizer, all of one kind."""
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list) or any(type(entry) is not kind for entry in value):
            raise self.refused(
                f"tokenizer.ggml.{key} is {_short(value)}, a list of {kind.__name__} was expected"
            )
        return value

    def refused(self, found: str) -> ModelError:
        return ModelError(
            f"model {str(self.path)!r}: {found}; use the model's Hugging Face folder instead"
        )


def convert(path: Path, folder: Path, dtype: DType = "auto") -> None:
    """Write the Hugging Face folder of a `.gguf` file; `folder` must not exist and appears whole or
    not at all.

    Needs disk for the weights at 2 or 4 bytes a parameter, and memory for one shard of at most 4 GB
    and one tensor. Raises `NotFound` (no such file) and `ModelError` (unknown architecture, tensor,
    quantisation, rope scaling or pre-tokenizer; damaged file; the `gguf` package not installed;
    target in the way; disk full).
    """
    if folder.exists():
        raise ModelError(
            f"{folder}: already exists; remove it, or convert {path.name} to another folder"
        )
    file = read_gguf(path)
    names = tensor_names(file)
    check_shapes(file)
    tokenizer = build_tokenizer(file)
    number = _number(file, dtype)
    documents = {
        "config.json": model_config(file) | {"torch_dtype": np.dtype(number).name},
        "generation_config.json": _generation_config(file),
        "tokenizer_config.json": _tokenizer_config(file),
    }
    with _appearing_whole(folder) as partial:
        for name, document in documents.items():
            (partial / name).write_text(
                json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        tokenizer.save(str(partial / "tokenizer.json"))
        _write_weights(file, names, number, partial)


def read_gguf(path: Path) -> GGUFFile:
    """Open a `.gguf` file; refuse unknown architectures, mixtures of experts and parts of a split
    file.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            f"model {str(path)!r}: reading it needs gguf; pip install 'mlx-distill[gguf]'"
        ) from error
    if not path.is_file():
        raise NotFound(f"model {str(path)!r}: no such file; check the path")
    try:
        check_header(path)  # before the library reads it, which believes every length
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"model {str(path)!r}: not a whole .gguf file ({reason}); fetch it again"
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
                f"{file.architecture}.{key} is {_short(file.get(key))}, which is not understood"
            )
    return file


# --- configuration ---


def model_config(file: GGUFFile) -> dict[str, Any]:
    """The `config.json` of the family, without the number type."""
    heads, width, head_dim = (
        file.need("attention.head_count"),
        file.need("embedding_length"),
        _head_dim(file),
    )
    for key in ("rope.dimension_count", "attention.value_length"):
        if file.get(key, head_dim) != head_dim:
            raise file.refused(
                f"{key} {_short(file.get(key))} differs from the width of a head, {head_dim}"
            )
    window = file.get("attention.sliding_window", 0)
    if window and not (type(window) is int and window >= file.need("context_length")):
        raise file.refused(f"attention.sliding_window is {_short(window)}, which is not understood")
    return {
        "architectures": [ARCHITECTURES[file.architecture]],
        "model_type": file.architecture,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": file.need("feed_forward_length"),
        "num_hidden_layers": file.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(file),
        "head_dim": head_dim,
        "attention_bias": file.architecture == "qwen2",
        "vocab_size": _vocabulary_size(file),
        "max_position_embeddings": file.need("context_length"),
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon", 1e-6, 1e-12, 1e-1),
        "rope_theta": _rope_theta(file),
        "rope_scaling": _rope_scaling(file, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_token_ids(file),
    }


def _kv_heads(file: GGUFFile) -> int:
    given = file.get("attention.head_count_kv") is not None
    heads, kv_heads = (
        file.need("attention.head_count"),
        file.need("attention.head_count_kv" if given else "attention.head_count"),
    )
    if heads % kv_heads:
        raise file.refused(f"{heads} heads are no multiple of {kv_heads} of keys and values")
    return kv_heads


def _head_dim(file: GGUFFile) -> int:
    given = file.get("attention.key_length") is not None
    size = (
        file.need("attention.key_length")
        if given
        else file.need("embedding_length") // file.need("attention.head_count")
    )
    if size == 0 or size % 2:
        raise file.refused(f"a head is {size} wide, an even width was expected")
    return size


def _rope_theta(file: GGUFFile) -> float:
    return file.number("rope.freq_base", 10000.0, 1.0, 1e15)


def _vocabulary_size(file: GGUFFile) -> int:
    """Rows of the embedding, which may be more than there are tokens but not fewer."""
    rows = (
        int(file.tensors["token_embd.weight"].shape[-1])
        if "token_embd.weight" in file.tensors
        else 0
    )
    tokens = len(file.listed("tokens", str))
    if rows < tokens:
        raise file.refused(f"{rows} embedding rows for {tokens} tokens")
    if file.get("vocab_size", rows) not in (rows, tokens):
        raise file.refused(
            f"vocab_size {_short(file.get('vocab_size'))} for {rows} embedding rows and {tokens} "
            "tokens"
        )
    return rows


def _rope_scaling(file: GGUFFile, head_dim: int) -> dict[str, Any] | None:
    """None, `linear` and `yarn` from the metadata; `llama3`, which GGUF keeps as a tensor of
    factors, from those.
    """
    legacy = file.number("rope.scale_linear", 0.0, 0.0, 1e6)
    factor = file.number("rope.scaling.factor", legacy, 0.0, 1e6)
    kind = file.get("rope.scaling.type", "linear" if factor else "none")  # llama.cpp's default
    if kind == "linear" and factor in (0, 1):  # 0 is none to llama.cpp
        kind = "none"
    if "rope_freqs.weight" in file.tensors:
        if kind != "none":
            raise file.refused(f"rope scaling {_short(kind)} beside rope_freqs.weight")
        return _llama3_scaling(file, head_dim)
    scaling = {"rope_type": kind, "factor": factor or 1.0}
    betas = [
        name
        for name in ("beta_fast", "beta_slow")
        if file.get(f"rope.scaling.yarn_{name}") is not None
    ]
    if kind == "none":
        return None
    if kind == "linear":
        return scaling
    if kind == "yarn":
        scaling |= {name: file.number(f"rope.scaling.yarn_{name}", 1.0, 0.0, 1e6) for name in betas}
        return scaling | {
            "original_max_position_embeddings": file.need("rope.scaling.original_context_length")
        }
    raise file.refused(f"rope scaling {kind!r} is not one of none, linear, yarn, llama3")


def _llama3_scaling(file: GGUFFile, head_dim: int) -> dict[str, Any]:
    """The scaling whose factors are the file's, among those Llama 3.1 to 3.3 use (all but the
    factor are constant).
    """
    found = np.array(file.tensors["rope_freqs.weight"].data, np.float64)
    factor, low, high, original = float(found.max()), 1.0, 4.0, 8192
    theta = _rope_theta(file)
    turns = original / (2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if found.shape != smooth.shape or not np.allclose(
        found, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3
    ):
        raise file.refused(
            "its rope_freqs.weight is not the llama3 scaling (low 1, high 4, original context 8192)"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _token_ids(file: GGUFFile) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    ids = {f"{ours}_token_id": _token_id(file, theirs) for ours, theirs in names.items()}
    return {name: value for name, value in ids.items() if value is not None}


def _token_id(file: GGUFFile, name: str) -> int | None:
    """The id of a special token, None where the file names none; refused where there is no such
    token.
    """
    value, tokens = (
        file.metadata.get(f"tokenizer.ggml.{name}_token_id"),
        len(file.listed("tokens", str)),
    )
    if value is not None and not (type(value) is int and 0 <= value < tokens):
        raise file.refused(
            f"tokenizer.ggml.{name}_token_id is {_short(value)}, but there are {tokens} tokens"
        )
    return value


def _generation_config(file: GGUFFile) -> dict[str, Any]:
    """Greedy by default; stops on the end of text, of turn and of message, whichever the file
    names.
    """
    ends = {_token_id(file, name) for name in ("eos", "eot", "eom")} - {None}
    return _token_ids(file) | {"eos_token_id": sorted(ends)}


def _tokenizer_config(file: GGUFFile) -> dict[str, Any]:
    tokens = file.listed("tokens", str)
    special = {name.removesuffix("_id"): tokens[value] for name, value in _token_ids(file).items()}
    if (unknown := _token_id(file, "unknown")) is not None:
        special["unk_token"] = tokens[unknown]
    template = file.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise file.refused(f"tokenizer.chat_template is {_short(template)}, a text was expected")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.need("context_length"),
        **special,
        **({"chat_template": template} if template else {}),
    }


# --- tokenizer ---


def build_tokenizer(file: GGUFFile) -> "Tokenizer":
    """The byte-level BPE tokenizer of the file: its tokens, merges and special tokens, its family's
    pre-tokenizer.

    Unused ids (the padding of the vocabulary) get no token. Raises `ModelError` for a SentencePiece
    vocabulary and for a pre-tokenizer not in `PRE_TOKENIZERS`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    kind, pre = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind != "gpt2":
        raise file.refused(
            f"its tokenizer is of the kind {kind!r}, only byte-level BPE (gpt2) is understood"
        )
    if pre not in PRE_TOKENIZERS:
        raise file.refused(f"pre-tokenizer {pre!r} is not one of {', '.join(PRE_TOKENIZERS)}")
    tokens, types = file.listed("tokens", str), file.listed("token_type", int)
    if len(tokens) != len(types):
        raise file.refused(f"{len(tokens)} tokens with {len(types)} types")
    vocabulary = {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != UNUSED
    }
    if len(vocabulary) < sum(kind != UNUSED for kind in types):
        raise file.refused("two of its tokens have the same text")
    merges = [tuple(merge.split(" ")) for merge in file.listed("merges", str)]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise file.refused(
                f"tokenizer.ggml.merges has {' '.join(merge)[:60]!r}, which joins no two of its "
                "tokens to a third"
            )
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = _splitting(pre)
    tokenizer.decoder = decoders.ByteLevel()
    added = (
        (token, kind)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=kind == CONTROL, normalized=False) for token, kind in added]
    )
    if file.metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        if (bos := _token_id(file, "bos")) is None:
            raise file.refused(
                "texts begin with a token, but tokenizer.ggml.bos_token_id is missing"
            )
        _put_first(tokenizer, tokens[bos])
    return tokenizer


def _splitting(pre: str) -> tuple[Any, Any]:
    """The normalizer (or None) and the pre-tokenizer that a GGUF pre-tokenizer name stands for."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return None, pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    split = pre_tokenizers.Split(Regex(SPLIT.replace("DIGITS", DIGIT_PATTERNS[pre])), "isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    normalizer = None if pre == "llama-bpe" else normalizers.NFC()
    return normalizer, pre_tokenizers.Sequence([split, whole])


def _put_first(tokenizer: "Tokenizer", bos: str) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )


# --- weights ---


def tensor_names(file: GGUFFile) -> dict[str, str]:
    """GGUF name → Hugging Face name of every tensor, refusing a file that has more or fewer than
    the family has.
    """
    block = BLOCK_TENSORS | EXTRA_BLOCK_TENSORS[file.architecture]
    names = dict(TENSORS)
    if file.need("block_count") > len(file.tensors):
        raise file.refused(
            f"block_count {file.need('block_count')} for {len(file.tensors)} tensors"
        )
    for layer in range(file.need("block_count")):
        names |= {
            f"blk.{layer}.{theirs}": f"model.layers.{layer}.{ours}"
            for theirs, ours in block.items()
        }
    if "output.weight" in file.tensors:
        names["output.weight"] = "lm_head.weight"
    if missing := names.keys() - file.tensors.keys():
        raise file.refused(f"tensor {min(missing)} is missing")
    if unknown := file.tensors.keys() - names.keys() - {"rope_freqs.weight"}:
        raise file.refused(f"tensor {min(unknown)} is not one of a plain {file.architecture} model")
    return names


def check_shapes(file: GGUFFile) -> None:
    """Refuse a file whose tensors have other shapes than its fields say, before one of them is
    read.
    """
    width, head_dim, ffn = (
        file.need("embedding_length"),
        _head_dim(file),
        file.need("feed_forward_length"),
    )
    queries, keys = file.need("attention.head_count") * head_dim, _kv_heads(file) * head_dim
    rows = _vocabulary_size(file)
    expected = {
        "token_embd.weight": (rows, width),
        "output_norm.weight": (width,),
        "output.weight": (rows, width),
    }
    block = {
        **dict.fromkeys(("attn_norm.weight", "ffn_norm.weight"), (width,)),
        **dict.fromkeys(("ffn_gate.weight", "ffn_up.weight"), (ffn, width)),
        **dict.fromkeys(("attn_k.weight", "attn_v.weight"), (keys, width)),
        **dict.fromkeys(("attn_k.bias", "attn_v.bias"), (keys,)),
        **dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), (head_dim,)),
        **{
            "attn_q.weight": (queries, width),
            "attn_q.bias": (queries,),
            "attn_output.weight": (width, queries),
        },
        "ffn_down.weight": (width, ffn),
    }
    for name, tensor in file.tensors.items():
        shape = tuple(int(size) for size in reversed(tensor.shape))
        wanted = expected.get(name) or block.get(name.split(".", 2)[-1])
        if wanted and shape != wanted:
            raise file.refused(
                f"tensor {name} has the shape {list(shape)}, its fields ask for {list(wanted)}"
            )


def read_tensor(file: GGUFFile, name: str) -> np.ndarray:
    """One tensor in float32, rows in Hugging Face's order."""
    from gguf.quants import dequantize

    tensor = file.tensors[name]
    try:
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
    except NotImplementedError as error:
        raise file.refused(
            f"tensor {name} is quantised as {tensor.tensor_type.name}, which cannot be read"
        ) from error
    if file.architecture == "llama" and name.endswith((".attn_q.weight", ".attn_k.weight")):
        return unpermute(
            values, file.need("attention.head_count") if ".attn_q." in name else _kv_heads(file)
        )
    return values


def unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of q and k rows [heads·d, D]: rotary pairs adjacent → half a head
    apart.

    llama.cpp rotates rows 2i and 2i+1 of a head together, Hugging Face rows i and i + d/2. Its
    converter does so for the architecture `llama` alone.
    """
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def _number(file: GGUFFile, dtype: DType) -> type[np.floating]:
    if dtype == "auto":
        matrices = {
            tensor.tensor_type.name for tensor in file.tensors.values() if len(tensor.shape) > 1
        }
        dtype = "float32" if matrices == {"F32"} else "float16"
    return np.float32 if dtype == "float32" else np.float16


def _write_weights(
    file: GGUFFile, names: dict[str, str], number: type[np.floating], folder: Path
) -> None:
    """Safetensors of at most `SHARD_BYTES` each (a larger tensor alone), with an index if several."""
    from safetensors.numpy import save_file

    theirs = {ours: name for name, ours in names.items()}
    itemsize = np.dtype(number).itemsize
    sizes = {ours: int(file.tensors[name].n_elements) * itemsize for name, ours in names.items()}
    shards = in_shards(sizes, SHARD_BYTES)
    for name, keys in shards.items():
        arrays = {key: _stored(file, theirs[key], number) for key in keys}
        save_file(arrays, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        document = index_of(places_in(shards), sum(sizes.values()))
        (folder / INDEX).write_text(json.dumps(document, indent=2) + "\n")


def _stored(file: GGUFFile, name: str, number: type[np.floating]) -> np.ndarray:
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(read_tensor(file, name), number)
    if not np.isfinite(values).all():
        raise file.refused(
            f"tensor {name} has values that are not finite in {np.dtype(number).name}"
        )
    return values


def _short(value: Any) -> str:
    """A value in a message, cut where it is long."""
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}…"


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """A folder to fill that becomes `folder` at the end, or is removed when anything fails."""
    from safetensors import SafetensorError

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with made_whole(folder) as partial:
            yield partial
    except (OSError, SafetensorError) as error:
        if isinstance(error, DistillError):
            raise
        if folder.is_dir():  # another process was faster, with the same content
            return
        why = f"{folder}: cannot be written ({one_line(error)})"
        raise ModelError(
            f"{why}; {remedy(error)}, or set MLX_DISTILL_CACHE to another one"
        ) from error
