r"""Whether two pieces of mathematics are equal: numbers, lists, sets, tuples, intervals, equations,
expressions.

In: two phrases in the writing of `spelling.plain`, without marks. Numbers and containers are
compared here; what is left goes to math-verify, if it is small enough to be a written answer.
"""

import re
from functools import lru_cache

from mlx_distill.verify import quantity, sympy_child
from mlx_distill.verify.spelling import words

FUNCTIONS = words(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt pi max "
    "min gcd lcm mod inf infinity det oo theta alpha beta"
)
PROSE = words(
    "or and to of is are not in at no if by so as the per be it am pm on we an any all both "
    "none he we me my us do go up ok his her has had was who did you one two six ten jan "
    "feb mar apr may jun jul aug sep oct nov dec mon tue wed thu fri sat sun"
)
NOT_ONE = re.compile(
    r"\d\s+[\d.]|\d\s*:\s*\d|\d[eE][-+]?\d"
)  # 4 2 is not 42; 2:3 is a ratio or a time; 1e9999 no number
LATEX_WORD = re.compile(r"\\[a-zA-Z]+")
ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[a-zA-Z]+\*?\}")
RELATION = re.compile(r"(?<![\\<>!:])=|[<>]|\\(?:le|ge|ne|lt|gt|in)(?![a-zA-Z])")
NAME = re.compile(r"[a-zA-Z](?:_\{?\w+\}?)?(?:\([a-zA-Z]\))?|\\[a-zA-Z]+|[A-Za-z]+")
JOINED = re.compile(r",\s*(?:and|or)\b|;\s*(?:and|or)\b|[,;]|\b(?:and|or)\b")
PAIRS = {"(": ")", "[": "]", "{": "}"}
INTERVALS = {"()", "(]", "[)", "[]"}
MAY_LACK_BRACKETS = {
    ("", "{}"),
    ("{}", ""),
    ("", "()"),
    ("()", ""),
}  # a set or a tuple as a bare list; never a set as a tuple

MOST_CHARACTERS, MOST_DIGITS, MOST_POWERS, DEEPEST = 400, 40, 12, 16


def is_expression(text: str) -> bool:
    """Whether a phrase is mathematics alone, without a word of prose."""
    text = text.strip()
    if not text or len(text) > 4 * MOST_CHARACTERS or not _balanced(text) or NOT_ONE.search(text):
        return False
    if not re.search(r"[\d\\+*/^=<>()\[\]]", text) and not re.fullmatch(r"-?[a-zA-Z]", text):
        return text.lower() in FUNCTIONS
    found = re.findall(r"[A-Za-z]+", LATEX_WORD.sub(" ", ENVIRONMENT.sub(" ", text)))
    return all(len(word) == 1 or word in FUNCTIONS or _is_product(word) for word in found)


def _is_product(word: str) -> bool:
    """Whether a short word may be a product (xy, abc) or a segment (AB)."""
    if word.lower() in PROSE or len(word) > 3:
        return False
    return word.isupper() or len(word) == 2 or word == "abc" or not set(word) & set("aeiouAEIOU")


def readable(text: str) -> bool:
    """Whether a gold answer can be compared as mathematics."""
    if quantity.read(text):
        return True
    brackets, parts = members(text)
    if RELATION.search(text) and len(parts) > 1:  # x = 2 or x = 3
        return all(map(readable, parts))
    if not is_expression(text):
        return False
    if brackets or len(parts) > 1:
        return all(map(readable, parts))
    return _small(text) and sympy_child.readable(_latex(text))


@lru_cache(4096)
def same(gold: str, answer: str) -> bool:
    """Whether an answer is the expected mathematics."""
    gold, answer = _trimmed(gold), _trimmed(answer)
    if not gold or not answer:
        return False
    if _tight(gold) == _tight(answer):
        return True
    expected, found = quantity.read(gold), quantity.read(answer, comma=True)
    if expected and found:
        return quantity.equal(expected, found)
    if not RELATION.search(gold):
        sides = [side for side in answer.split(r"\approx") if side.strip()]
        if len(sides) > 1:  # 10\pi \approx 31.4 says both
            return any(same(gold, side) for side in sides)
    return (
        _same_members(gold, answer)
        if _is_container(gold) or _is_container(answer)
        else _same_value(gold, answer)
    )


def _same_value(gold: str, answer: str) -> bool:
    named, value = _assigned(gold)
    if named or not RELATION.search(gold):
        theirs, worth = _assigned(answer)
        if named and theirs and _tight(named) != _tight(theirs):
            return False  # x = 5 is not y = 5
        if named and (theirs or not RELATION.search(answer)):
            return same(value, worth if theirs else answer)
        if (
            not named
            and "=" in answer
            and not re.search(r"[<>]|\\(?:le|ge|ne)(?![a-zA-Z])", answer)
        ):
            return same(gold, result(answer))
        if not named and RELATION.search(answer):
            return False  # x > 5 is no 5
    expected = quantity.read(gold)
    if expected and expected.percent:  # an expression for a percentage says it in per cent too
        gold, answer = gold.replace("%", ""), answer.replace("%", "")
    return _same_to_sympy(gold, answer)


def result(equation: str) -> str:
    """6 of "2 + 4 = 6", "x = 6" and "6 = x"."""
    left, _, right = equation.rpartition("=")
    turned = (
        NAME.fullmatch(right.strip()) and re.search(r"\d", left) and left.rpartition("=")[2].strip()
    )
    return turned or right


def _same_to_sympy(gold: str, answer: str) -> bool:
    both = gold, answer
    return (
        all(map(is_expression, both))
        and all(map(_small, both))
        and sympy_child.same(*map(_latex, both))
    )


