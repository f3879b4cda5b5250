"""Whether a folder that is there already is a run's, so that nobody else's files are touched.

In: the path of a run folder to be. Out: nothing, or a `RunError`. Decided here: a run's folder is
told by what only a run leaves together: its lock with its recipe or the mark of a fresh start, its
manifest, or a recipe with every field in our order. A person may have files of such names alone.
"""

from pathlib import Path

from mlx_distill.errors import DistillError, RunError
from mlx_distill.files import of_people, one_line, remedy
from mlx_distill.readers import read_text
from mlx_distill.recipe.load import load_kept_recipe
from mlx_distill.runs import own_files
from mlx_distill.runs.manifest import Manifest
from mlx_distill.runs.small_files import SmallFiles


def refuse_other_folder(path: Path) -> None:
    """Raises `RunError` where a run cannot be made at `path`, or something else lies there."""
    if path.is_symlink() and not path.exists():
        raise RunError(
            f"{path} is a link to {path.readlink()}, which is not there: make that folder or "
            "remove the link"
        )
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file: move it away, or choose another --set run.name=NAME")
    if not path.exists():
        return
    try:
        names = {entry.name for entry in of_people(path)}
        begun = not names or _is_begun(path, names)
    except OSError as error:
        raise RunError(f"{path} cannot be read ({one_line(error)}): {remedy(error)}") from None
    if not begun:
        raise RunError(
            f"{path} is not empty and holds no run: choose another --set run.name=NAME "
            "or move it away"
        )


def _is_begun(path: Path, names: set[str]) -> bool:
    """Whether a run made this folder, going by the names in it."""
    checkpoints, locked = path / "checkpoints", own_files.LOCK in names
    if "checkpoints" in names and not checkpoints.is_dir():
        return False
    if locked and names & {"recipe.toml", own_files.STARTING_OVER}:
        return True
    if SmallFiles(path).readable(Manifest).recipe_digest:
        return True
    if "recipe.toml" in names:
        return _is_ours(path / "recipe.toml")
    if locked and "checkpoints" in names:  # a report comes after a recipe
        return not names & set(own_files.REPORTS)
    return names <= {"checkpoints", ".recipe.toml.tmp"} and not of_people(checkpoints)


def _is_ours(recipe: Path) -> bool:
    try:
        return load_kept_recipe(recipe).toml() == read_text(recipe)
    except DistillError:
        return False
