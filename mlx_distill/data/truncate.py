"""`TokenSequence` → shorter `TokenSequence`: which tokens are kept, and which of them may still
carry loss.

In: whole sequences and the `[truncation]` table. Out: sequences whose segment ends are clamped to
what is left. Decided here: which examples stay whole, at which
fraction each is cut, where the kept window lies (`WINDOWS`, one
function per `keep`), what happens to the tokens around it, what of the sequence's end follows a
cut, and which random share of the supervised tokens carries loss. Ids are cut, never text.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mlx_distill.data.sequences import TokenSequence
from mlx_distill.recipe.tables import TruncationTable

Window = tuple[int, int]  # half-open, in tokens of the whole sequence
WHOLE, FRACTION = 1, 2  # random numbers for which examples stay whole, and where others are cut


def truncate(sequence: TokenSequence, truncation: TruncationTable) -> TokenSequence:
    """The sequence cut to a window of `max(1, int(fraction * L))` tokens, at most `max_tokens`
    where that is not 0.

    `span = "sequence"`: L = T and the window lies anywhere in the sequence. `fraction` is then the
    Lead-Span Proportion of Distilling the Essence (arXiv 2512.21002). `span = "cot"`: L is the
    length of the chain of thought and the window lies in it; the prompt is kept whole, and the
    answer only where the window reaches the end of the chain of thought.

    `context = "drop"` removes the tokens before the window (not the prompt under `span = "cot"`),
    `"keep"` leaves them to be read and takes their loss away. What comes after the window goes: in
    a causal model it cannot matter. `ending = "answer"` leaves of it what begins with `</think>`,
    where the window reaches the chain of thought. The result may have no supervised token; the
    caller drops such sequences.
    """
    first = sequence.prompt_end if truncation.span == "cot" else 0
    last = sequence.cot_end if truncation.span == "cot" else len(sequence)
    length = max(1, int(truncation.fraction * (last - first)))
    if truncation.max_tokens:
        length = min(length, truncation.max_tokens)
    start, stop = WINDOWS[truncation.keep](first, last, length, sequence.cot_end)
    if truncation.span == "cot" and truncation.keep != "cot" and stop == sequence.cot_end:
        stop = len(sequence)
    position = np.arange(len(sequence))
    inside = (position >= start) & (position < stop)
    exempt = position < first
    if truncation.context == "keep":
        sequence = replace(sequence, allowed=sequence.allowed & (inside | exempt))
    kept = position < stop if truncation.context == "keep" else inside | exempt
    ending = np.zeros(len(sequence), bool)
    if truncation.ending == "answer" and sequence.closing >= 0 and stop > sequence.prompt_end:
        ending[max(stop, sequence.closing) :] = True
    return replace(_select(sequence, kept | ending), ending=int(ending.sum()))


def stays_whole(sequence: TokenSequence, share: float, seed: int) -> bool:
    """Whether an example is among the `share` of all examples that are not cut: a pure function of
    the seed and its id. Those of a smaller share are among those of a larger one.
    """
    return random_of(seed, sequence.id, WHOLE).random() < share


def drawn(truncation: TruncationTable, example: str, seed: int) -> TruncationTable:
    """The cut of one example, whose fraction is drawn evenly from fraction × (1 ± spread): a pure
    function of the seed and its id. Every place of a text is then learned from in some of them.
    """
    if not truncation.spread:
        return truncation
    off = random_of(seed, example, FRACTION).uniform(-truncation.spread, truncation.spread)
    return truncation.model_copy(update={"fraction": truncation.fraction * (1 + off)})


def thin(
    sequence: TokenSequence, share: float, segments: tuple[str, ...], seed: int
) -> TokenSequence:
    """The same tokens, of which `round(share * n)` of the n supervised ones (of `segments`) still
    carry loss.

    Which ones is a pure function of the seed and the example's id, whatever else is in the data
    set. n is counted after the cut and without what follows it, all of which carries loss; a share
    of 1 changes nothing.
    """
    if share == 1:
        return sequence
    window = len(sequence) - sequence.ending
    supervised = np.flatnonzero(sequence.supervised(segments)[:window])
    shuffled = random_of(seed, sequence.id).permutation(supervised)
    allowed = np.zeros(len(sequence), bool)
    allowed[shuffled[: round(share * len(supervised))]] = True
    return replace(sequence, allowed=allowed)


def random_of(seed: int, example: str, *purpose: int) -> np.random.Generator:
    """Random numbers of one example, the same in whatever data set it stands."""
    digest = int.from_bytes(hashlib.sha256(example.encode()).digest()[:8], "little")
    return np.random.default_rng([seed, digest, *purpose])


def _select(sequence: TokenSequence, kept: np.ndarray) -> TokenSequence:
    """The tokens where `kept` `bool[T]` holds; each segment end becomes the number of kept tokens
    before it.
    """
    return replace(
        sequence,
        tokens=sequence.tokens[kept],
        prompt_end=int(kept[: sequence.prompt_end].sum()),
        cot_end=int(kept[: sequence.cot_end].sum()),
        allowed=sequence.allowed[kept],
        closing=int(kept[: sequence.closing].sum()) if _has_closing(sequence, kept) else -1,
    )


def _has_closing(sequence: TokenSequence, kept: np.ndarray) -> bool:
    return sequence.closing >= 0 and bool(kept[sequence.closing])


def _prefix(first: int, last: int, length: int, cot_end: int) -> Window:
    return first, min(first + length, last)


def _suffix(first: int, last: int, length: int, cot_end: int) -> Window:
    return max(first, last - length), last


def _middle(first: int, last: int, length: int, cot_end: int) -> Window:
    start = first + max(0, (last - first - length) // 2)
    return start, min(start + length, last)


def _cot(first: int, last: int, length: int, cot_end: int) -> Window:
    """Everything up to and including `</think>`; the recipe refuses a fraction with it."""
    return first, min(first + length, cot_end)


WINDOWS: dict[str, Callable[[int, int, int, int], Window]] = {
    "prefix": _prefix,
    "suffix": _suffix,
    "middle": _middle,
    "cot": _cot,
}
