"""`Example` → `TokenSequence`: token ids that know where the prompt and the chain of thought end.

In: an example and a fast tokenizer with a chat template. Out: `int32[T]`, two half-open segment ends
and where `</think>` begins. Decided here:

- The layout `{prompt}<think>\\n{cot}\\n</think>\\n\\n{answer}{end of turn}`, where only `{prompt}`
  goes through the chat template (templates rewrite, move or delete reasoning). `<think>`,
  `</think>` and the line breaks after each belong to the chain of thought, the end-of-turn token to
  the answer.
- A template whose generation prompt already ends in `<think>` and white space gets no second one:
  the prompt segment ends before that `<think>`, and the token ids are what the template would have
  made.
- The whole text is tokenised once and the ends are made there, from the tokenizer's offsets. A
  token that straddles a boundary belongs to the segment in which its first character lies.
- Text that would be read as a control token (a literal `</think>` in an answer, `<|im_end|>` in a
  prompt) is refused with `Skip`, to be counted, never escaped or repaired.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mlx_distill.data.examples import Example, Skip, Turns
from mlx_distill.data.rendering import SENTINEL
from mlx_distill.data.template import chat_template, prompt_text
from mlx_distill.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

THINK_TAGS = ("<think>", "</think>")
OPENING = re.compile(r"<think>(\s*)\Z")


class Segment(IntEnum):
    """What a token belongs to; the value indexes per-segment sums."""

    PROMPT = 0
    COT = 1
    ANSWER = 2


@dataclass(frozen=True)
class TokenSequence:
    """Token ids `int32[T]` and the two half-open segment ends made when they were rendered.

    prompt = [0, prompt_end), cot = [prompt_end, cot_end), answer = [cot_end, T).
    `allowed` `bool[T]` says which tokens a truncation lets carry loss; the segments to supervise
    are chosen later. `closing` is the token with which `</think>` begins, -1 where there is none.
    The last `ending` tokens were put after a cut: they carry loss whatever the segments are, and
    learn from the text alone, for a teacher's answers to the whole sequence are not to them. `weight` multiplies
    the loss of each token.
    """

    id: str
    tokens: np.ndarray
    prompt_end: int
    cot_end: int
    allowed: np.ndarray
    closing: int = -1
    ending: int = 0
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.tokens)

    def segments(self) -> np.ndarray:
        """`int8[T]`: the `Segment` of each token."""
        segment = np.full(len(self.tokens), Segment.ANSWER, np.int8)
        segment[: self.cot_end] = Segment.COT
        segment[: self.prompt_end] = Segment.PROMPT
        return segment

    def supervised(self, segments: tuple[str, ...]) -> np.ndarray:
        """`bool[T]`: the tokens that carry loss when `segments` (of "prompt", "cot", "answer") are
        supervised.

        The first token has no predecessor to be predicted from, so it never does.
        """
        chosen = np.isin(self.segments(), [Segment[name.upper()] for name in segments])
        mask = chosen & self.allowed
        mask[len(self) - self.ending :] = True
        mask[:1] = False
        return mask


class Assembled(NamedTuple):
    """The whole text of an example, and where in it the prompt ends, the answer begins and
    `</think>` begins, in characters; -1 for an example without a solution, which is its prompt.
    """

    id: str
    text: str
    prompt: int
    answer: int = -1
    closing: int = -1


def render(
    example: Example,
    tokenizer: "PreTrainedTokenizerFast",
    day: str = "",
    unused: Counter[str] | None = None,
) -> TokenSequence:
    """The whole example as a `TokenSequence`; every token may carry loss. One that is not solved is
    its prompt alone.

    `day` and `unused` as for `prompt_text`. Raises `Skip` for text that the tokenizer would read as
    control tokens or that its template refuses or drops, `ModelError` for a tokenizer without
    offsets or chat template.
    """
    return tokenised([assemble(example, tokenizer, day, unused)], tokenizer)[0]


def assemble(
    example: Example,
    tokenizer: "PreTrainedTokenizerFast",
    day: str = "",
    unused: Counter[str] | None = None,
) -> Assembled:
    """The text that `render` tokenises; arguments and errors as there."""
    _refuse_control_text(example, tokenizer)
    prompt, opening = _opened(prompt_text(example.turns, tokenizer, example.tools, day, unused))
    if not example.solved:
        return Assembled(example.id, prompt, len(prompt))
    before_closing = f"{prompt}{opening}{example.cot}\n"
    before_answer = f"{before_closing}</think>\n\n"
    text = f"{before_answer}{example.answer}{end_of_turn(tokenizer)}"
    return Assembled(example.id, text, len(prompt), len(before_answer), len(before_closing))


def tokenised(
    assembled: Sequence[Assembled], tokenizer: "PreTrainedTokenizerFast"
) -> list[TokenSequence]:
    """Texts as sequences, all at once, which the tokenizer shares among the processor's cores."""
    encoded = tokenizer(
        [one.text for one in assembled],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [
        _sequence(one, ids, offsets) for one, (ids, offsets) in zip(assembled, pairs, strict=True)
    ]


def _sequence(
    one: Assembled, ids: Sequence[int], offsets: Sequence[tuple[int, int]]
) -> TokenSequence:
    tokens = np.asarray(ids, np.int32)
    allowed = np.ones(len(tokens), bool)
    if one.answer < 0:  # no chain of thought and no answer, until a model writes them
        return TokenSequence(one.id, tokens, len(tokens), len(tokens), allowed)
    begins = _begins(offsets)
    prompt_end, cot_end = np.searchsorted(begins, (one.prompt, one.answer))
    closing = np.searchsorted(begins, one.closing)
    if begins[closing] > one.closing:  # a token straddles the line break before the tag
        closing -= 1
    return TokenSequence(one.id, tokens, int(prompt_end), int(cot_end), allowed, int(closing))


class GenerationPrompt(NamedTuple):
    """The ids from which an answer is generated; the first `end` of them are the prompt, the others
    a `<think>` that the chat template opens.
    """

    tokens: list[int]
    end: int


def generation_prompt(
    turns: Turns, tokenizer: "PreTrainedTokenizerFast", tools: str = "", day: str = ""
) -> GenerationPrompt:
    """The chat template's own generation prompt.

    Ends in `<think>` only where the template says so; a student learns to write it where it does
    not. `day` as for `prompt_text`. Raises `Skip` for a prompt that the template refuses.
    """
    text = prompt_text(turns, tokenizer, tools, day)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    begins = _begins(encoded["offset_mapping"])
    end = np.searchsorted(begins, len(_opened(text)[0]))
    return GenerationPrompt(list(encoded["input_ids"]), int(end))


def end_of_turn(tokenizer: "PreTrainedTokenizerFast") -> str:
    """The text that ends an assistant turn: what the chat template writes after its content, up to
    and including the first control token (`<|im_end|>`, `<|eot_id|>`, ` </s>`), else the
    tokenizer's end-of-sequence token.
    """
    return _turn_end(tokenizer, chat_template(tokenizer))


def stop_ids(tokenizer: "PreTrainedTokenizerFast") -> frozenset[int]:
    """The ids after which generation stops: end of sequence and end of turn."""
    ids = tokenizer(end_of_turn(tokenizer), add_special_tokens=False)["input_ids"][-1:]
    return frozenset(ids) | ({tokenizer.eos_token_id} - {None})


def _opened(prompt: str) -> tuple[str, str]:
    """(prompt without an opening `<think>` at its end, the opening to write)."""
    match = OPENING.search(prompt)
    if not match:
        return prompt, "<think>\n"
    return prompt[: match.start()], "<think>" + (match[1] or "\n")


def _begins(offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """`int[T]`: the first character of each token, never decreasing.

    Some tokenizers trim a token's leading space from its offsets; the end of the token before tells
    where it began.
    """
    begin, end = np.asarray(offsets, np.int64).reshape(-1, 2).T
    before = np.concatenate([[0], end[:-1]])
    return np.maximum.accumulate(np.minimum(begin, before))


def _refuse_control_text(example: Example, tokenizer: "PreTrainedTokenizerFast") -> None:
    control = _control_texts(tokenizer, len(tokenizer))
    turns = "\0".join((*(text for turn in example.turns for text in turn), example.tools))
    for name, text, refused in (
        ("prompt", turns, control),
        ("reasoning", example.cot, (*THINK_TAGS, *control)),
        ("answer", example.answer, (*THINK_TAGS, *control)),
    ):
        if found := next((tag for tag in refused if tag in text), None):
            raise Skip(f"literal {found} in its {name}")


@lru_cache(maxsize=8)
def _control_texts(tokenizer: "PreTrainedTokenizerFast", size: int) -> tuple[str, ...]:
    added = tokenizer.added_tokens_decoder.values()
    return tuple(token.content for token in added if token.special and token.content.strip())


@lru_cache(maxsize=8)
def _turn_end(tokenizer: "PreTrainedTokenizerFast", template: str) -> str:
    turns = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": SENTINEL, "reasoning_content": "x"},
    ]
    try:
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except (
        Exception
    ):  # it cannot render a finished turn: the end-of-sequence token is all there is to know
        text = ""
    tail = text.rpartition(SENTINEL)[2] if SENTINEL in text else ""
    ends = [
        tail.index(token) + len(token)
        for token in _control_texts(tokenizer, len(tokenizer))
        if token in tail
    ]
    if not ends and not tokenizer.eos_token:
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path}: neither its chat template nor an eos_token says "
            "how a turn ends; set eos_token in tokenizer_config.json"
        )
    return tail[: min(ends)] if ends else tokenizer.eos_token
