"""What a model wrote → `TokenSequence`: the ids as they were written, never tokenised again.

In: the ids of a generation prompt and the new ids that followed. Out: a sequence that knows its
segments. Decided here: where the chain of thought ends, which is after the first `</think>` and the
white space behind it; a text without one is all chain of thought, a prefix to be learned as such.
"""

from bisect import bisect_left, bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from mlx_distill.data.sequences import THINK_TAGS, TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def written_sequence(
    name: str,
    prompt: list[int],
    prompt_end: int,
    written: list[int],
    tokenizer: "PreTrainedTokenizerFast",
) -> TokenSequence:
    """The sequence `prompt` + `written` under an id; every token may carry loss.

    `prompt_end`: how many ids of the prompt belong to it; what follows is a `<think>` that the
    chat template opens.
    """
    tokens = np.array([*prompt, *written], np.int32)
    closing, end = closing_and_end(written, tokenizer)
    return TokenSequence(
        name,
        tokens,
        prompt_end,
        cot_end=len(prompt) + end,
        allowed=np.ones(len(tokens), bool),
        closing=-1 if closing < 0 else len(prompt) + closing,
    )


def closing_and_end(written: list[int], tokenizer: "PreTrainedTokenizerFast") -> tuple[int, int]:
    """Where among the ids `</think>` begins, -1 where it is not, and how many of them belong to the
    chain of thought.

    The ids are decoded one by one: the tag is ASCII, which no tokenizer splits within a character,
    so that the text between may be garbled and the tag is found all the same.
    """
    pieces = tokenizer.batch_decode([[token] for token in written], skip_special_tokens=False)
    text = "".join(pieces)
    at = text.find(THINK_TAGS[1])
    if at < 0:
        return -1, len(written)
    answer = at + len(THINK_TAGS[1])
    answer += len(text[answer:]) - len(text[answer:].lstrip())
    begins = [0, *accumulate(map(len, pieces))]
    return bisect_right(begins, at) - 1, bisect_left(begins, answer)
