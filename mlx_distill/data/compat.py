"""`data.compat = "paper"`: what the paper's public code does otherwise, a function each.

In: examples and sequences. Out: sequences as weiruichen01/distilling-the-essence (b55aaf8, BSD-2)
makes them. Decided here, each with the correct form that the other settings have:

- `whole_conversation`: the finished conversation goes through the chat template, system text
  dropped, and a stray generation prompt ends it. (Correct: nothing follows the end of turn.)
- `said`: white space around reasoning and answer stays as the row has it, as far as the template
  leaves it. (Correct: it is trimmed.)
- `end_of_cot`: the line break after `</think>` belongs to the chain of thought where that is
  learned, and to the answer where it is not, or where `keep = "cot"` cuts the answer off. (Correct:
  to the chain of thought.)
- `validated`: validation sequences are cut as training ones are. (Correct: they are whole.)
- `mean_of_means`: the loss, of training and validation, is the mean over sequences of each one's
  mean. (Correct: one sum over all tokens, divided once.)

Two more are settings: `batch.shuffle = false`, and `batch.global_batch_size = 4`, for its gradient
accumulation is never used. Its forward KL is a cross-entropy, which is the KL plus the teacher's entropy: the gradient is the
same, and the number that is logged here is the KL. Its lists of rows, tied to one revision of each
dataset, are here `longest_tokens`.
"""

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mlx_distill.data.examples import Example, Skip
from mlx_distill.data.sequences import THINK_TAGS, TokenSequence
from mlx_distill.data.template import chat_template
from mlx_distill.data.truncate import truncate
from mlx_distill.files import all_lines
from mlx_distill.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MARKS = (
    ("<|begin_of_solution|>\n\n", ""),
    ("\n\n<|end_of_solution|>", ""),
    ("<|begin_of_thought|>", THINK_TAGS[0]),
    ("<|end_of_thought|>", THINK_TAGS[1]),
)


def whole_conversation(
    example: Example,
    tokenizer: "PreTrainedTokenizerFast",
    segments: tuple[str, ...],
    keep: str = "prefix",
) -> TokenSequence:
    """The example through the chat template, all of it. Raises `Skip` where the template refuses it,
    and where `<think>` or `</think>` cannot be found in its tokens.
    """
    turns = [{"role": turn[0], "content": turn[1]} for turn in example.turns if turn[0] != "system"]
    try:
        text = tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": said(example)}],
            chat_template=chat_template(tokenizer),
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
    except Exception as error:  # jinja2's own kinds, and what a template raises about roles
        raise Skip(f"the chat template refuses it ({all_lines(error, 120)})") from None
    tokens = tokenizer(text)["input_ids"]
    begin, closing = (_found(tag, tokens, tokenizer) for tag in THINK_TAGS)
    closed = closing + len(tokenizer.encode(THINK_TAGS[1], add_special_tokens=False))
    return TokenSequence(
        id=example.id,
        tokens=np.asarray(tokens, np.int32),
        prompt_end=begin,
        cot_end=end_of_cot(closed, segments, keep),
        allowed=np.ones(len(tokens), bool),
        closing=closing,
    )


def said(example: Example) -> str:
    """The turn that answers, marks of the Stratos family as tags."""
    if not example.said:
        return f"<think>\n{example.cot}\n</think>\n\n{example.answer}"
    text = example.said
    for mark, tag in MARKS:
        text = text.replace(mark, tag)
    return text


def dropped(example: Example) -> Counter[str]:
    """What the public code does not read of an example, by its name."""
    systems = sum(turn[0] == "system" for turn in example.turns)
    keyed = sum(len(turn) > 2 for turn in example.turns)
    names = {"system text": systems, "keys of a message": keyed, "tools": int(bool(example.tools))}
    return Counter({f'{name} (data.compat = "paper")': n for name, n in names.items() if n})


def _found(tag: str, tokens: list[int], tokenizer: "PreTrainedTokenizerFast") -> int:
    """Where a tag's ids begin for the first time."""
    ids = tokenizer.encode(tag, add_special_tokens=False)
    for place in range(len(tokens) - len(ids) + 1):
        if tokens[place : place + len(ids)] == ids:
            return place
    raise Skip(f"no {tag} in its tokens")


def end_of_cot(closed: int, segments: tuple[str, ...], keep: str) -> int:
    """Where the answer begins, after a `</think>` that ends at `closed`."""
    return closed + 1 if "cot" in segments and keep != "cot" else closed


def validated(sequence: TokenSequence, recipe: Recipe) -> TokenSequence:
    """A validation sequence, cut, that counts as one in the loss of the segments that are learned;
    without an ending, which the public code does not have and no teacher is asked about.
    """
    table = recipe.truncation.model_copy(update={"ending": "none"})
    return mean_of_means(truncate(sequence, table), recipe.objective.segments)


def mean_of_means(sequence: TokenSequence, segments: tuple[str, ...]) -> TokenSequence:
    """The sequence with a weight that makes its loss count as one, however long it is."""
    return replace(sequence, weight=1.0 / max(1, int(sequence.supervised(segments).sum())))
