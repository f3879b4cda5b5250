r"""Which part of a text is its answer.

In: a text in the writing of `spelling.plain`. Out: a `Statement`. In this order: the last
`\boxed{}` (with those joined to it by "and" or "or"), the last line that begins with "####", the
last "the answer is …", else the last sentence. A text that takes its word back ("wait", "actually")
is read from there.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from mlx_distill.verify import mathematics, quantity
from mlx_distill.verify.spelling import CLOSE, OPEN, without_marks

LONGEST_PIECE = 1000  # characters of mathematics; nobody writes a longer answer
MOST_BOXES = 20  # that are looked at, from the end
BOX = re.compile(r"\\(?:boxed|fbox)\s*(\{)?")
BETWEEN_BOXES = re.compile(rf"[\s{OPEN}{CLOSE}]*(?:,|,?\s*(?:and|or)|;)[\s{OPEN}{CLOSE}]*")
MARKED = re.compile(r"^[ \t]*####[ \t]*(\S.*)$", re.M)
HEADING = re.compile(r"\d+[.)]\s+[A-Za-z]|[A-Za-z]")
SAID = re.compile(
    r"\banswers?\b(?:\s+(?:to|for|of|here)\b[^.\n:=]{0,80}?)?\s*"
    r"(?:(?:is|was|are|equals|should be|must be|would be|will be|comes to)\b(?!n't)\s*:?|=|"
    r":)[ \t]*\n*|\banswers?\b[ \t]*\n+",
    re.I,
)
TAKEN_BACK = re.compile(
    r"\b(?:wait|actually|correction|scratch that|sorry|i mean|no,)(?![a-z])", re.I
)
END = re.compile(
    r"\n|;\s|(?<!\bapprox)(?<!\bDr)(?<!\bMr)(?<!\bMrs)(?<!\bSt)(?<!\bvs)(?<!\b[a-zA-Z]\.[a-zA-Z])(?:[.?]|(?<=[a-zA-Z)])!)(?=\s|$)"
)
CLAUSE = re.compile(
    r",\s+(?!(?:and|or|maybe|perhaps|possibly)\b)(?=[A-Za-z])|:\s|\s-+\s(?=[A-Za-z]{2})|"
    r"\s(?:because|since|as|so|which|where|when|if|for|given|after|rather than|instead of|not)\s"
)
VERB = re.compile(r"\b(?:is|are|was|were|be|can|could|does|do|would|will)$", re.I)
CONCLUDES = re.compile(
    r"\b(?:so|therefore|thus|hence|giving|which (?:is|gives|makes)|that is|in total)\b", re.I
)
REASON = re.compile(r",?\s+(?:because|since|as|not|rather than|instead of|which)\s")
ASIDE = re.compile(rf"(?<=\S)\s+\(([^()]*)\)(?=[\s.,;:{CLOSE}]*$|\s)")
DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|never|cannot|neither|nor|rather than|instead of|excluding)\b|"
    r"n't\b)(?:(?!\bbut\b)[^,.;])*$",
    re.I,
)
DENIED_AFTER = re.compile(
    r"\s*(?:\w+\s+)?(?:is|was|are|would be|can)\s*(?:not\b|n't\b|wrong\b|incorrect\b|false\b)", re.I
)
BOUND = re.compile(
    r"(?:\b(?:at least|at most|under|below|above|nearly|almost|(?:more|less|greater|fewer) than|"
    r"up to|between|either|anything but)|[<>]|\\(?:le|ge|ne))\s*$",
    re.I,
)
JOIN = re.compile(
    r"(?:\s*(?:or|to|and|through|-+|,|&|\.\.\.)\s*|(?:\s*[a-z]+){0,3},?\s+or\s+)"
    r"(?:(?:maybe|perhaps|possibly|about|even|else|just)\s+)*",
    re.I,
)
OTHER_NUMBER = re.compile(
    r"\s*(?:or|and) (?:more|less|fewer|up|above|below|over|under|higher|lower)\b|"
    r"\s+(?:squared|cubed|factorial|pi|sqrt|root|halves|thirds|fourths|fifths|sixths|sevenths|"
    r"eighths|ninths|tenths|hundredths)\b",
    re.I,
)
OPERATOR = re.compile(r"\s*[-+*/^]\s*(?=[\d.\\(])")


@dataclass(frozen=True)
class Statement:
    """`text` is what is said; `source` is "box", "marked", "said" or "last"."""

    text: str
    source: str


def stated(text: str) -> Statement | None:
    """The part of a text that is its answer; None where nothing is said, or what is said is denied."""
    boxes = list(_boxes(text))
    if boxes:
        return _boxed(text, boxes)
    back = list(TAKEN_BACK.finditer(text))
    if back and any(_numbers(text[back[-1].end() :])):
        text = text[back[-1].end() :].lstrip(" ,.:!-")
    marked = [
        found[1]
        for found in MARKED.finditer(text)
        if not HEADING.match(found[1]) or not text[found.end() :].strip()
    ]
    if marked:
        return Statement(marked[-1].strip(), "marked")
    said = list(SAID.finditer(text))
    if said and text[said[-1].end() :].strip():
        return Statement(text[said[-1].end() :].strip(), "said")
    return Statement(text.strip(), "last") if text.strip() else None


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text that say anything."""
    cuts = [0, *(found.end() for found in END.finditer(text)), len(text)]
    parts = (text[a:b].strip(" \n;") for a, b in pairwise(cuts))
    return [part for part in parts if re.search(r"\w", part)]


