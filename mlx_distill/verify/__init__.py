"""Whether a text states the expected answer.

In: a gold answer and what a model wrote after its reasoning. Out: right or wrong, and how the two
were compared. Decided here, a file each, and every rule has a name and a reason beside it:

    spelling    one way of writing: Unicode, LaTeX's spacing and fractions, bold, delimiters
    statement   which part of a text is its answer: the last box, "#### N", "the answer is N", the
    last sentence quantity    what number a phrase says, with its percent sign and unit:
    "$1,234.50", "1 1/2", "70k", "18 dollars" wording     texts and the letters of choices: "(B)",
    "Option B", "\\text{Paris}" mathematics expressions, lists, sets, intervals, equations; what is
    left goes to math-verify sympy_child math-verify in a process of its own, which no expression
    can hang

A text that states several answers ("5 or 6", "5-6", "between 5 and 6"), or says what the answer is
not, states none.
"""

from mlx_distill.verify.verdict import MATHEMATICS, TEXT, compared_as, states

VERSION = 2  # of the rules: what was judged by others is judged again

__all__ = ["MATHEMATICS", "TEXT", "VERSION", "compared_as", "states"]
