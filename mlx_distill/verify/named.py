"""Mathematics tasks by name: where their problems lie and how they are asked.

In: a name ("aime24"), and a file of rows as the hub has them, "" for the hub itself. Out: rows, each
with its place. Decided here: hub ids, splits and columns, how the problem is put, and how many
tokens an answer is usually given.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlx_distill.data.sources import rows_of
from mlx_distill.recipe.tables import DataTable

PROBLEM = "{problem}"
BOXED = f"{PROBLEM}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
LONG = 32_768  # tokens that the paper and lighteval give an answer of these


@dataclass(frozen=True)
class NamedTask:
    """Problems of the hub: the columns of question and answer, and the tokens of an answer that
    scores of it are reported with.
    """

    id: str
    columns: tuple[str, str]
    split: str
    config: str = ""
    tokens: int = LONG

    def rows(self, file: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(place, row) of a file, or of the hub. Raises `NotFound` or `DataError`."""
        source = file or self.id
        config = "" if file else self.config
        data = DataTable(source=source, config=config, split=self.split)
        return ((f"{source}, {where}", row) for where, row in rows_of(data))


NAMED_TASKS = {
    "gsm8k": NamedTask("openai/gsm8k", ("question", "answer"), "test", "main", 256),
    "math500": NamedTask("HuggingFaceH4/MATH-500", ("problem", "answer"), "test"),
    "aime24": NamedTask("HuggingFaceH4/aime_2024", ("problem", "answer"), "train"),
    "aime25": NamedTask("yentinglin/aime_2025", ("problem", "answer"), "train"),
    "aime26": NamedTask("MathArena/aime_2026", ("problem", "answer"), "train"),
    "amc23": NamedTask("math-ai/amc23", ("question", "answer"), "test"),
    "olympiadbench": NamedTask(
        "Hothan/OlympiadBench", ("question", "final_answer"), "train", "OE_TO_maths_en_COMP"
    ),
}
