"""A recipe and a tokenizer → the sequences a run trains on and is validated on, with an account of every row.

The one path from data to sequences, shared by training, `plan` and `show`. Decided here: that validation sequences are
whole, that rows are chosen before they are cut (so the same ones at every fraction), and what counts as dropped.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mlx_distill.data.examples import Example, Skip, split_examples
from mlx_distill.data.formats import read_examples
from mlx_distill.data.sequences import TokenSequence, render
from mlx_distill.data.truncate import thin, truncate
from mlx_distill.errors import DataError
from mlx_distill.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Prepared:
    """What a run learns from.

    `train` are cut and thinned, each with at least one supervised token. `train_whole` are the chosen training examples
    uncut, those that the cut left without a supervised token included, in the same order. `validation` are whole.
    `examples` has the text of all of them by id. `skipped` has the rows not used by reason; rows that were not needed
    are in none of these.
    """

    train: tuple[TokenSequence, ...]
    train_whole: tuple[TokenSequence, ...]
    validation: tuple[TokenSequence, ...]
    examples: dict[str, Example]
    skipped: dict[str, int]


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of some sequences by segment (index `Segment`), and how many of them carry loss: `int64[3]` each."""

    examples: int
    tokens: np.ndarray
    supervised: np.ndarray


def prepare(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast") -> Prepared:
    """Read, choose, render, cut and thin the examples of a recipe with the student's tokenizer.

    Raises `NotFound` or `DataError` where there is no data, not enough of it, or nothing supervised is left after the
    cut.
    """
    skipped: Counter[str] = Counter()
    seed, longest = recipe.run.seed, recipe.data.longest_tokens
    rendered: dict[str, TokenSequence] = {}

    def usable(example: Example) -> bool:
        try:
            sequence = render(example, tokenizer)
        except Skip as skip:
            skipped[str(skip)] += 1
            return False
        if len(sequence) > longest:
            skipped[f"longer than data.longest_tokens = {longest}"] += 1
            return False
        rendered[example.id] = sequence
        return True

    examples = read_examples(recipe.data, seed, skipped)
    train, validation = split_examples(examples, recipe.data, seed, usable, skipped)
    whole = tuple(rendered[example.id] for example in train)
    cut = tuple(cut_sequence(sequence, recipe) for sequence in whole)
    learns = [bool(sequence.supervised(recipe.objective.segments).any()) for sequence in cut]
    if dropped := learns.count(False):
        skipped["no supervised token left after the cut"] += dropped
    if not any(learns):
        raise DataError(f"{recipe.data.source}: none of {len(cut)} training examples has a token of "
                        f"{' + '.join(recipe.objective.segments)} left after the cut; raise truncation.fraction, "
                        "max_tokens or token_share, or supervise other segments")
    return Prepared(
        train=tuple(sequence for sequence, learn in zip(cut, learns, strict=True) if learn),
        train_whole=whole,
        validation=tuple(rendered[example.id] for example in validation),
        examples={example.id: example for example in (*train, *validation)},
        skipped=dict(skipped),
    )


def cut_sequence(sequence: TokenSequence, recipe: Recipe) -> TokenSequence:
    """One whole sequence as the recipe trains on it: truncated, then thinned to its share of supervised tokens."""
    cut = truncate(sequence, recipe.truncation)
    return thin(cut, recipe.truncation.token_share, recipe.objective.segments, recipe.run.seed)


def count_tokens(sequences: Sequence[TokenSequence], segments: tuple[str, ...]) -> TokenCounts:
    """Tokens and supervised tokens by segment, summed over sequences."""
    tokens, supervised = np.zeros(3, np.int64), np.zeros(3, np.int64)
    for sequence in sequences:
        kinds = sequence.segments()
        tokens += np.bincount(kinds, minlength=3)
        supervised += np.bincount(kinds[sequence.supervised(segments)], minlength=3)
    return TokenCounts(len(sequences), tokens, supervised)
