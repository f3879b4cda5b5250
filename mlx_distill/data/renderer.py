"""Examples → sequences, many at once, and from disk where an earlier start rendered them.

In: examples, a tokenizer, a day. Out: for each, in order, its sequence or why there is none. Decided
here: how many are rendered together. Rendering is ahead of who asks by that many at most.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from mlx_distill.data import kept_renderings
from mlx_distill.data.examples import Example, Skip
from mlx_distill.data.kept_renderings import KeptRenderings, Rendered, rendering_key
from mlx_distill.data.sequences import Assembled, assemble, tokenised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

AT_ONCE = 256


def rendered_all(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerFast", day: str
) -> Iterator[tuple[Example, Rendered]]:
    """Each example with what became of it. What is new is kept when nobody asks for more."""
    worth = len(examples) >= kept_renderings.WORTH_KEEPING
    kept = KeptRenderings(rendering_key(tokenizer, day)) if worth else None
    try:
        for start in range(0, len(examples), AT_ONCE):
            group = examples[start : start + AT_ONCE]
            found = {one.id: kept.find(one.id) if kept else None for one in group}
            made = _made([one for one in group if found[one.id] is None], tokenizer, day)
            if kept:
                kept.add(made)
            for one in group:
                yield one, found[one.id] or made[one.id]
    finally:
        if kept:
            kept.keep()


def _made(
    examples: Iterable[Example], tokenizer: "PreTrainedTokenizerFast", day: str
) -> dict[str, Rendered]:
    """Examples rendered now, by id."""
    made: dict[str, Rendered] = {}
    texts: list[Assembled] = []
    unread: dict[str, Counter[str]] = {}
    for one in examples:
        unused: Counter[str] = Counter()
        try:
            texts.append(assemble(one, tokenizer, day, unused))
        except Skip as skip:
            # without the frames that it came through, which hold the texts beside it
            made[one.id] = Rendered(skip.with_traceback(None), unused)
        unread[one.id] = unused
    for sequence in tokenised(texts, tokenizer) if texts else ():
        made[sequence.id] = Rendered(sequence, unread[sequence.id])
    return made
