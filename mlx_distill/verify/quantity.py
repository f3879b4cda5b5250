r"""What number a phrase says: `$1,234.50`, `-\frac{3}{4}`, `1 1/2`, `70k`, `20 percent`, `18
dollars a day`, `twelve`.

In: a phrase in the writing of `spelling.plain`. Out: a `Quantity`, exact, or None where the phrase
is not one number.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from mlx_distill.verify.spelling import words

# 1,234  1 000  1'000  12,34,567
DIGITS = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d{1,3}(?:[ '_]\d{3})+(?!\d)|\d+)"
DECIMAL = rf"(?:{DIGITS}(?:\.\d+)?|\.\d+)"
CURRENCY = r"(?:US\$|USD|[$€£¥₹]|Rs\.?)"
NUMBER = re.compile(
    rf"""
    (?P<sign>[-+]?)\s*(?P<currency>{CURRENCY})?\s*(?P<sign2>-?)\s*
    (?:
        (?:(?P<whole>{DIGITS})\s*)?\\frac\s*\{{\s*(?P<minus>-?)\s*(?P<top>{DECIMAL})\s*\}}\s*\{{\s*(?P<bottom>{DECIMAL})\s*\}}
      | (?:(?P<whole2>\d+)\s+(?:and\s+)?)?(?P<top2>{DIGITS})\s*/\s*(?P<bottom2>{DIGITS})
      | (?P<decimal>{DECIMAL})
        (?:[eE](?P<power>[-+]?\d{{1,3}})(?![\w.]) | \s*[*x]\s*10\s*\^\s*\{{?\s*(?P<power2>[-+]?\d{{1,3}})\s*\}}?)?
    )
    (?P<scale>(?-i:[kKM])(?![\w/^])|(?:bn|mn)\b|\s*(?:hundred|thousand|million|billion|trillion|dozen)\b)?
    (?P<percent>\s*(?:%|(?:percent|per\ cent|pct|percentage\ points?)\b))?
