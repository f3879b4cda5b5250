"""What a person names at the command line: a run's student, or any model.

In: a run folder, or a model as a recipe names one. Out: the folder of the weights, and the run.
Decided here: that a folder with a recipe.toml is a run.
"""

from pathlib import Path

from mlx_distill.errors import NotFound
from mlx_distill.models.hub import model_folder
from mlx_distill.runs.run_folder import RunFolder


def run_at(name: str) -> RunFolder | None:
    """The run in a folder of this name; None where it is none."""
    path = Path(name).expanduser()
    return RunFolder(path) if (path / "recipe.toml").exists() else None


def weights_of(name: str) -> Path:
    """The student of a run, or the folder of a model. Raises `NotFound`, or `ModelError`."""
    run = run_at(name)
    if run is None:
        return model_folder(name)
    if not run.student.exists():
        raise NotFound(
            f"{run.path} holds a run without a finished student: run its recipe to the end first"
        )
    return run.student
