"""The embedded pair's tokenizer: one token per byte, and the markers of a chat.

In: nothing; the vocabulary is fixed. Out: a folder with `tokenizer.json`, `tokenizer_config.json`
and `chat_template.jinja` that transformers and mlx-lm open. Decided here: every byte of UTF-8 is a
token (a character of ASCII is therefore one token, and any text survives encoding and decoding
exactly); the markers of a chat, the tags of a chain of thought and the three names of roles are one
token each, so that the layout takes few tokens of a short sequence; the layout is Qwen's.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
MARKERS = (PAD, "<|im_start|>", END_OF_TURN)
THINK_TAGS = ("<think>", "</think>")
ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' and message['reasoning_content'] is defined and message['reasoning_content'] and loop.last %}
{{- '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' }}
{%- endif %}
{{- message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: 3 markers, 2 tags, 3 roles, 256 bytes. `<|im_end|>` ends a sequence,
    `<|endoftext|>` pads it.
    """
    names = (*MARKERS, *THINK_TAGS, *ROLES, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = Tokenizer(
        models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in MARKERS]
    )
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in THINK_TAGS])
    tokenizer.add_tokens(
        [AddedToken(name, special=False, normalized=False, single_word=True) for name in ROLES]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def write_tokenizer(folder: Path) -> None:
    """Write the tokenizer's files into `folder`, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save_pretrained(folder)
