"""The verdict: a gold answer decides how it is compared, and the answer's statement is held against
it.
"""

import re
from functools import lru_cache

from mlx_distill.verify import mathematics, wording
from mlx_distill.verify.spelling import plain, without_marks
from mlx_distill.verify.statement import stated, value

MATHEMATICS, TEXT = "mathematics", "text"
EXCLAIMED = re.compile(
    r"(?<=[a-z] )(?P<number>[$€£]\d[\d,.]*|\d+[,.]\d[\d,.]*|2[1-9]|[3-9]\d|\d{3,})!(?=\s*\Z|"
    r"\s*\n|\s+[A-Z])"
)
LONGEST = 10_000  # characters of an answer's end that are read


@lru_cache(65536)
def compared_as(gold: str) -> str:
    """How answers are compared with a gold answer: as `MATHEMATICS` where it can be read as that,
    else as `TEXT`.

    Raises `ValueError` for a gold answer that says nothing.
    """
    written = _gold(gold)
    if not wording.undressed(written):
        raise ValueError("it says nothing")
    if wording.letter(written) or wording.letters(written):
        return TEXT
    return MATHEMATICS if mathematics.readable(written) else TEXT


def states(gold: str, answer: str) -> bool:
    """Whether an answer, a text without its reasoning, states the gold answer."""
    text = plain(answer[-LONGEST:])
    return _states(gold, text) or (text != (calm := _unexclaimed(text)) and _states(gold, calm))


def _unexclaimed(text: str) -> str:
    """The text with a full stop for the mark of "The total is 42!", where no one means a factorial."""
    return EXCLAIMED.sub(lambda found: f"{found['number']}.", text)


def _states(gold: str, text: str) -> bool:
    expected, said = _gold(gold), stated(text)
    if said is None:
        return False
    if compared_as(gold) == MATHEMATICS:
        found = value(said)
        return found is not None and mathematics.same(expected, found)
    if one := wording.letter(expected):
        return wording.states_letter(one, said)
    if several := wording.letters(expected):
        return wording.states_letters(several, said)
    return wording.states_text(expected, said)


@lru_cache(65536)
def _gold(gold: str) -> str:
    """A gold answer in one way of writing: its box, else all of it."""
    written = plain(gold)
    said = stated(written)
    return without_marks(
        said.text if said and said.source in ("box", "marked", "said") else written
    )
