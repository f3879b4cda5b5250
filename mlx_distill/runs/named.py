"""What a person names at the command line: a run's student, or any model.

In: a run folder, or a model as a recipe names one. Out: the folder of the weights, the run, and
what is needed to ask the model. Decided here: that a folder with a recipe.toml is a run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_distill.backends.stops import stops_of
from mlx_distill.data.day import choose_day
from mlx_distill.errors import NotFound
from mlx_distill.models.hub import load_tokenizer, model_folder
from mlx_distill.recipe.tables import DataTable
from mlx_distill.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Named:
    """A model and how it is asked. run: whose student it is, None for any other model; day: what
    its prompts say, "" where they say none; stop_ids: where its texts end.
    """

    folder: Path
    run: RunFolder | None
    tokenizer: "PreTrainedTokenizerFast"
    day: str
    stop_ids: frozenset[int]

    @classmethod
    def of(cls, name: str) -> "Named":
        """Raises as `weights_of`."""
        folder, run = weights_of(name), run_at(name)
        tokenizer = load_tokenizer(folder)
        day = choose_day(DataTable(), tokenizer, [run.kept_day() if run else ""])
        return cls(folder, run, tokenizer, day, stops_of(folder, tokenizer))


def run_at(name: str) -> RunFolder | None:
    """The run in a folder of this name; None where it is none."""
    path = Path(name).expanduser()
    return RunFolder(path) if (path / "recipe.toml").exists() else None


def weights_of(name: str) -> Path:
    """The student of a run, as the run wrote it, or the folder of a model. Raises `NotFound`,
    `ModelError`, or `RunError`.
    """
    run = run_at(name)
    if run is None:
        return model_folder(name)
    if not run.student.exists():
        raise NotFound(
            f"{run.path} holds a run without a finished student: run its recipe to the end first"
        )
    run.exported.refuse_changed()
    return run.student
