r"""One way of writing: the same answer in Unicode, LaTeX or Markdown becomes the same characters.

`plain` leaves `\boxed{}` alone, and marks mathematics (`$x$`, `\(x\)`, `\[x\]`) as ⟦x⟧, so that a
dollar sign that is left is money. It is idempotent but for white space.
"""

import re
import unicodedata

OPEN, CLOSE = "⟦", "⟧"

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
CHARACTERS = {
    **dict.fromkeys("−‐‑‒–﹣－", "-"),  # every dash that is written for a minus
    "—": ", ",
    "―": ", ",
    **dict.fromkeys("º˚", "°"),
    **dict.fromkeys("“”„‟″", '"'),
    **dict.fromkeys("‘’‚‛′", "'"),
    **dict.fromkeys("⋅·∙×✕", "*"),
    "÷": "/",
    "∕": "/",
    "⁄": "/",
    "。": ".",
    "√": r"\sqrt ",
    "π": r"\pi ",
    "∞": r"\infty ",
    "±": r"\pm ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∅": r"\emptyset ",
    "≤": r"\le ",
    "⩽": r"\le ",
    "≥": r"\ge ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "∈": r"\in ",
    "≈": r"\approx ",
    "≅": r"\approx ",
    "θ": r"\theta ",
    "α": r"\alpha ",
    "β": r"\beta ",
    "ℝ": r"\mathbb{R}",
    OPEN: "[",
    CLOSE: "]",  # ours alone
}
REWRITTEN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (
            r"\\(?:left|right|big|Big|bigg|Bigg|[bB]igg?[lr]|displaystyle|textstyle|limits|"
            r"nolimits|bf|it|rm)(?![a-zA-Z])",
            "",
        ),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\{,\}", ","),  # 2{,}125
        (r"(?<=\d)\\,(?=\d{3}(?!\d))", " "),  # 2\,125
        (
            r"(?<!\\)\\[,;:!> ]|~|\\q?quad(?![a-zA-Z])|\\(?:h|thin)space(?![a-zA-Z])|"
            r"\\hspace\{[^{}]*\}",
            " ",
        ),
        (r"\\(?:leqslant|leq)(?![a-zA-Z])", r"\\le "),
        (r"\\(?:geqslant|geq)(?![a-zA-Z])", r"\\ge "),
        (r"\\neq(?![a-zA-Z])", r"\\ne "),
        (r"\\(?:varnothing)(?![a-zA-Z])", r"\\emptyset "),
        (r"\\(?:cdot|times|ast)(?![a-zA-Z])", "*"),
        (r"\\div(?![a-zA-Z])", "/"),
        (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])|\\degree(?![a-zA-Z])", "°"),
        (r"\\pounds(?![a-zA-Z])", "£"),
        (r"\\euro(?![a-zA-Z])", "€"),
        (r"\\%", "%"),
        (r"\\([&#_])", r"\1"),
    )
]
WORDS_IN_LATEX = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mbox|"
    r"hbox|operatorname|bold|emph|underline)"
    r"\*?\s*\{([^{}]*)\}"
)
SHORT_FRACTION = re.compile(
    r"\\frac\s*(\d|\{[^{}]*\}|[a-zA-Z])\s*(\d|\{[^{}]*\}|[a-zA-Z])"
)  # \frac34, \frac3{4}
SHORT_ROOT = re.compile(r"\\sqrt\s*(\d+|[a-zA-Z])(?![a-zA-Z])")
NEGATIVE = re.compile(r"(?<![\d)] )\b(?:negative|minus) (?=[\d$\\])", re.I)
TAG = re.compile(r"</?[a-zA-Z]{2,20}>")
ITALIC = re.compile(r"(?<![\w*)}\]\\])([*_])(?=[^\s*_{])([^*_\n]*)(?<=[^\s*_])\1(?![\w*])")
BOLD = re.compile(r"(?<![\w)}])\*\*(?=\S)|(?<=\S)\*\*(?![\w({\\])|__(?=[^_])|`+")
MATHEMATICS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\$\$(.+?)\$\$",
        r"\\\[(.+?)\\\]",
        r"\\\((.+?)\\\)",
        # as Pandoc reads it: no space inside of the signs, no digit after them; else it is money
        r"(?<![\w\\$])\$(?=[^\s$])([^$\n]*?)(?<=[^\s\\])\$(?![\d$])",
    )
]
MONEY = "\ue000"  # an escaped dollar while the others are read


def words(text: str) -> frozenset[str]:
    """The words of a list that is written as text."""
    return frozenset(text.split())


def plain(text: str) -> str:
    """The text in one way of writing."""
    text = TAG.sub(lambda found: " Answer: " if found[0].lower() == "<answer>" else "\n", text)
    text = ITALIC.sub(r"\2", BOLD.sub("", text))
    text = SUPERSCRIPT.sub(lambda found: "^{" + found[0].translate(SUPERSCRIPTS) + "}", text)
    text = "".join(map(_character, text))
    text = text.replace(r"\$", MONEY)
    for pattern in MATHEMATICS:
        text = pattern.sub(lambda found: OPEN + found[1].strip() + CLOSE, text)
    for pattern, replacement in REWRITTEN:
        text = pattern.sub(replacement, text)
    for _ in range(4):  # \textbf{\text{B}}
        text = WORDS_IN_LATEX.sub(r" \1 ", text)
    text = SHORT_FRACTION.sub(lambda found: rf"\frac{_braced(found[1])}{_braced(found[2])}", text)
    text = SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = re.sub(r"[^\S\n]+", " ", text).replace(" ^", "^")  # \text{ ft}^2
    text = NEGATIVE.sub("-", text)
    return text.replace(MONEY, "$").strip()


def without_marks(text: str) -> str:
    """The text without the marks of mathematics."""
    return text.replace(OPEN, " ").replace(CLOSE, " ").strip()


def _braced(part: str) -> str:
    return part if part.startswith("{") else "{" + part + "}"


def _character(one: str) -> str:
    if one < "\x7f":
        return one if one.isprintable() or one in "\n\t" else " "
    if one in CHARACTERS:
        return CHARACTERS[one]
    if one.isdecimal():  # full-width and other scripts' digits
        return str(int(one))
    if unicodedata.category(one) in ("Cc", "Cf", "Co", "Cs"):  # zero-width, bidirectional, private
        return ""
    if unicodedata.decomposition(one).startswith("<fraction>"):  # ½
        return " " + unicodedata.normalize("NFKC", one).replace("⁄", "/")
    return unicodedata.normalize("NFKC", one)
