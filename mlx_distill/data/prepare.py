"""A recipe and a tokenizer → the sequences a run trains on and is validated on, with an account of
every row.

The one path from data to sequences, shared by training, `plan` and `show`. Decided here: that
validation sequences are whole, that rows are chosen before they are cut (so the same ones at every
fraction), and what counts as dropped.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from mlx_distill.data.account import listed
from mlx_distill.data.examples import Example, Skip, split_examples
from mlx_distill.data.formats import read_examples
from mlx_distill.data.sequences import Segment, TokenSequence, render
from mlx_distill.data.template import refuse_unusable
from mlx_distill.data.truncate import thin, truncate
from mlx_distill.errors import DataError
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.recipe.tables import TruncationTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Prepared:
    """What a run learns from.

    `train` are cut and thinned, each with at least one supervised token. `train_whole` are the
    chosen training examples uncut, those that the cut left without a supervised token included, in
    the same order. `validation` are whole. `examples` has the text of all of them by id. `skipped`
    has the rows not used by reason; rows that were not needed are in none of these. `unused` has
    what used and skipped rows carry besides, by kind and name ("column source"), with how often.
    `day` is what prompts say, "" where their template reads no clock.
    """

    train: tuple[TokenSequence, ...]
    train_whole: tuple[TokenSequence, ...]
    validation: tuple[TokenSequence, ...]
    examples: dict[str, Example]
    skipped: dict[str, int]
    unused: dict[str, int] = field(default_factory=dict)
    day: str = ""


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of some sequences by segment (index `Segment`), and how many of them carry loss:
    `int64[3]` each.
    """

    examples: int
    tokens: np.ndarray
    supervised: np.ndarray


def prepare(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", day: str = "") -> Prepared:
    """Read, choose, render, cut and thin the examples of a recipe with the student's tokenizer.

    `day` ("2026-11-26") is what prompts say where their template reads the clock, "" the machine's
    own. Raises `NotFound` or `DataError` where there is no data, not enough of it, or nothing
    supervised is left after the cut, `ModelError` for a chat template that cannot be used.
    """
    refuse_unusable(tokenizer)
    skipped: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    seed, longest = recipe.run.seed, recipe.data.longest_tokens
    rendered: dict[str, TokenSequence] = {}

    def usable(example: Example) -> bool:
        try:
            sequence = render(example, tokenizer, day, unused)
        except Skip as skip:
            skipped[str(skip)] += 1
            return False
        if len(sequence) > longest:
            skipped[f"longer than data.longest_tokens = {longest}"] += 1
            return False
        rendered[example.id] = sequence
        return True

    examples = read_examples(recipe.data, seed, skipped, unused)
    train, validation = split_examples(examples, recipe.data, seed, usable, skipped)
    whole = tuple(rendered[example.id] for example in train)
    cut = tuple(cut_sequence(sequence, recipe) for sequence in whole)
    learning = tuple(
        sequence for sequence in cut if sequence.supervised(recipe.objective.segments).any()
    )
    causes = Counter(
        _why_nothing_is_left(sequence, recipe)
        for sequence, left in zip(whole, cut, strict=True)
        if not left.supervised(recipe.objective.segments).any()
    )
    if not learning:
        raise DataError(_nothing_is_left(causes, recipe))
    return Prepared(
        train=learning,
        train_whole=whole,
        validation=tuple(rendered[example.id] for example in validation),
        examples={example.id: example for example in (*train, *validation)},
        skipped=dict(skipped + causes),
        unused=dict(unused),
        day=day,
    )


PROMPT_OUTLASTS = "its prompt alone outlasts the cut"
SHARE_IS_NONE = "its share of tokens rounds to none"
CUT_AWAY = "no supervised token left after the cut"


def _why_nothing_is_left(whole: TokenSequence, recipe: Recipe) -> str:
    """Why the cut and the share leave a sequence nothing to learn."""
    cut = truncate(whole, recipe.truncation)
    if cut.supervised(recipe.objective.segments).any():
        return SHARE_IS_NONE
    ends_in_prompt = recipe.truncation.keep in ("prefix", "cot") and len(cut) <= whole.prompt_end
    return PROMPT_OUTLASTS if ends_in_prompt else CUT_AWAY


def _nothing_is_left(causes: Counter[str], recipe: Recipe) -> str:
    cut, segments = recipe.truncation, " + ".join(recipe.objective.segments)
    remedies = {
        PROMPT_OUTLASTS: f'{_longer(cut)}, or set truncation.span = "cot", which keeps prompts '
        "whole",
        SHARE_IS_NONE: "raise truncation.token_share",
        CUT_AWAY: f"{_longer(cut)}, or supervise other segments",
    }
    return (
        f"{recipe.data.source}: none of {causes.total()} training examples has a token of "
        f"{segments} left after the cut ({listed(causes)}); "
        f"{remedies[causes.most_common(1)[0][0]]}"
    )


def _longer(cut: TruncationTable) -> str:
    fields = ["truncation.max_tokens"] * bool(cut.max_tokens) + ["truncation.fraction"] * (
        cut.fraction < 1
    )
    return (
        f"raise {' and '.join(fields)}"
        if fields
        else f'choose another truncation.keep than "{cut.keep}"'
    )


def cut_sequence(sequence: TokenSequence, recipe: Recipe) -> TokenSequence:
    """One whole sequence as the recipe trains on it: truncated, then thinned to its share of
    supervised tokens.
    """
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


@dataclass(frozen=True)
class TokenRun:
    """Neighbouring tokens of one segment that are all kept or all cut; `learned` `bool[n]` says
    which carry loss.
    """

    segment: Segment
    kept: bool
    tokens: np.ndarray
    learned: np.ndarray


def token_runs(whole: TokenSequence, recipe: Recipe) -> Iterator[TokenRun]:
    """A whole sequence as runs that are of one segment and all kept or all cut, in order and
    without gaps.
    """
    cut = cut_sequence(
        replace(whole, tokens=np.arange(len(whole), dtype=np.int32)), recipe
    )  # tokens are now places
    kept, learned = np.zeros(len(whole), bool), np.zeros(len(whole), bool)
    kept[cut.tokens] = True
    learned[cut.tokens[cut.supervised(recipe.objective.segments)]] = True
    segments = whole.segments()
    changes = np.flatnonzero((np.diff(segments) != 0) | (np.diff(kept) != 0)) + 1
    for places in np.split(np.arange(len(whole)), changes):
        first = places[0]
        yield TokenRun(
            Segment(int(segments[first])), bool(kept[first]), whole.tokens[places], learned[places]
        )
