"""What a recipe makes of whole sequences, for a person: tokens by segment, and one sequence in runs.

In: sequences and a recipe. Out: counts, and runs of neighbouring tokens that share a fate. Nothing
is decided here: the cut is `prepare.cut_sequence`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_distill.data.prepare import cut_sequence
from mlx_distill.data.sequences import Segment, TokenSequence
from mlx_distill.recipe.recipe import Recipe


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of some sequences by segment (index `Segment`), and how many of them carry loss:
    `int64[3]` each.
    """

    examples: int
    tokens: np.ndarray
    supervised: np.ndarray
    ending: int = 0  # of the tokens, those that follow a cut


def count_tokens(sequences: Sequence[TokenSequence], segments: tuple[str, ...]) -> TokenCounts:
    """Tokens and supervised tokens by segment, summed over sequences."""
    tokens, supervised = np.zeros(3, np.int64), np.zeros(3, np.int64)
    for sequence in sequences:
        kinds = sequence.segments()
        tokens += np.bincount(kinds, minlength=3)
        supervised += np.bincount(kinds[sequence.supervised(segments)], minlength=3)
    ending = sum(sequence.ending for sequence in sequences)
    return TokenCounts(len(sequences), tokens, supervised, ending)


@dataclass(frozen=True)
class TokenRun:
    """Neighbouring tokens of one segment that are all kept or all cut; `learned` `bool[n]` says
    which carry loss, `ending` whether they follow the cut and learn from the text alone.
    """

    segment: Segment
    kept: bool
    tokens: np.ndarray
    learned: np.ndarray
    ending: bool = False


def token_runs(whole: TokenSequence, recipe: Recipe) -> Iterator[TokenRun]:
    """A whole sequence as runs that are of one segment and all kept or all cut, in order and
    without gaps.
    """
    cut = cut_sequence(
        replace(whole, tokens=np.arange(len(whole), dtype=np.int32)), recipe
    )  # tokens are now places
    kept, learned, ending = np.zeros((3, len(whole)), bool)
    kept[cut.tokens] = True
    learned[cut.tokens[cut.supervised(recipe.objective.segments)]] = True
    ending[cut.tokens[len(cut) - cut.ending :]] = True
    segments = whole.segments()
    kinds = np.stack([segments, kept, ending])
    changes = np.flatnonzero((np.diff(kinds) != 0).any(axis=0)) + 1
    for places in np.split(np.arange(len(whole)), changes):
        first = places[0]
        yield TokenRun(
            Segment(int(segments[first])),
            bool(kept[first]),
            whole.tokens[places],
            learned[places],
            bool(ending[first]),
        )