""",
    re.VERBOSE | re.IGNORECASE,
)
COMMA = re.compile(
    r"(?P<sign>[-+]?)\s*(?P<whole>\d+),(?P<part>\d{1,2}|\d{4,})(?=\D|$)"
)  # 3,5 as half of Europe writes it
SCALES = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "mn": 10**6,
    "bn": 10**9,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS = {word: i for i, word in enumerate(ONES.split())} | {
    word: 10 * i for i, word in enumerate(TENS.split(), 2)
}
ANY_ONE, ANY_TEN = ONES.replace(" ", "|"), TENS.replace(" ", "|")
NAMED = re.compile(
    rf"(?P<tens>{ANY_TEN})(?:[- ](?P<ones>{ANY_ONE}))?(?!\w)|(?P<word>{ANY_ONE})(?!\w)", re.I
)
APPROXIMATELY = re.compile(
    r"^(?:\\(?:approx|sim)\b|~|=|(?:about|approximately|approx\.?|around|roughly|exactly|"
    r"precisely|only|just|a total of|total of|"
    r"in total|equal to|equals|simply)(?![a-z]))\s*",
    re.I,
)

# what may stand behind a number without being its unit: it would be another number
NOT_UNITS = words(
    "pi sqrt root factorial squared cubed plus minus divided multiplied over half halves "
    "thirds fourths fifths sixths sevenths eighths ninths tenths hundredths thousandths "
    "power mod infinity infty sin cos tan log ln exp or not and choose hundred thousand "
    "million billion trillion january february march april may june july august september "
    "october november december jan feb mar apr jun jul aug sep sept oct nov dec maybe "
    "perhaps possibly isn't wrong incorrect more less fewer"
)
UNITS = {  # as it is written: its words; a unit that stands here may touch its number
    "$": "dollar",
    "usd": "dollar",
    "us$": "dollar",
    "buck": "dollar",
    "€": "euro",
    "eur": "euro",
    "£": "sterling",
    "gbp": "sterling",
    "¥": "yen",
    "₹": "rupee",
    "rs": "rupee",
    "rs.": "rupee",
    "°": "degree",
    "deg": "degree",
    "c": "celsius",
    "f": "fahrenheit",
    "°c": "degree celsius",
    "°f": "degree fahrenheit",
    "celsius": "degree celsius",
    "fahrenheit": "degree fahrenheit",
    "m": "meter",
    "metre": "meter",
    "km": "kilometer",
    "kilometre": "kilometer",
    "cm": "centimeter",
    "centimetre": "centimeter",
    "mm": "millimeter",
    "millimetre": "millimeter",
    "mi": "mile",
    "ft": "foot",
    "feet": "foot",
    "in": "inch",
    "inches": "inch",
    "yd": "yard",
    "g": "gram",
    "kg": "kilogram",
    "mg": "milligram",
    "lb": "pound",
    "lbs": "pound",
    "oz": "ounce",
    "l": "liter",
    "litre": "liter",
    "ml": "milliliter",
    "h": "hour",
    "hr": "hour",
    "min": "minute",
    "s": "second",
    "sec": "second",
    "ms": "millisecond",
    "mph": "mile per hour",
    "kph": "kilometer per hour",
    "kmh": "kilometer per hour",
    "sq": "square",
    "cu": "cubic",
    "cent": "cent",
    "¢": "cent",
    "n": "newton",
    "j": "joule",
    "w": "watt",
    "kw": "kilowatt",
    "v": "volt",
    "hz": "hertz",
    "mol": "mole",
    "day": "day",
    "pm": "pm",
    "am": "am",
    "gb": "gigabyte",
    "mb": "megabyte",
    "kb": "kilobyte",
    "st": "",
    "nd": "",
    "rd": "",
    "th": "",
}
LONGEST = 300  # characters of a phrase; nobody writes a longer number
EXACT_UNITS = {"square", "cubic", "per"}  # 5 m is not 5 m^2
FILLERS = words(
    "of the a an in total altogether each every left remaining is are was were it that "
    "which for to at by from on all his her their he she they"
)
TAIL = re.compile(
    r"[^\d=+*^<>\\{}()|!]*(?:(?<=[a-z])\^\{?[23]\}?)?(?:\s*/\s*[a-z]+(?:\^\{?[23]\}?)?)?[^\d=+*^<>\\{}()|!]*",
    re.I,
)


@dataclass(frozen=True)
class Quantity:
    """A number as it was written: `value` without the percent sign, `decimals` after its point
    (None: exact), words of its unit.
    """

    value: Fraction
    percent: bool = False
    decimals: int | None = None
    unit: frozenset[str] = frozenset()


def read(phrase: str, comma: bool = False) -> Quantity | None:
    """The one number that the whole phrase says, with the unit behind it; `comma`: 3,5 may be a
    decimal.
    """
    if len(phrase) > LONGEST:
        return None
    phrase = APPROXIMATELY.sub("", phrase.strip()).strip()
    phrase = APPROXIMATELY.sub("", phrase)
    decimal = COMMA.fullmatch(phrase) if comma else None
    if decimal:
        return read("{sign}{whole}.{part}".format_map(decimal.groupdict()))
    found = NUMBER.match(phrase)
    if found:
        return _numeral(found, phrase[found.end() :])
    named = NAMED.match(phrase)
    if not named:
        return None
    parts = (named["word"], named["tens"], named["ones"])
    number = sum(WORDS[part.lower()] for part in parts if part)
    return read(f"{number}{phrase[named.end() :]}")  # twenty percent, one thousand, five apples


def _numeral(found: re.Match, tail: str) -> Quantity | None:
    value, decimals = _value(found)
    unit = _unit(found["currency"] or "", tail)
    if value is None or unit is None:
        return None
    scale = (found["scale"] or "").strip().lower()
    sign = -1 if "-" in (found["sign"], found["sign2"], found["minus"]) else 1
    return Quantity(sign * value * SCALES[scale], bool(found["percent"]), decimals, unit)


def _value(found: re.Match) -> tuple[Fraction | None, int | None]:
    if found["decimal"]:
        digits = _digits(found["decimal"])
        power = int(found["power"] or found["power2"] or 0)
        decimals = len(digits.partition(".")[2]) - power if "." in digits else None
        return Fraction(digits) * Fraction(10) ** power, decimals
    whole = Fraction(_digits(found["whole"] or found["whole2"] or "0"))
    top, bottom = (
        Fraction(_digits(found[name] or found[name + "2"])) for name in ("top", "bottom")
    )
    mixed = bool(found["whole"] or found["whole2"])
    if not bottom or (mixed and not top < bottom):  # 3 7/2 is no mixed number
        return None, None
    return whole + top / bottom, None


def _digits(text: str) -> str:
    return re.sub(r"[ ,'_]", "", text)


def _unit(currency: str, tail: str) -> frozenset[str] | None:
    """The words of a unit; None where what stands behind a number is more than a unit."""
    if tail and (
        tail[0].isalnum() or tail[0] in "_.:'\"-/&#@"
    ):  # it touches the number: 5x, 5km, 2:40, 5-6
        attached = re.match(r"[A-Za-z°]+|-(?=[A-Za-z]{2})|/(?=\s*(?:[A-Za-z]{2}|[smhd]\b))", tail)
        if not attached or (
            attached[0] not in "-/"
            and attached[0].lower() not in UNITS
            and attached[0].lower().removesuffix("s") not in UNITS
        ):
            return None
    if not TAIL.fullmatch(tail):
        return None
    written = [word for part in re.split(r"[\s,;:?\"]+", tail) for word in _words(part.strip(".-"))]
    if written and written[0] in {"squared", "cubed"}:  # 5 squared is 25
        return None
    if any(
        word in NOT_UNITS or word in WORDS for word in written if word not in ("squared", "cubed")
    ):
        return None
    if any(
        len(word) == 1 and word not in UNITS and word not in "ai" for word in written
    ) or written[:1] == ["i"]:  # 5 x
        return None
    powers = {"squared": "square", "cubed": "cubic"}
    known = (
        powers.get(word)
        or UNITS.get(word, UNITS.get(word.removesuffix("s"), word.removesuffix("s")))
        for word in written
    )
    named = {word for unit in known for word in unit.split()} - FILLERS
    return frozenset(named | ({UNITS[currency.lower()]} if currency else set()))


def _words(part: str) -> list[str]:
    """A word, or the parts of m/s, cm^2, °C."""
    part = part.lower()
    for power, word in (("2", "square "), ("3", "cubic ")):
        part = re.sub(rf"([a-z]+)\^\{{?{power}\}}?", rf"{word}\1", part)
    return (
        part.replace("/", " per ")
        .replace("°c", "celsius")
        .replace("°f", "fahrenheit")
        .replace("°", " ° ")
        .split()
    )


def same_unit(gold: frozenset[str], answer: frozenset[str]) -> bool:
    """Whether two units do not contradict each other: one is missing, or holds the other's words."""
    if not gold or not answer:
        return True
    return gold & EXACT_UNITS == answer & EXACT_UNITS and (gold <= answer or answer <= gold)


def equal(gold: Quantity, answer: Quantity) -> bool:
    """Whether an answer says the expected number.

    A percentage is asked for in per cent: gold 20 % is 20 or 20 %, never 0.2. A bare gold number
    may be a percentage as GSM8K writes it (20 for 20 %), or the value of one (0.2 for 20 %).
    """
    if not same_unit(gold.unit, answer.unit):
        return False
    if gold.percent == answer.percent:
        return _close(gold.value, answer)
    if gold.percent:
        return not answer.unit and _close(gold.value, answer)
    if gold.unit:
        return False
    return (abs(gold.value) >= 1 and _close(gold.value, answer)) or gold.value == answer.value / 100


def _close(gold: Fraction, answer: Quantity) -> bool:
    """Equal, or rounded or cut to at least six decimals: 0.333333 is 1/3, 0.333 and 0.333334 are
    not.
    """
    if gold == answer.value:
        return True
    if answer.decimals is None or answer.decimals < 6 or abs(answer.value) < Fraction(1, 10):
        return False
    missing = (abs(gold) - abs(answer.value)) * 10**answer.decimals
    return gold * answer.value > 0 and Fraction(-1, 2) <= missing < 1
