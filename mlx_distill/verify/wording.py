r"""Texts and the letters of choices: compared by their characters, with what is only dress taken
off.

In: phrases in the writing of `spelling.plain`. Dress is case, white space, quotes, bold, braces, a
final stop, and "the answer is" before; of a letter also brackets and "Option" ("(B)", "B)", "B.
Paris", "Option B").
"""

import re

from mlx_distill.verify.statement import DENIED_AFTER, Statement, denied, sentences, shortened

LEADING = re.compile(
    r"^(?:(?:so|thus|therefore|hence),?\s+)?(?:(?:the|my)\s+)?(?:(?:final|correct|"
    r"right)\s+)?answer\s*(?:is|:|=)\s*:?\s*",
    re.I,
)
STATED_LAST = re.compile(
    r".*(?:\b(?:is|it's|are|was|were|be|equals|choose|pick|select|choice|option|with)|=|"
    r":)\s+(?P<what>\S.*)",
    re.S | re.I,
)
DRESS = "\"'*_`{}[]⟦⟧ \n\t"
LETTER = re.compile(
    r"(?:(?:the\s+)?(?:(?:correct|right|best)\s+)?(?:option|choice|answer|"
    r"letter)\s*:?\s*)?(?P<open>[(\[{]?)\s*(?P<letter>[A-Za-z])(?P<close>(?:\s*[)\]}])?)"
    r"(?P<rest>.*)",
    re.S | re.I,
)
AFTER_LETTER = re.compile(
    r"[\s.,;:!?\"'*]*|\s*[.:)]\s*\S.*|\s*,?\s+(?:because|since)\b.*|\s*,\s*(?:as|which|not|"
    r"so)\b.*|\s+-+\s.*|"
    r"\s+is\s+(?:the\s+)?(?:correct|right|best|true)\b.*",
    re.S | re.I,
)
ANOTHER_LETTER = re.compile(
    r"\s*(?:,|;|/|&|\.|\band\b|\bor\b)+\s*(?:and|or)?\s*[(\[]?[A-Za-z][)\]]?(?![A-Za-z'])", re.I
)
CLAUSE = re.compile(
    r",?\s+(?:because|since|as|which|where|when|who|if|for|not|so|but|rather than|instead of)\s|"
    r",\s+(?:the|it|there|this|that|these|they|he|she|we|i)\s",
    re.I,
)  # not at every comma: "Paris, Texas" is not Paris
LETTERS = re.compile(r"[A-Z](?:\s*(?:,|;|/|&|and|\s)\s*(?:and\s+)?[A-Z])+")


def letter(gold: str) -> str:
    """The letter that a gold answer asks for: B of "B", "(B)", "B." and "Option B"; "" where it
    asks for something else.
    """
    found = LETTER.fullmatch(gold.strip(DRESS))
    return found["letter"].upper() if found and not found["rest"].strip(". ") else ""


def letters(gold: str) -> list[str]:
    """The letters that a gold answer asks for together: A and C of "A, C"."""
    bare = re.sub(r"[()\[\]]", "", gold).strip(DRESS + ".")
    return re.findall(r"[A-Z]", re.sub(r"\band\b", ",", bare)) if LETTERS.fullmatch(bare) else []


def states_letter(gold: str, statement: Statement) -> bool:
    """Whether a statement says this letter and no other one."""
    return any(_letter_of(phrase) == gold for phrase in _phrases(statement, whole_sentences=True))


def states_letters(gold: list[str], statement: Statement) -> bool:
    """Whether a statement says these letters; their order counts only where the expected one is not
    the alphabet's.
    """
    for phrase in _phrases(statement):
        bare = re.sub(r"[()\[\]\"'*]|\b(?:options?|choices?)\b", "", phrase, flags=re.I).strip(
            DRESS + "."
        )
        found = letters(bare) or (list(bare) if re.fullmatch(r"[A-Z]{2,}", bare) else [])
        if found == gold or (gold == sorted(gold) and sorted(found) == gold):
            return True
    return False


def states_text(gold: str, statement: Statement) -> bool:
    """Whether a statement says this text."""
    wanted = undressed(gold)
    return bool(wanted) and any(undressed(phrase) == wanted for phrase in _phrases(statement))


def undressed(text: str) -> str:
    """A text as it is compared."""
    text = LEADING.sub("", text.strip(DRESS)).casefold()
    text = re.sub(r"\b([a-z])\.\s?([a-z])\.?(?!\w)", r"\1\2", text)  # p.m. is pm
    text = re.sub(r"(?<=[a-z]),?(?: and)? (?=\d)", " ", text)  # 2 hours and 40 minutes
    return re.sub(r"\s+|[{}⟦⟧\"'*`]", "", text.strip(DRESS).rstrip(".!?,;: \t\n"))


def _letter_of(phrase: str) -> str:
    found = LETTER.fullmatch(phrase.strip(DRESS))
    if not found or ANOTHER_LETTER.match(found["rest"]) or DENIED_AFTER.match(found["rest"]):
        return ""
    option = found["close"] and re.match(r"\s|$", found["rest"])  # B) Paris
    return found["letter"].upper() if option or AFTER_LETTER.fullmatch(found["rest"]) else ""


def _phrases(statement: Statement, whole_sentences: bool = False) -> list[str]:
    """What may be the text of the answer: all of it, its first and last sentence, shorter forms,
    what follows a last "is".
    """
    said = sentences(statement.text)
    if not said:
        return [statement.text] if statement.source == "box" else []
    if statement.source == "box":
        return [statement.text]
    found = [statement.text, said[0], *([] if whole_sentences else shortened(said[0], CLAUSE))]
    if statement.source == "last":
        found += [said[-1], statement.text.strip().rpartition("\n")[2]]
        last = STATED_LAST.fullmatch(said[-1])
        if last and not denied(said[-1][: last.start("what")]):
            found.append(last["what"])
    return found
