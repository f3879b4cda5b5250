"""The day that prompts say, where a chat template reads the clock.

In: a recipe, a tokenizer, days that were kept. Out: one day, chosen once when a run begins and
passed to whoever renders. Decided here: that the recipe's own comes first, then what a run or a
teacher cache began with, then today; and that the runs of a sweep, which are compared, say one day:
the first of them to choose one writes it beside them.
"""

import datetime
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.data.template import reads_clock
from mlx_distill.errors import DataError, NotFound, RunError
from mlx_distill.files import locked, told_as, write_text
from mlx_distill.readers import read_text
from mlx_distill.recipe.tables import DataTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# in a folder of runs: the day that all of them say, empty until one of them chooses
SHARED = "prompt_date"


def choose_day(
    data: DataTable, tokenizer: "PreTrainedTokenizerFast", kept: Iterable[str] = ()
) -> str:
    """ "2026-11-26", or "" for a template without a clock; `kept` are earlier days ("" = none), the
    first one counts.

    Raises `DataError` for a day that the recipe names and nothing reads.
    """
    if reads_clock(tokenizer):
        return data.date or next(filter(None, kept), "") or today()
    if data.date:
        raise DataError(
            f"[data] date is {data.date}, but the chat template of {tokenizer.name_or_path} reads "
            "no clock; leave it empty"
        )
    return ""


def day_of_run(
    data: DataTable,
    tokenizer: "PreTrainedTokenizerFast",
    kept: str,
    cached: Callable[[], Iterable[str]],
    runs: Path,
) -> str:
    """The day that all prompts of a run say, "" without a clock: the recipe's, else the one with
    which it began (`kept`), else its teacher cache's (`cached`), agreed with the other `runs`.
    """
    day = choose_day(data, tokenizer, [kept])
    if not day or data.date or kept:
        return day
    return agreed_day(runs, choose_day(data, tokenizer, cached()))


def share_day(runs: Path, day: str = "") -> None:
    """From here on all runs in this folder say one day: this one, or the one that the first of them
    chooses.
    """
    path = runs / SHARED
    with told_as(RunError, path):
        runs.mkdir(parents=True, exist_ok=True)
        path.touch()
    if day:
        agreed_day(runs, day)


def shared_day(runs: Path) -> str:
    """The day that all runs in this folder say, "" where none was chosen."""
    path = runs / SHARED
    if not runs.is_dir():  # what begins a run there says so
        return ""
    try:
        text = read_text(path, error=RunError).strip()
    except NotFound:
        return ""
    return kept_as_day(text, str(path))


def kept_as_day(text: Any, where: str) -> str:
    """A day as it was kept, "" for none; raises `RunError` for what is no day."""
    try:
        return datetime.date.fromisoformat(text).isoformat() if text else ""
    except (TypeError, ValueError):
        found = f"{text!r:.40}"
        raise RunError(
            f"{where} holds {found}, expected a day like 2026-11-26; correct it"
        ) from None


def agreed_day(runs: Path, day: str) -> str:
    """The day of the runs in this folder: what was chosen before, else `day`, which is kept where
    they share one.
    """
    path = runs / SHARED
    if not path.is_file():
        return day
    with told_as(RunError, path), locked(path, waiting=lambda: None):
        chosen = shared_day(runs)
        if not chosen:
            write_text(path, f"{day}\n")
    return chosen or day


def today() -> str:
    return datetime.date.today().isoformat()


def about_day(day: str) -> str:
    """For a person: which day prompts say, and how to choose another one."""
    return (
        f"prompts say the date {day}: the chat template reads the clock, and a run keeps its "
        "first day (data.date sets it)"
    )
