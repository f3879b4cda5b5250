"""A condition of a sweep in words: "a quarter of the tokens, with the teacher".

In: settings by `table.field`, as a sweep has them. Out: a phrase. Two settings that differ read
differently, also where no sentence here knows their field: then its name and value stand there.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from mlx_distill.words import is_number

SHARES = {
    0.1: "a tenth",
    0.2: "a fifth",
    0.25: "a quarter",
    0.5: "half",
    0.75: "three quarters",
}
PLACES = {"prefix": "first", "suffix": "last", "middle": "middle"}
SEGMENTS = {"prompt": "prompt", "cot": "chain of thought", "answer": "answer"}
DIVERGENCES = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "jsd": "Jensen-Shannon divergence",
    "skew_kl": "skewed forward KL",
    "skew_reverse_kl": "skewed reverse KL",
    "tvd": "total variation",
    "mixed_kl": "forward and reverse KL",
    "entropy_kl": "forward and reverse KL by the teacher's entropy",
    "dkd": "decoupled distillation",
}
ENDINGS = {"answer": "the answer after the cut", "none": "nothing after the cut"}
CONTEXTS = {"drop": "context dropped", "keep": "context read"}
WRITERS = {
    "data": "written by the data",
    "teacher": "written by the teacher",
    "student": "written by the student",
}
CUT = ("truncation.fraction", "truncation.keep", "truncation.span")


def in_words(settings: dict[str, Any]) -> str:
    """`{"truncation.fraction": 0.25, "objective.kd_weight": 0.5}` → "a quarter of the tokens, with
    the teacher".
    """
    said = [_cut(settings)] if "truncation.fraction" in settings else []
    others = {name: value for name, value in settings.items() if name not in CUT or not said}
    return ", ".join([*said, *(_field(name, value, others) for name, value in others.items())])


def capital(text: str) -> str:
    """The text as a sentence begins."""
    return text[:1].upper() + text[1:]


def subject(name: str) -> str:
    """A name before its verb; one with a comma inside needs another behind it."""
    return f"{name}," if "," in name else name


def _cut(settings: dict[str, Any]) -> str:
    """ "the last half of the tokens": fraction, keep and span are one phrase."""
    fraction = settings["truncation.fraction"]
    keep, span = (settings.get(f"truncation.{name}") for name in ("keep", "span"))
    what = {"cot": "chain of thought", "sequence": "whole sequence"}.get(str(span), "tokens")
    where = PLACES.get(str(keep), "")
    whole = is_number(fraction) and fraction == 1
    share = "all" if whole else _share(fraction)
    if where and not whole:
        share = f"the {where} {share.removeprefix('a ')}"
    phrase = "all tokens" if whole and not span else f"{share} of the {what}"
    return f"{phrase}, up to </think>" if keep == "cot" else phrase


def _share(value: Any) -> str:
    """0.25 → "a quarter", 0.37 → "37 %"."""
    if not is_number(value):
        return _value(value)
    return SHARES.get(value) or _percentage(value)


def _percentage(value: Any) -> str:
    return f"{100 * value:.12g}\u00a0%" if is_number(value) else _value(value)


def _with_teacher(weight: Any) -> str:
    if not is_number(weight):
        return f"kd_weight {_value(weight)}"
    named = {0: "without the teacher", 0.5: "with the teacher", 1: "with the teacher alone"}
    return named.get(weight) or f"with the teacher at a weight of {weight:g}"


def _segments(value: Any) -> str:
    parts = value if isinstance(value, list | tuple) else [value]
    return " + ".join(SEGMENTS.get(str(part), _value(part)) for part in parts)


def _count(noun: str, of_all: str) -> Callable[[Any], str]:
    """ "2,000 examples"; 0 stands for all that there are."""

    def words(value: Any) -> str:
        if not isinstance(value, int) or isinstance(value, bool):
            return f"{noun}s {_value(value)}"
        return f"{value:,} {noun}{'' if value == 1 else 's'}" if value else of_all

    return words


def _named(known: dict[str, str]) -> Callable[[Any], str]:
    return lambda value: known.get(str(value)) or _value(value)


FIELDS: dict[str, Callable[[Any], str]] = {
    "objective.kd_weight": _with_teacher,
    "objective.segments": _segments,
    "objective.divergence": _named(DIVERGENCES),
    "truncation.context": _named(CONTEXTS),
    "truncation.ending": _named(ENDINGS),
    "truncation.whole_share": lambda value: (
        f"{_share(value) if value else 'none'} of the examples whole"
    ),
    "truncation.spread": lambda value: (
        f"each cut at its own fraction, ± {_percentage(value)}" if value else "one fraction for all"
    ),
    "truncation.token_share": lambda value: (
        f"{_share(value) if value != 1 else 'all'} of the supervised tokens"
    ),
    "data.train_examples": _count("example", "all examples"),
    "optim.steps": _count("step", "steps by epochs"),
    "optim.epochs": _count("epoch", "no epoch"),
    "optim.learning_rate": lambda value: f"a rate of {_value(value)}",
    "rollouts.by": _named(WRITERS),
    "student.model": lambda value: f"student {_value(value)}",
    "teacher.model": lambda value: f"teacher {_value(value)}" if value else "no teacher",
}


def _field(name: str, value: Any, all_of_them: dict[str, Any]) -> str:
    """One setting; a field without words of its own is called by its name, with its table where two
    tables have one of that name.
    """
    if name in FIELDS:
        return FIELDS[name](value)
    short = name.rpartition(".")[2]
    twice = sum(other.rpartition(".")[2] == short for other in all_of_them) > 1
    called = name if twice else short.replace("_", " ")
    return f"{called} {_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " + ".join(map(_value, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return value if isinstance(value, str) else json.dumps(value)


def joined(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
