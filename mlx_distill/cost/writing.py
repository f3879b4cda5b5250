"""What it costs a model to write texts, at most: every text is taken to be as long as it can be."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_distill.cost.flops import Shape


@dataclass(frozen=True)
class WritingCost:
    """texts and new tokens that are written, the operations of the passes that write them, and the
    bytes of the keys and values that are kept of the texts written at once.
    """

    texts: int
    tokens: int
    flops: float
    kv_bytes: int


def writing_flops(prompts: Sequence[int], new: Sequence[int], writer: Shape) -> float:
    """Operations of one pass over each prompt and what follows it, with the head at the new tokens.
    A prompt that is answered several times is read each time.
    """
    lengths = [asked + written for asked, written in zip(prompts, new, strict=True)]
    return writer.trunk(lengths) + writer.head(sum(new))


def writing_cost(
    prompts: Sequence[int], longest: int, at_once: int, writer: Shape, number_bytes: int
) -> WritingCost:
    """Of texts of `longest` new tokens each to prompts of these lengths, one text for each, written
    `at_once` together; keys and values are numbers of `number_bytes`.
    """
    width = max(prompts, default=0) + longest  # padded to the longest prompt
    return WritingCost(
        texts=len(prompts),
        tokens=longest * len(prompts),
        flops=writing_flops(prompts, [longest] * len(prompts), writer),
        kv_bytes=kv_bytes(writer, min(at_once, len(prompts)), width, number_bytes),
    )


def kv_bytes(writer: Shape, texts: int, length: int, number_bytes: int) -> int:
    """Keys and values of so many texts, prompts included, all of `length` tokens."""
    a_token = 2 * writer.layers * writer.kv_heads * writer.head_dim * number_bytes
    return texts * length * a_token
