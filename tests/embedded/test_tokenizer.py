"""The byte tokenizer: exact both ways, one token per character, Qwen's layout, opened by
transformers and mlx-lm.
"""

import pytest
from transformers import AutoTokenizer

from mlx_distill.embedded.tokenizer import MARKERS, ROLES, THINK_TAGS, write_tokenizer

TEXTS = [
    "K3705",
    "aL2705\nbQ2605",
    "",
    "\n",
    "\n\n  two  spaces \t",
    " leading",
    "users and assistants",
    "system user assistant",
    "naïve 你好 🙂",
    "<think>\naB0001\n</think>\n\nB<|im_end|>",
    "don 't , it 's .",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "embedded"
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_returns_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_mlx_lm_reads_the_same_tokens(folder, tokenizer, text):
    load_tokenizer = pytest.importorskip("mlx_lm.utils").load_tokenizer
    wrapped = load_tokenizer(folder)
    ids = wrapped.encode(text)
    assert ids == tokenizer.encode(text)
    assert wrapped.eos_token_ids == {tokenizer.eos_token_id}
    stream = wrapped.detokenizer
    for token in ids:
        stream.add_token(token)
    stream.finalize()
    assert stream.text == text.removeprefix(" ")  # mlx-lm's own stream drops the first space


def test_the_files_are_there(folder):
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {
        path.name for path in folder.iterdir()
    }


def test_markers_tags_and_roles_are_one_token_each(tokenizer):
    for name in (*MARKERS, *THINK_TAGS, *ROLES):
        assert len(tokenizer.encode(name)) == 1
    printable = [chr(code) for code in range(32, 127)] + ["\n"]
    assert all(len(tokenizer.encode(character)) == 1 for character in printable)
    assert len({tokenizer.encode(character)[0] for character in printable}) == len(printable)
    assert len(tokenizer) == 8 + 256


def test_end_and_padding_differ(tokenizer):
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_the_layout_is_qwens(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A0010"},
        {"role": "assistant", "content": "L"},
        {"role": "user", "content": "B1000"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe "
        "brief.<|im_end|>\n<|im_start|>user\nA0010<|im_end|>\n<|im_start|>assistant\nL<|im_end|>\n"
        "<|im_start|>user\nB1000<|im_end|>\n<|im_start|>assistant\n"
    )
    worked = [
        {"role": "user", "content": "A1000"},
        {"role": "assistant", "content": "B", "reasoning_content": "aB0000"},
    ]
    assert tokenizer.apply_chat_template(worked, tokenize=False).endswith(
        "<|im_start|>assistant\n<think>\naB0000\n</think>\n\nB<|im_end|>\n"
    )