def value(statement: Statement) -> str | None:
    """The one piece of mathematics that a statement says; None where there is none, or more than
    one.
    """
    said = sentences(statement.text)
    if not said:
        return None
    if statement.source == "box":
        return _piece(statement.text) or without_marks(statement.text)[:LONGEST_PIECE]
    if statement.source in ("said", "marked"):
        return (
            _piece(said[0])
            or _result(CLAUSE.split(said[0], maxsplit=1)[0])
            or _token(said[0], last=False)
        )
    sentence = next(
        (part for part in reversed(said) if any(_numbers(part)) or reads(part)), said[-1]
    )
    concluded = [
        found.end()
        for found in CONCLUDES.finditer(sentence)
        if any(_numbers(sentence[found.end() :]))
    ]
    sentence = sentence[concluded[-1] :].strip(" ,:") if concluded else sentence
    begins = bool(sentence) and _end_of_number(sentence, 0) > 0
    begins = begins or bool(re.match(r"[A-Za-z] ?=", sentence))
    pieces = shortened(sentence, REASON) if begins else [without_marks(sentence).rstrip(" .,;:?")]
    return next(filter(reads, pieces), None) or _result(sentence) or _token(sentence, last=True)


def reads(phrase: str) -> bool:
    """Whether a phrase is mathematics as a whole: a number with its unit, an expression, or a list
    of those.
    """
    if len(phrase) > LONGEST_PIECE:
        return False
    if quantity.read(phrase, comma=True) or mathematics.is_expression(phrase):
        return True
    left, equals, right = phrase.rpartition("=")
    if equals and mathematics.is_expression(left) and reads(right):  # 20 + 22 = 42 apples
        return True
    parts = mathematics.members(phrase)[1]
    return len(parts) > 1 and all(
        quantity.read(part) or mathematics.is_expression(part) for part in parts
    )


def shortened(sentence: str, clause: re.Pattern = CLAUSE) -> Iterator[str]:
    """A sentence, without what it says aside, up to its first clause, and what it says aside at its
    end.
    """
    sentence = without_marks(sentence).rstrip(" .,;:?")
    aside = ASIDE.sub("", sentence).rstrip(" .,;:")
    if quantity.read(aside):  # 12 (6 + 6) is no product
        yield aside
    yield sentence
    yield aside
    first = clause.split(aside, maxsplit=1)[0].strip()
    if not VERB.search(first):  # 42 is / not the answer
        yield first
    found = ASIDE.search(sentence)
    if found and found.end() == len(sentence) and not re.match(r"not\b|instead\b", found[1], re.I):
        yield found[1].strip()


def denied(text: str) -> bool:
    """Whether the words before an answer say that it is none."""
    return bool(DENIED_BEFORE.search(text[-80:]))


def _piece(sentence: str) -> str | None:
    """The longest of `shortened` that is mathematics as a whole."""
    return next((phrase for phrase in shortened(sentence) if reads(phrase)), None)


def _result(sentence: str) -> str | None:
    """What stands after the last equals sign in prose."""
    left, equals, _ = sentence.rpartition("=")
    inside = sentence.count(OPEN, len(left)) != sentence.count(CLOSE, len(left))
    if not equals or inside or re.search(r"[<>!]$", left):
        return None
    right = mathematics.result(without_marks(sentence).rstrip(" .,;:?"))
    return _piece(right) or _token(right, last=False)


