"""A `.gguf` written from a known model comes back as that model: tensors, logits, token ids; the
rest is refused.

The files are tiny, random and written here with the `gguf` package's own writer, their q and k rows
reordered the way llama.cpp's converter does. The real SmolLM2 and the real Qwen3 and Llama 3
vocabularies are `network` tests.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from mlx_lm.models import llama, qwen2, qwen3
from mlx_lm.utils import load_model
from safetensors.numpy import load_file
from tokenizers import Tokenizer, pre_tokenizers

from mlx_distill.errors import ModelError, NotFound
from mlx_distill.models import hub
from mlx_distill.models.gguf.convert import DType, convert
from mlx_distill.models.gguf.file import GGUFFile
from mlx_distill.models.gguf.tensors import BLOCK_TENSORS, EXTRA_BLOCK_TENSORS
from mlx_distill.models.gguf.tokenizer import build_tokenizer

LAYERS, WIDTH, HEADS, KV_HEADS, FFN = 2, 64, 4, 2, 96
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["t h", "th e", "Ġ the", "1 2", "12 3", "Ċ Ċ", "< th"]
TOKENS = [
    *SPECIAL,
    *ALPHABET,
    *(merge.replace(" ", "") for merge in MERGES),
    "<think>",
    "</think>",
    "[PAD1]",
]
TYPES = [3] * len(SPECIAL) + [1] * (len(ALPHABET) + len(MERGES)) + [4, 4, 5]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
FAMILIES = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3}
IDS = mx.array([[3, 17, 250, 99, 4, 4, 61, 120]])


def source_model(family: str, tied: bool = True, **changes: Any) -> Any:
    """A random mlx-lm model of the family: the truth that a conversion is held against."""
    arguments = dict(
        model_type=family,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        intermediate_size=FFN,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=WIDTH // HEADS,
        rms_norm_eps=1e-5,
        vocab_size=len(TOKENS),
        max_position_embeddings=512,
        rope_theta=5000.0,
        tie_word_embeddings=tied,
    )
    mx.random.seed(7)
    module = FAMILIES[family]
    model = module.Model(module.ModelArgs.from_dict(arguments | changes))
    weights = [(name, mx.random.normal(value.shape) * 0.3) for name, value in parameters(model)]
    model.load_weights(weights)
    return model


def parameters(model: Any) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


def logits(model: Any) -> np.ndarray:
    return np.array(model(IDS).astype(mx.float32))


def permute(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's own reordering (convert_hf_to_gguf.py, LlamaModel.permute)."""
    return (
        values.reshape(heads, 2, values.shape[0] // heads // 2, -1)
        .swapaxes(1, 2)
        .reshape(values.shape)
    )


def gguf_name(name: str, family: str) -> str:
    block = {
        ours_: theirs for theirs, ours_ in (BLOCK_TENSORS | EXTRA_BLOCK_TENSORS[family]).items()
    }
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    if not name.startswith("model.layers."):
        return top.get(name, "output.weight")
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{block[rest]}"


@dataclass
class Written:
    """What a test may change of the file it writes; `edit` sees the writer before the file is
    closed.
    """

    family: str = "llama"
    kind: Q = Q.F32
    pre: str = "smollm"
    vocabulary: str = "gpt2"
    architecture: str = ""
    leave_out: str = ""
    theta: float = 5000.0
    tokens: list[str] = field(default_factory=lambda: TOKENS)
    types: list[int] = field(default_factory=lambda: TYPES)
    merges: list[str] = field(default_factory=lambda: MERGES)
    edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None


def write(path: Path, model: Any, how: Written) -> Path:
    """Write the model's weights to a GGUF file, matrices quantised as `how.kind`, vectors in
    float32.
    """
    writer = gguf.GGUFWriter(path, how.architecture or how.family)
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(how.theta)
    writer.add_tokenizer_model(how.vocabulary)
    writer.add_tokenizer_pre(how.pre)
    writer.add_token_list(how.tokens)
    writer.add_token_types(how.types)
    writer.add_token_merges(how.merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for name, value in parameters(model):
        values = reordered(np.array(value), name, how.family)
        kind = how.kind if values.ndim > 1 else Q.F32
        if gguf_name(name, how.family) != how.leave_out:
            writer.add_tensor(
                gguf_name(name, how.family), gguf.quantize(values, kind), raw_dtype=kind
            )
    how.edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reordered(values: np.ndarray, name: str, family: str) -> np.ndarray:
    if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        return permute(values, HEADS if "q_proj" in name else KV_HEADS)
    return values


def converted(tmp_path: Path, model: Any, how: Written, dtype: DType = "auto") -> Path:
    folder = tmp_path / "model"
    convert(write(tmp_path / "tiny.gguf", model, how), folder, dtype)
    return folder


def open_mlx(folder: Path) -> Any:
    return load_model(folder)[0]


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_and_logits_come_back(family: str, kind: Q, tmp_path: Path) -> None:
    model = source_model(family)
    folder = converted(tmp_path, model, Written(family, kind), dtype="float32")
    stored = load_file(folder / "model.safetensors")
    expected = {name: np.array(value) for name, value in parameters(model)}
    for name, values in expected.items():
        if values.ndim > 1:
            expected[name] = gguf.dequantize(gguf.quantize(values, kind), kind)
    assert stored.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(stored[name], values, err_msg=name)
    model.load_weights([(name, mx.array(values)) for name, values in expected.items()])
    np.testing.assert_allclose(logits(open_mlx(folder)), logits(model), atol=1e-5)


def test_without_the_row_reordering_the_model_would_be_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = source_model("llama")
    monkeypatch.setattr("mlx_distill.models.gguf.tensors.unpermute", lambda values, heads: values)
    assert (
        np.abs(logits(open_mlx(converted(tmp_path, model, Written()))) - logits(model)).max() > 0.1
    )


def test_reordered_rows_mean_adjacent_pairs(tmp_path: Path) -> None:
    """Independent of any permutation: the file's own rows, rotated in adjacent pairs as llama.cpp
    does, agree.
    """
    path = write(tmp_path / "tiny.gguf", source_model("llama"), Written())
    raw = {tensor.name: mx.array(np.array(tensor.data)) for tensor in gguf.GGUFReader(path).tensors}
    adjacent = source_model("llama", rope_traditional=True)
    adjacent.load_weights(
        [(name, raw[gguf_name(name, "llama")]) for name, _ in parameters(adjacent)]
    )
    convert(path, tmp_path / "model")
    np.testing.assert_allclose(logits(open_mlx(tmp_path / "model")), logits(adjacent), atol=1e-5)


@pytest.mark.parametrize(
    "kind, dtype, stored",
    [(Q.F32, "auto", "float32"), (Q.Q4_1, "auto", "float16"), (Q.Q8_0, "float32", "float32")],
)
def test_number_type(kind: Q, dtype: DType, stored: str, tmp_path: Path) -> None:
    folder = converted(tmp_path, source_model("qwen2"), Written("qwen2", kind), dtype)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == stored
    assert {tensor.dtype.name for tensor in load_file(folder / "model.safetensors").values()} == {
        stored
    }


def test_untied_head_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_distill.models.gguf.convert.SHARD_BYTES", 50_000)
    model = source_model("llama", tied=False)
    folder = converted(tmp_path, model, Written())
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == {name for name, _ in parameters(model)} and len(set(index.values())) > 1
    assert not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    np.testing.assert_allclose(logits(open_mlx(folder)), logits(model), atol=1e-5)


def test_config_is_what_transformers_reads(tmp_path: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    folder = converted(tmp_path, source_model("qwen3"), Written("qwen3"))
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == (
        "qwen3",
        WIDTH,
        LAYERS,
    )
    assert (config.num_key_value_heads, config.head_dim, config.rms_norm_eps) == (
        KV_HEADS,
        16,
        1e-5,
    )
    assert config.rope_parameters["rope_theta"] == 5000.0
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [0, 2]


# --- rope scaling ---


def llama3_factors(factor: float, theta: float, head_dim: int) -> np.ndarray:
    """llama.cpp's own loop (convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors)."""
    found = []
    for frequency in 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4.0:
            found.append(1.0)
        elif wavelength > 8192 / 1.0:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def test_llama3_scaling_is_recovered_from_its_factors(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", llama3_factors(32.0, 500000.0, 16))

    model = source_model("llama", rope_theta=500000.0)
    folder = converted(tmp_path, model, Written(theta=500000.0, edit=edit))
    scaling = json.loads((folder / "config.json").read_text())["rope_scaling"]
    assert (
        scaling["rope_type"],
        scaling["factor"],
        scaling["original_max_position_embeddings"],
    ) == (
        "llama3",
        32,
        8192,
    )
    rope = open_mlx(folder).layers[0].self_attn.rope
    plain = 500000.0 ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(
        np.array(rope._freqs), plain * llama3_factors(32.0, 500000.0, 16), rtol=1e-4
    )


def test_other_factors_are_refused(tmp_path: Path) -> None:
    how = Written(
        edit=lambda writer: writer.add_tensor("rope_freqs.weight", np.full(8, 3.0, np.float32))
    )
    refused(tmp_path, how, "rope_freqs.weight is not the llama3 scaling")


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaling_by_name(kind: str, tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(128)

    scaling = {"rope_type": kind, "factor": 4.0} | (
        {"original_max_position_embeddings": 128} if kind == "yarn" else {}
    )
    model = source_model("qwen3", rope_scaling=scaling)
    folder = converted(tmp_path, model, Written("qwen3", edit=edit))
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] == scaling
    np.testing.assert_allclose(logits(open_mlx(folder)), logits(model), atol=1e-5)


# --- token ids ---


def tokenizer_of(tmp_path: Path, pre: str, **changes: Any) -> Any:
    return hub.load_tokenizer(
        converted(tmp_path, source_model("llama"), Written(pre=pre, **changes))
    )


def pieces(tokenizer: Any, text: str) -> list[str]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert (
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text
    )
    return tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "123", ["1", "2", "3"]),
        ("smollm", "\n\n5", ["ĊĊ", "5"]),  # a bare ByteLevel would split the line breaks
        ("smollm", " the", ["Ġthe"]),
        ("qwen2", "123", ["1", "2", "3"]),
        ("qwen2", "\n\n5", ["ĊĊ", "5"]),
        ("deepseek-r1-qwen", "123", ["1", "2", "3"]),
        ("llama-bpe", "123", ["123"]),  # groups of three digits
        ("llama-bpe", "<the", ["<", "the"]),
    ],
)
def test_pre_tokenizers(pre: str, text: str, expected: list[str], tmp_path: Path) -> None:
    assert pieces(tokenizer_of(tmp_path, pre), text) == expected


def test_special_and_added_tokens(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, "qwen2")
    assert pieces(tokenizer, "<think>1</think><|im_end|>") == [
        "<think>",
        "1",
        "</think>",
        "<|im_end|>",
    ]
    assert tokenizer.get_vocab() == {
        token: i for i, token in enumerate(TOKENS) if token != "[PAD1]"
    }
    assert tokenizer.decode([TOKENS.index("<think>"), 2], skip_special_tokens=True) == "<think>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert turn == "<|im_start|>the<|im_end|>"


def test_qwen_normalises_and_llama_does_not(tmp_path: Path) -> None:
    decomposed = "e\u0301"
    qwen = tokenizer_of(tmp_path, "qwen2")
    assert qwen.decode(qwen.encode(decomposed)) == "é"
    (tmp_path / "model").rename(tmp_path / "qwen")
    assert pieces(tokenizer_of(tmp_path, "llama-bpe"), decomposed)


@pytest.mark.parametrize("pre, first", [("smollm", []), ("llama-bpe", [1])])
def test_beginning_of_sequence_follows_the_family(
    pre: str, first: list[int], tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(tmp_path, pre)
    assert tokenizer("the")["input_ids"] == [*first, TOKENS.index("the")]
    assert tokenizer("the", add_special_tokens=False)["input_ids"] == [TOKENS.index("the")]


def test_beginning_of_sequence_as_the_file_says(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, "smollm", edit=lambda writer: writer.add_add_bos_token(True))
    assert tokenizer("the")["input_ids"][0] == 1


# --- what is refused, and what is left behind ---


def refused(tmp_path: Path, how: Written, *parts: str) -> None:
    path = write(tmp_path / "tiny.gguf", source_model(how.family), how)
    with pytest.raises(ModelError) as error:
        convert(path, tmp_path / "model")
    for part in (str(path), *parts):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize(
    ("how", "part"),
    [
        (Written(architecture="gemma3"), "architecture 'gemma3' is not one of llama, qwen2, qwen3"),
        (
            Written(pre="tekken"),
            "pre-tokenizer 'tekken' is not one of smollm, gpt-2, qwen2, deepseek-r1-qwen, llama-bpe",
        ),
        (Written(vocabulary="llama"), "of the kind 'llama'"),
        (Written(leave_out="blk.1.ffn_up.weight"), "tensor blk.1.ffn_up.weight is missing"),
        (
            Written(edit=lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(4, np.float32))),
            "blk.0.attn_q.bias",
        ),
        (Written(edit=lambda w: w.add_expert_count(8)), "mixture of experts"),
        (Written(edit=lambda w: w.add_uint16("split.count", 3)), "one part of a split file"),
        (Written(edit=lambda w: w.add_rope_dimension_count(8)), "rope.dimension_count 8 differs"),
        (
            Written(edit=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)),
            "rope scaling 'longrope'",
        ),
        (Written(tokens=[*TOKENS, "more"], types=[*TYPES, 1]), "embedding rows for"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(how: Written, part: str, tmp_path: Path) -> None:
    refused(tmp_path, how, part, "use the model's Hugging Face folder instead")


def test_quantisation_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dequantize(data: np.ndarray, kind: Q) -> np.ndarray:
        raise NotImplementedError

    monkeypatch.setattr("gguf.quants.dequantize", dequantize)
    refused(tmp_path, Written(kind=Q.Q8_0), "is quantised as", "cannot be read")


def test_values_beyond_float16(tmp_path: Path) -> None:
    model = source_model("qwen2")
    model.model.embed_tokens.weight = model.model.embed_tokens.weight * 1e6
    path = write(tmp_path / "tiny.gguf", model, Written("qwen2"))
    with pytest.raises(ModelError, match="not finite in float16"):
        convert(path, tmp_path / "model", dtype="float16")
    assert not (tmp_path / "model").exists()


def test_damaged_missing_and_occupied(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", source_model("llama"), Written())
    (tmp_path / "half.gguf").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "text.gguf").write_text("not a model at all")
    for name in ("half.gguf", "text.gguf"):
        with pytest.raises(ModelError, match=f"{name}.*not a whole .gguf file"):
            convert(tmp_path / name, tmp_path / "model")
    with pytest.raises(NotFound, match="no such file"):
        convert(tmp_path / "none.gguf", tmp_path / "model")
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match="already exists"):
        convert(path, tmp_path / "model")


def test_disk_full_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_file(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", save_file)
    path = write(tmp_path / "tiny.gguf", source_model("llama"), Written())
    with pytest.raises(ModelError, match=r"No space left on device.*free some disk"):
        convert(path, tmp_path / "model")
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_recipe_may_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_DISTILL_CACHE", str(tmp_path / "cache"))
    model = source_model("llama")
    path = write(tmp_path / "tiny.gguf", model, Written())
    folder = hub.model_folder(str(path))
    np.testing.assert_allclose(logits(open_mlx(folder)), logits(model), atol=1e-5)
    assert hub.model_folder(str(path)) == folder


# --- what no file may make us believe ---


def patched(raw: bytes, key: str, value: bytes) -> bytes:
    """A file with other bytes at the place of a field's value."""
    place = raw.index(key.encode()) + len(key) + 4
    return raw[:place] + value + raw[place + len(value) :]


def u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    return write(
        tmp_path_factory.mktemp("whole") / "m.gguf", source_model("llama"), Written()
    ).read_bytes()


LYING = {
    "blocks": (
        lambda raw: patched(raw, "llama.block_count", u32(2**30)),
        r"block_count 1073741824 for 20 tensors",
    ),
    "one block less": (
        lambda raw: patched(raw, "llama.block_count", u32(1)),
        r"tensor blk\.1\.\S+ is not one of",
    ),
    "no token": (
        lambda raw: patched(raw, "tokenizer.ggml.bos_token_id", u32(2**32 - 1)),
        r"bos_token_id is 4294967295, but there are",
    ),
    "no end": (
        lambda raw: patched(raw, "tokenizer.ggml.eos_token_id", u32(len(TOKENS))),
        r"eos_token_id is \d+, but there are",
    ),
    "heads": (
        lambda raw: patched(raw, "llama.attention.head_count", u32(2**32 - 1)),
        r"head_count is 4294967295, a whole number",
    ),
    "three heads": (
        lambda raw: patched(raw, "llama.attention.head_count", u32(3)),
        r"a head is 21 wide",
    ),
    "two heads": (
        lambda raw: patched(raw, "llama.attention.head_count", u32(2)),
        r"blk\.0\.attn_k\.weight has the shape \[32, 64\]",
    ),
    "kv heads": (
        lambda raw: patched(raw, "llama.attention.head_count_kv", u32(3)),
        r"4 heads are no multiple of 3",
    ),
    "ffn": (
        lambda raw: patched(raw, "llama.feed_forward_length", u32(7)),
        r"ffn_gate\.weight has the shape \[96, 64\].*ask for \[7, 64\]",
    ),
    "width": (
        lambda raw: patched(raw, "llama.embedding_length", u32(32)),
        r"has the shape \[\d+, 64\], its fields ask for \[\d+, 32\]",
    ),
    "context": (
        lambda raw: patched(raw, "llama.context_length", u32(2**32 - 1)),
        r"context_length is 4294967295, a whole number from 1",
    ),
    "theta": (
        lambda raw: patched(raw, "llama.rope.freq_base", u32(0x7FC00000)),
        r"rope\.freq_base is nan, a number from 1",
    ),
    "eps": (
        lambda raw: patched(raw, "llama.attention.layer_norm_rms_epsilon", u32(0)),
        r"epsilon is 0\.0, a number from",
    ),
    "tokens": (
        lambda raw: patched(raw, "tokenizer.ggml.tokens", u32(8) + u64(2**60)),
        r"1,152,921,504,606,846,976 values of an array",
    ),
    "types": (
        lambda raw: patched(raw, "tokenizer.ggml.token_type", u32(5) + u64(2**61)),
        r"values of an array in a file of",
    ),
    "text": (
        lambda raw: patched(raw, "tokenizer.chat_template", u64(2**40)),
        r"1,099,511,627,776 bytes are asked at byte",
    ),
    "fields": (
        lambda raw: raw[:16] + u64(2**62) + raw[24:],
        r"4,611,686,018,427,387,904 fields in a file",
    ),
    "tensors": (
        lambda raw: raw[:8] + u64(2**62) + raw[16:],
        r"4,611,686,018,427,387,904 tensors in a file",
    ),
    "version": (lambda raw: raw[:4] + u32(99) + raw[8:], r"version 99"),
    "dimensions": (
        lambda raw: patched(raw, "output_norm.we", u32(2**31)),
        r"output_norm\.weight has 2147483648 dimensions",
    ),
    "rows": (
        lambda raw: patched(raw, "token_embd.we", u32(2) + u64(64) + u64(2**50)),
        r"tensor token_embd\.weight ends at byte",
    ),
    "cut": (lambda raw: raw[:-64], r"ends at byte"),
    "empty": (lambda raw: b"", r"0 bytes"),
}


@pytest.mark.parametrize("lie", LYING)
def test_a_lying_header_is_refused_at_the_door(lie: str, whole: bytes, tmp_path: Path) -> None:
    """Before memory is taken: the library that reads it next would reserve what it asks for."""
    change, expected = LYING[lie]
    path = tmp_path / "n.gguf"
    path.write_bytes(change(whole))
    with pytest.raises(ModelError, match=expected) as error:
        convert(path, tmp_path / "out")
    assert "\n" not in str(error.value) and [file.name for file in tmp_path.iterdir()] == ["n.gguf"]


def test_damaged_files_are_refused_or_converted(whole: bytes, tmp_path: Path) -> None:
    """200 of them, damaged where the header is: no traceback, and what is accepted opens with
    finite logits.
    """
    chance, refusals = random.Random(9), 0
    for number in range(200):
        content = bytearray(whole)
        place = chance.randrange(9000)
        match chance.randrange(4):
            case 0:
                content[place] ^= 1 << chance.randrange(8)
            case 1:
                content[place : place + 8] = chance.choice((u64(2**40), u64(2**64 - 1), u64(0)))
            case 2:
                del content[place : place + chance.choice((1, 4, 8))]
            case 3:
                del content[24 + place * 30 :]
        path, folder = tmp_path / "n.gguf", tmp_path / str(number)
        path.write_bytes(content)
        try:
            convert(path, folder)
        except ModelError as error:
            refusals += 1
            assert "\n" not in str(error)
        else:
            assert np.isfinite(logits(open_mlx(folder))).all()
    assert 100 < refusals < 200


NOT_OURS = {
    "sliding window": lambda w: w.add_sliding_window(128),
    "attention scale": lambda w: w.add_float32("llama.attention.scale", 0.5),
    "soft cap": lambda w: w.add_float32("llama.final_logit_softcapping", 30.0),
    "not causal": lambda w: w.add_causal_attention(False),
    "yarn's own factor": lambda w: w.add_rope_scaling_attn_factors(2.0),
    "logit scale": lambda w: w.add_logit_scale(0.5),
    "vocabulary": lambda w: w.add_vocab_size(3),
    "factor below 0": lambda w: w.add_rope_scaling_factor(-2.0),
}


@pytest.mark.parametrize("key", NOT_OURS)
def test_what_would_be_computed_otherwise_is_refused(key: str, tmp_path: Path) -> None:
    how = Written(edit=NOT_OURS[key])
    refused(tmp_path, how, "use the model's Hugging Face folder instead")


def test_neutral_values_are_no_reason(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_sliding_window(512)  # the context's length
        writer.add_causal_attention(True)
        writer.add_logit_scale(1.0)
        writer.add_expert_count(0)
        writer.add_vocab_size(len(TOKENS))
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)  # without a factor: none

    model = source_model("llama")
    folder = converted(tmp_path, model, Written(edit=edit))
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] is None
    np.testing.assert_allclose(logits(open_mlx(folder)), logits(model), atol=1e-5)


@pytest.mark.parametrize("key", ["llama.rope.scaling.factor", "llama.rope.scale_linear"])
def test_a_factor_without_a_type_is_linear(key: str, tmp_path: Path) -> None:
    """As llama.cpp has it."""
    folder = converted(
        tmp_path, source_model("llama"), Written(edit=lambda writer: writer.add_float32(key, 4.0))
    )
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] == {
        "rope_type": "linear",
        "factor": 4.0,
    }


SCALINGS = {
    "none": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_libraries_read_the_rotary_keys(family: str, kind: str, tmp_path: Path) -> None:
    """mlx-lm at the top level of config.json, transformers by its own translation: the same logits."""
    import torch
    from transformers import AutoModelForCausalLM

    def edit(writer: gguf.GGUFWriter) -> None:
        if kind != "none":
            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
            writer.add_rope_scaling_factor(4.0)
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(128)
            writer.add_rope_scaling_yarn_beta_fast(16.0)
            writer.add_rope_scaling_yarn_beta_slow(2.0)

    folder = converted(tmp_path, source_model(family), Written(family, edit=edit))
    config = json.loads((folder / "config.json").read_text())
    assert (config["rope_scaling"] or {}) == SCALINGS[kind] and config["rope_theta"] == 5000.0
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.rope_parameters["rope_theta"] == 5000.0
    with torch.no_grad():
        theirs = model(torch.tensor(np.array(IDS).astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(logits(open_mlx(folder)), theirs, atol=2e-4 * np.abs(theirs).max())


# --- the real ones ---


@pytest.mark.network
@pytest.mark.parametrize("name, pre", [("qwen3", "qwen2"), ("llama3", "llama-bpe")])
def test_real_vocabulary_gives_the_ids_of_its_own_tokenizer(
    name: str, pre: str, tokenizer_folder: Callable[[str], Path]
) -> None:
    folder = tokenizer_folder(name)
    real = Tokenizer.from_file(str(folder / "tokenizer.json"))
    document = json.loads(real.to_str())
    added = {entry["id"]: 3 if entry["special"] else 4 for entry in document["added_tokens"]}
    tokens = [real.id_to_token(i) for i in range(real.get_vocab_size())]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [added.get(i, 1) for i in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in document["model"]["merges"]],
        "tokenizer.ggml.add_bos_token": False,
    }
    built = build_tokenizer(GGUFFile(folder, metadata, {}))
    assert (
        json.loads(built.to_str())["pre_tokenizer"]["pretokenizers"][0]
        == document["pre_tokenizer"]["pretokenizers"][0]
    )
    for text in sample_texts():
        assert (
            built.encode(text, add_special_tokens=False).ids
            == real.encode(text, add_special_tokens=False).ids
        ), text


def sample_texts() -> list[str]:
    generator = np.random.default_rng(0)
    bits = [
        "a",
        "The",
        " the",
        "\n",
        "7",
        "1234",
        "'S",
        "é",
        "e\u0301",
        "½",
        "٣",
        "漢字",
        "<",
        "think>",
        "<think>",
        "</think>",
    ]
    bits += ["\t", "<|im_end|>", "<|eot_id|>", "\r\n", "  ", "😀", "...", "#### 42", "<<3*4=12>>"]
    return ["".join(generator.choice(bits, generator.integers(1, 20))) for _ in range(500)]


@pytest.mark.network
def test_real_smollm2(smollm2_gguf: Path, tmp_path: Path) -> None:
    convert(smollm2_gguf, tmp_path / "model", dtype="float32")
    tokenizer = hub.load_tokenizer(tmp_path / "model")
    assert tokenizer("<think>")["input_ids"] == [44, 17400, 46]
    assert tokenizer("</think>")["input_ids"] == [9617, 17400, 46]
    question = [{"role": "user", "content": "What is 12 + 30? Think step by step."}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    # what transformers' own import of the file writes, too
    answer = tokenizer("12 + 30 =")["input_ids"]
    model = open_mlx(tmp_path / "model")
    likely = mx.argmax(model(mx.array([ids + answer[:-1]]))[0, len(ids) - 1 :], axis=-1)
    assert likely.tolist() == answer