# lists, sets, tuples, intervals


def members(text: str) -> tuple[str, list[str]]:
    r"""The brackets around a phrase ("", "{}", "(]", ...) and what stands between its commas, "and"
    and "or".
    """
    text = _trimmed(text).replace(r"\{", "{").replace(r"\}", "}")
    text = re.sub(r"^(?:either|both)\s+", "", text)
    brackets, inner = "", text
    if len(text) > 1 and text[0] in PAIRS and text[-1] in PAIRS.values() and _closes_at_end(text):
        brackets, inner = text[0] + text[-1], text[1:-1]
    parts = _split(inner)
    if brackets not in ("", "{}") and len(parts) < 2:  # (x + 1) is no tuple
        return "", [text]
    if (
        len(parts) == 1
        and not brackets
        and (sign := re.fullmatch(r"(.*?)\\pm(?![a-zA-Z])(.*)", parts[0]))
    ):
        parts = [
            f"{sign[1]}+{sign[2]}" if sign[1].strip() else sign[2].strip(),
            f"{sign[1]}-{sign[2]}",
        ]
    return brackets, parts


def _is_container(text: str) -> bool:
    brackets, parts = members(text)
    return bool(brackets) or len(parts) > 1


def _same_members(gold: str, answer: str) -> bool:
    (kind, expected), (theirs, found) = members(gold), members(answer)
    if bool(RELATION.search(gold)) != bool(RELATION.search(answer)) and INTERVALS & {kind, theirs}:
        return _same_to_sympy(gold, answer)  # x > 5 and (5, \\infty)
    if (theirs != kind and (theirs, kind) not in MAY_LACK_BRACKETS) or len(expected) != len(found):
        return False
    names = {_assigned(part)[0] for part in expected}
    unnamed = len(names) > 1 and not any(
        _assigned(part)[0] for part in found
    )  # 1, 2 for x = 1, y = 2
    if "()" in (kind, theirs) or kind in INTERVALS or unnamed:
        return all(same(*pair) for pair in zip(expected, found, strict=True))
    left = list(found)
    for part in expected:
        match = next((other for other in left if same(part, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _split(text: str) -> list[str]:
    """At commas, semicolons, "and" and "or" outside of brackets; the comma of 1,234 is part of a
    number.
    """
    depth, cut, parts = 0, 0, []
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth or position < cut:
            continue
        found = JOINED.match(text, position)
        if found and not (
            found[0] == "," and re.match(r"\d,(?:\d\d,)*\d{3}(?!\d)", text[max(0, position - 1) :])
        ):
            parts.append(text[cut:position])
            cut = found.end()
    return [part.strip() for part in (*parts, text[cut:]) if part.strip()]


def _closes_at_end(text: str) -> bool:
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if not depth:
            return position == len(text) - 1
    return False


# for math-verify


def _latex(text: str) -> str:
    """The phrase as LaTeX: what is written as in a program becomes what math-verify reads."""
    text = (
        text.replace("**", "^").replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\ne ")
    )
    text = _braces_for(text, r"\\?sqrt\s*\(", r"\sqrt{")
    text = _braces_for(text, r"\^\s*\(", "^{")
    text = re.sub(r"\^\s*(-?\d+)", r"^{\1}", text)
    text = re.sub(
        r"(?<![\\a-zA-Z])(pi|sin|cos|tan|log|ln|exp|theta|alpha|beta)(?![a-zA-Z])", r"\\\1 ", text
    )
    text = re.sub(r"(?<![\\a-zA-Z])(?:infinity|inf|oo)(?![a-zA-Z])", r"\\infty ", text, flags=re.I)
    return re.sub(r"\*", r" \\cdot ", text).replace("%", "").replace("$", "").strip()


def _braces_for(text: str, opening: str, written: str) -> str:
    """sqrt(x + 1) with braces for its parentheses."""
    while found := re.search(opening, text):
        depth, end = 1, found.end()
        while end < len(text) and depth:
            depth += (text[end] == "(") - (text[end] == ")")
            end += 1
        text = text[: found.start()] + written + text[found.end() : end - 1] + "}" + text[end:]
    return text


def _small(text: str) -> bool:
    """Whether an expression is one that a person would write down, and not one that takes for ever
    to compute.
    """
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    text = text.replace("**", "^").replace(" ", "")
    towers = re.search(
        r"\^(?:\{|\()?[^{}()]*\^|\^(?:\{|\()?-?\d{4,}|\^[^+\-,]*!|[)}\]]\^[{(]?-?\d{3,}", text
    )
    factorials = re.search(r"[)}\]]!|\d{4,}!|!!", text)
    endless = re.search(r"\\(?:sum|prod|int|iint|oint|lim|binom|choose)(?![a-zA-Z])", text)
    return (
        len(text) <= MOST_CHARACTERS
        and deepest <= DEEPEST
        and text.count("^") <= MOST_POWERS
        and not (towers or factorials or endless)
        and not re.search(rf"\d{{{MOST_DIGITS},}}", text)
    )


def _assigned(text: str) -> tuple[str, str]:
    """(x, 5) of "x = 5"; ("", text) of anything else."""
    sides = [side.strip() for side in re.split(r"(?<![\\<>!:])=", text)]
    if len(sides) == 2 and NAME.fullmatch(sides[0]) and not RELATION.search(sides[1]):
        return sides[0], sides[1]
    return "", text


def _trimmed(text: str) -> str:
    return text.strip().removeprefix(":").strip().rstrip(".,;: \t\n")


def _tight(text: str) -> str:
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text)


def _balanced(text: str) -> bool:
    """Every bracket has a partner; intervals pair any two kinds."""
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0
