"""A sweep: a file, read and checked, with all of its runs.

In: a sweep file's path. Out: a `Sweep`. Decided here: which runs can be compared with each other,
which one the others are compared with, and which models all of them share. Nothing runs here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_distill.data.detection import with_format
from mlx_distill.errors import RecipeError, RunError
from mlx_distill.recipe.complaints import found_as, short
from mlx_distill.recipe.load import apply_override, build_recipe, read_toml, refuse_sweep
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.recipe.shipped import named
from mlx_distill.recipe.tables import StudentTable, TeacherTable
from mlx_distill.sweeps.file import (
    Settings,
    SweepFile,
    assign,
    flat,
    over,
    read_sweep_file,
    refuse_no_axis,
    results_folder,
)
from mlx_distill.sweeps.points import Builder, Point, value_of


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read and checked, with all of its points.

    full: the condition that the others are compared with, None for the dearest. shared: which of
    "base" and "teacher" are the same model in all runs and are to be scored.
    """

    path: Path
    file: SweepFile
    base: Recipe
    axes: dict[str, list]
    full: Point | None
    shared: frozenset[str]
    points: tuple[Point, ...]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def folder(self) -> Path:
        """Of its results."""
        return results_folder(self.file, self.path)


def load_sweep(path: Path, overrides: tuple[str, ...] = (), recipe: Path | None = None) -> Sweep:
    """Read a sweep file and make its points; `overrides` change the base recipe as its own `[set]`
    does, and after it. `recipe` is a base in the place of the file's.

    Raises `NotFound` or `RecipeError`, in one line, for whatever a recipe would be refused for, and
    for runs that cannot be compared.
    """
    path = named(path, sweeps=True)
    file = read_sweep_file(path)
    source = path.parent / file.recipe
    if recipe:
        source = named(recipe)
        file = over(file, path, source)
    tables = read_toml(source)
    refuse_sweep(tables, source)
    assign(tables, flat(file.set, path, "set"), source)
    for override in overrides:
        apply_override(tables, override)
    axes = flat(file.axes, path, "axes")
    for name, values in axes.items():
        refuse_no_axis(path, name)
        if not isinstance(values, list) or not values:
            raise RecipeError(
                f"{path}: [axes] {short(name)} should be a list of values, found {found_as(values)}"
            )
    base = with_format(build_recipe(tables, source))
    points = tuple(Builder(path, file, tables, axes, base).points())
    _refuse_other_problems(path, points)
    full = _full(path, flat(file.full, path, "full"), points)
    return Sweep(path, file, base, axes, full, _shared(points, base), points)


def _refuse_other_problems(path: Path, points: Sequence[Point]) -> None:
    tables = [point.recipe.eval for point in points]
    if not all(table.task for table in tables):
        raise RecipeError(
            f"{path}: a sweep compares scores, but [eval] task is empty: name a task in the base "
            "recipe or in [set]"
        )
    if len({(table.task, table.examples, table.seed) for table in tables}) > 1:
        raise RecipeError(
            f"{path}: a sweep compares scores on the same problems, but its runs differ in [eval] "
            "task, examples or seed"
        )


def _full(path: Path, settings: Settings, points: Sequence[Point]) -> Point | None:
    """The first condition with these values, rather of the grid than an arm."""
    if not settings:
        return None
    fitting = [
        one
        for one in points
        if all(value_of(one.recipe, name) == value for name, value in settings.items())
    ]
    if not fitting:
        asked = ", ".join(f"{name} = {value!r}" for name, value in settings.items())
        raise RecipeError(f"{path}: [full] asks for {short(asked)}, which no run of this sweep has")
    return next((one for one in fitting if not one.label), fitting[0])


def _shared(points: Sequence[Point], base: Recipe) -> frozenset[str]:
    """Which of "base" and "teacher" are one model in all runs, scored in one way, and asked for."""
    bases, teachers = set(), set()
    for recipe in (point.recipe for point in points):
        scored = recipe.eval.model_dump_json()
        bases.add((*_loaded(recipe.student), *_cut(recipe), scored))
        teachers.add((*_loaded(recipe.teacher), scored))
    shared = set()
    if base.eval.score_base and len(bases) == 1:
        shared.add("base")
    if base.eval.score_teacher and len(teachers) == 1 and base.teacher.model:
        shared.add("teacher")
    return frozenset(shared)


def _loaded(table: StudentTable | TeacherTable) -> tuple[str | int, ...]:
    """What decides the numbers of a model before training."""
    return table.model, table.revision, table.quantize_bits, table.compute_dtype


def _cut(recipe: Recipe) -> tuple[str | int, ...]:
    """What decides which parts a student begins without; where activations do, the texts that they
    are measured on.
    """
    if not recipe.prune.cuts:
        return ()
    before = recipe.prune.before
    parts = before.model_dump_json(exclude={"folder", "until"})
    if not before.measures:
        return (parts,)
    return parts, recipe.run.seed, recipe.data.model_dump_json(), recipe.rollouts.model_dump_json()


def distinct(sweeps: Sequence[Sweep]) -> dict[Path, Point]:
    """Each run once, by its folder. Raises `RecipeError` or `RunError` for two sweeps that
    get in each other's way and for a folder that holds another recipe's run.
    """
    folders = [one.folder for one in sweeps]
    for one in sweeps:
        if folders.count(one.folder) > 1:
            raise RecipeError(
                f"{one.path}: another of these sweeps has the folder {one.folder} too: name one "
                "with `folder`"
            )
        if (one.folder / "recipe.toml").exists():
            raise RunError(
                f"{one.folder} holds a run, and {one.path} would put its results there: name "
                "another `folder`"
            )
    points: dict[Path, Point] = {}
    for point in (point for one in sweeps for point in one.points):
        other = points.setdefault(point.folder.path, point)
        if other.recipe.digest() != point.recipe.digest():
            changes = "; ".join(other.recipe.differences(point.recipe))
            raise RecipeError(
                f"{point.folder.path} would hold two different runs ({changes}): give these "
                "sweeps different `runs`"
            )
    for point in points.values():
        _refuse_changed(point)
    return points


def _refuse_changed(point: Point) -> None:
    folder = point.folder
    if not (folder.path / "recipe.toml").exists() or not folder.has_results():
        return
    try:
        changes = "; ".join(folder.recipe().differences(point.recipe))
    except RunError:  # the run itself will say, and is one that failed; the others go on
        return
    if changes:
        raise RunError(
            f"{folder.path} holds another run than this sweep's ({changes}): name another folder "
            "with `runs`, or delete it"
        )
