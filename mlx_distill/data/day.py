"""The day that prompts say, where a chat template reads the clock.

In: a recipe, a tokenizer, days that were kept. Out: one day, chosen once when a run begins and passed to whoever
renders. Decided here: that the recipe's own comes first, then what a run or a teacher cache began with, then today.
"""

import datetime
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mlx_distill.data.template import reads_clock
from mlx_distill.errors import DataError
from mlx_distill.recipe import DataTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def choose_day(data: DataTable, tokenizer: "PreTrainedTokenizerFast", kept: Iterable[str] = ()) -> str:
    """"2026-11-26", or "" for a template without a clock; `kept` are earlier days ("" = none), the first one counts.

    Raises `DataError` for a day that the recipe names and nothing reads.
    """
    if reads_clock(tokenizer):
        return data.date or next(filter(None, kept), "") or today()
    if data.date:
        raise DataError(
            f"[data] date is {data.date}, but the chat template of {tokenizer.name_or_path} reads no clock; leave it empty"
        )
    return ""


def today() -> str:
    return datetime.date.today().isoformat()


def about_day(day: str) -> str:
    """For a person: which day prompts say, and how to choose another one."""
    return f"prompts say the date {day}: the chat template reads the clock, and a run keeps its first day (data.date sets it)"