def _token(sentence: str, last: bool) -> str | None:
    """The first or last number in prose, unless its neighbours make it one of several, or words
    before it a bound.
    """
    found = list(_numbers(sentence))
    order = range(len(found))
    for i in reversed(order) if last else order:
        start, end, phrase = found[i]
        before = sentence[found[i - 1][1] if i else 0 : start]
        after = sentence[end : found[i + 1][0] if i + 1 < len(found) else None]
        if DENIED_BEFORE.search(before) or DENIED_AFTER.match(after):
            continue
        neighbours = [found[i - 1][2]] if i and JOIN.fullmatch(before) else []
        neighbours += [found[i + 1][2]] if i + 1 < len(found) and JOIN.fullmatch(after) else []
        joined = any(
            not mathematics.same(phrase, other) for other in neighbours
        )  # 180 rings, or 180 years
        if joined or BOUND.search(before) or OTHER_NUMBER.match(after):
            return None
        unit = re.match(r"\s*(?:[A-Za-z°][A-Za-z°/]*\s*){1,3}", after)
        whole = f"{phrase}{unit[0]}" if unit else phrase
        return whole if quantity.read(whole) else phrase
    return None


def _numbers(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, phrase) of the pieces of mathematics in prose, with what is attached to them."""
    position = 0
    while position < len(text):
        end = _end_of_number(text, position)
        if end:
            yield position, end, without_marks(text[position:end])
        position = end or position + 1


def _end_of_number(text: str, start: int) -> int:
    """Where the mathematics that begins at `start` ends; 0 where none begins."""
    if text[start] == OPEN:
        close = text.find(CLOSE, start)
        percent = re.match(r"\s*(?:%|percent\b)", text[close + 1 :])
        return close + 1 + (percent.end() if percent else 0) if close > 0 else 0
    if start and (text[start - 1].isalnum() or text[start - 1] in "_.\\"):
        return 0
    if text[start] == "\\":
        found = re.compile(r"\\[a-zA-Z]+\s*").match(text, start)
    else:
        found = (
            quantity.NUMBER.match(text, start)
            if not text[start].isspace() and not text[start].isalpha()
            else None
        )
    if not found:
        return 0
    end = found.end()
    while end < len(text):
        operator = OPERATOR.match(text, end)
        if operator:
            end = operator.end()
            further = quantity.NUMBER.match(text, end)
            end = further.end() if further else end + 1
        elif not text[end].isspace() and not re.match(
            r"[.,;:?)\]\"'\u27e6\u27e7]+(?:\s|$)|[,;)\u27e6]", text[end:]
        ):
            end += 1
        else:
            break
    return end


def _boxes(text: str) -> Iterator[tuple[int, int, str]]:
    r"""(start, end, content) of each \boxed{} that holds anything; one that is not closed ends with
    its line.
    """
    for found in list(BOX.finditer(text))[-MOST_BOXES:]:
        if not found[1]:
            token = re.compile(r"[^\s{}.,;]+").match(text, found.end())
            end, content = (token.end(), token[0]) if token else (found.end(), "")
        else:
            end = _closing(text, found.end())
            content = text[found.end() : end].strip()
        content = content.removesuffix(CLOSE).strip()
        if content and not BOX.search(content):
            yield found.start(), end + 1 if found[1] else end, content


def _closing(text: str, start: int) -> int:
    depth, end = 1, start
    line = text.find("\n\n", start)
    stop = len(text) if line < 0 else line
    while end < stop:
        depth += (text[end] == "{") - (text[end] == "}")
        if not depth:
            return end
        end += 1
    line = text.find("\n", start)
    return len(text) if line < 0 else line


def _boxed(text: str, boxes: list[tuple[int, int, str]]) -> Statement | None:
    start, _, content = boxes[-1]
    for earlier, end, other in reversed(boxes[:-1]):
        joined = BETWEEN_BOXES.fullmatch(text[end:start])
        if not joined:
            break
        word = "or" if "or" in joined[0] else ","
        content, start = f"{other} {word} {content}", earlier
    before = (sentences(text[max(0, start - 200) : start].lstrip() + "x") or [""])[-1]
    return None if denied(before.removesuffix("x")) else Statement(content, "box")
