"""A folder's tokenizer gives the ids of its tokenizer.json, whatever class its config names."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from mlx_distill.errors import ModelError
from mlx_distill.models.hub import load_tokenizer
from mlx_distill.models.tokenizer import PROBES, make_open_as_file

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("1", "2"), ("Ġ", "1"), ("Ċ", "Ċ"), ("t", "h"), ("th", "e")]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), PLAIN])


def tokenizer_folder(folder: Path, kind: str = "GPT2Tokenizer", splitting=DIGITS, **config) -> Path:
    """As SmolLM-135M-Instruct's: a byte-level BPE that parts digits, under the name of a class that
    does not.
    """
    tokens = [*CONTROL, *ALPHABET, *("".join(pair) for pair in MERGES)]
    core = Tokenizer(models.BPE({token: place for place, token in enumerate(tokens)}, MERGES))
    core.pre_tokenizer, core.decoder = splitting, decoders.ByteLevel()
    core.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in CONTROL]
    )
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    document = {
        "tokenizer_class": kind,
        "eos_token": "<|im_end|>",
        "bos_token": "<|im_start|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 2048,
        "add_prefix_space": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(document | config))
    return folder


def file_ids(folder: Path, text: str) -> list[int]:
    return (
        Tokenizer.from_file(str(folder / "tokenizer.json"))
        .encode(text, add_special_tokens=False)
        .ids
    )


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_transformers_loses_the_digits_and_we_do_not(tmp_path: Path):
    folder = tokenizer_folder(tmp_path)
    spoiled = "12 + 1 = 13\n\n<|im_end|>"
    assert ids(AutoTokenizer.from_pretrained(folder), spoiled) != file_ids(
        folder, spoiled
    )  # or all of this can go
    tokenizer = load_tokenizer(folder)
    for text in (spoiled, *PROBES):
        assert ids(tokenizer, text) == file_ids(folder, text), text
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (
        "<|im_end|>",
        "<|im_start|>",
        "<|im_end|>",
    )
    assert tokenizer.model_max_length == 2048
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert turn == "<|im_start|>the<|im_end|>"


def test_a_class_that_keeps_the_file_is_kept(tmp_path: Path):
    folder = tokenizer_folder(tmp_path, splitting=PLAIN)
    assert type(load_tokenizer(folder)).__name__ == "GPT2Tokenizer"


@pytest.mark.parametrize(
    "kind",
    [
        "LlamaTokenizer",
        "LlamaTokenizerFast",
        "Qwen2Tokenizer",
        "PreTrainedTokenizerFast",
        "NoSuchClass",
    ],
)
def test_other_classes_over_the_same_file(kind: str, tmp_path: Path):
    """DeepSeek's distilled Qwens name Llama's class over a byte-level file."""
    folder = tokenizer_folder(tmp_path, kind)
    tokenizer = load_tokenizer(folder)
    for text in PROBES:
        assert ids(tokenizer, text) == file_ids(folder, text), text


def test_tokens_that_the_config_adds_are_tokens(tmp_path: Path):
    added = {
        "300": {
            "content": "<think>",
            "special": False,
            "normalized": False,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
        }
    }
    size = len(CONTROL) + len(ALPHABET) + len(MERGES)
    folder = tokenizer_folder(tmp_path, added_tokens_decoder={str(size): added["300"]})
    tokenizer = load_tokenizer(folder)
    assert ids(tokenizer, "12<think>") == [*file_ids(folder, "12"), size]


def test_a_file_that_cuts_and_fills_is_no_difference(tmp_path: Path):
    folder = tokenizer_folder(tmp_path, splitting=PLAIN)
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.enable_truncation(3)
    core.enable_padding(length=64)
    core.save(str(folder / "tokenizer.json"))
    assert len(ids(load_tokenizer(folder), "the the the")) == 5


def test_what_neither_class_gives_is_refused_with_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tokenizer_folder(
        tmp_path, "PreTrainedTokenizerFast", splitting=PLAIN, add_prefix_space=True
    )
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    monkeypatch.setattr("mlx_distill.models.tokenizer._file", lambda folder: core)
    core.normalizer = normalizers.Lowercase()
    with pytest.raises(
        ModelError, match=r"other ids than tokenizer\.json for 'In 2024, .*', as "
    ) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_an_exported_folder_opens_as_its_file(tmp_path: Path):
    folder = tokenizer_folder(tmp_path)
    make_open_as_file(folder)
    assert ids(AutoTokenizer.from_pretrained(folder), "12 1") == file_ids(folder, "12 1")
    kept = json.loads((folder / "tokenizer_config.json").read_text())
    assert (
        kept["tokenizer_class"] == "PreTrainedTokenizerFast" and kept["chat_template"] == TEMPLATE
    )


def test_and_is_left_alone_where_it_does(tmp_path: Path):
    folder = tokenizer_folder(tmp_path, splitting=PLAIN)
    before = (folder / "tokenizer_config.json").read_bytes()
    make_open_as_file(folder)
    assert (folder / "tokenizer_config.json").read_bytes() == before


def test_a_tokenizer_is_read_once_as_long_as_its_files_are_the_same(tmp_path: Path):
    folder = tokenizer_folder(tmp_path)
    first = load_tokenizer(folder)
    assert load_tokenizer(folder) is first
    config = folder / "tokenizer_config.json"
    before = config.stat()
    config.write_text(config.read_text().replace(TEMPLATE, TEMPLATE[::-1]))
    os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_tokenizer(folder).chat_template == TEMPLATE[::-1] != first.chat_template
