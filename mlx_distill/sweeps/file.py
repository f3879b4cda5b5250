"""A sweep file: a base recipe, and the runs that axes, arms and seeds make of it.

In: a TOML file. Out: a `Sweep` with its `Point`s, each a complete recipe. Decided here: which runs
a sweep consists of, what they are called, and which of them can read the teacher's cache. A run's
name says how its recipe differs from the base, so that sweeps over the same base that keep their
runs in one folder share those that are equal.
"""

import copy
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from mlx_distill.errors import RecipeError
from mlx_distill.readers import path_of
from mlx_distill.recipe import (
    OUTSIDE_DIGEST,
    Fraction,
    Recipe,
    Table,
    TeacherTable,
    apply_override,
    build_recipe,
    cache_serves,
    describe,
    found_as,
    near,
    read_toml,
    short,
    with_values,
)
from mlx_distill.reporting.kept_run import read_scores
from mlx_distill.reporting.study import MATCHED
from mlx_distill.runs.run_folder import RunFolder

Settings = dict[str, Any]  # "table.field" → value
LONGEST_NAME = 120  # bytes of a run folder's name, before its digest
MOST_RUNS = 10_000
NOT_AN_AXIS = {  # field → what to do instead
    "run.seed": "use seeds = […]",
    "run.name": "runs are named by what they change",
    "run.folder": 'use runs = "FOLDER"',
    "eval.score_base": "use [set]",
    "eval.score_teacher": "use [set]",
    "eval.compare": "the sweep's page compares all of its runs",
}
CACHE_FIELDS = tuple(name for name in TeacherTable.model_fields if name.startswith("cache"))


class SweepFile(Table):
    """A sweep as it is written; nested tables hold `table.field = value` as in a recipe."""

    recipe: str = ""  # the base; a path from this file
    question: str = ""  # what the sweep is to answer, for its page
    folder: str = ""  # of the results; "" = runs/NAME
    runs: str = ""  # of the run folders, which several sweeps may share; "" = FOLDER/runs
    seeds: Annotated[
        tuple[int, ...], Field(strict=False)
    ] = ()  # values of run.seed; () = the base's
    token_matched: Annotated[
        tuple[Fraction, ...], Field(strict=False)
    ] = ()  # fractions to run with 1/fraction times the examples
    set: Annotated[dict[str, Any], Field(default_factory=dict)]  # changes the base
    axes: Annotated[
        dict[str, Any], Field(default_factory=dict)
    ]  # a list of values each; every combination is run
    full: Annotated[
        dict[str, Any], Field(default_factory=dict)
    ]  # the condition that the others are compared with; {} = the dearest
    arms: Annotated[
        tuple[dict[str, Any], ...], Field(strict=False)
    ] = ()  # single conditions beside the axes, each with a name


@dataclass(frozen=True)
class Point:
    """One run of a sweep: what sets it apart from the base, its seed aside, and its whole recipe."""

    label: str
    settings: Settings
    recipe: Recipe

    @property
    def name(self) -> str:
        return self.recipe.run.name

    @property
    def folder(self) -> RunFolder:
        return RunFolder.of(self.recipe)

    @property
    def done(self) -> bool:
        """Whether its student is trained, scored and reported. A damaged run is not: started again,
        it says or mends that.
        """
        folder = self.folder
        if (
            not folder.readable("manifest.json").get("finished")
            or not (folder.path / "report.html").is_file()
        ):
            return False
        return "student" in read_scores(folder.readable("eval.json").get("scores"), {})


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
        return _results_folder(self.file, self.path)


def _results_folder(file: SweepFile, path: Path) -> Path:
    return Path(file.folder or f"runs/{path.stem}").expanduser()


# reading


def load_sweep(path: Path, overrides: tuple[str, ...] = ()) -> Sweep:
    """Read a sweep file and make its points; `overrides` change the base recipe as its own `[set]`
    does, and after it.

    Raises `NotFound` or `RecipeError`, in one line, for whatever a recipe would be refused for, and
    for runs that cannot be compared.
    """
    file = _read(path)
    tables = read_toml(path.parent / file.recipe)
    _assign(tables, flat(file.set, path, "set"), path.parent / file.recipe)
    for override in overrides:
        apply_override(tables, override)
    axes = flat(file.axes, path, "axes")
    for name, values in axes.items():
        _refuse_no_axis(path, name)
        if not isinstance(values, list) or not values:
            raise RecipeError(
                f"{path}: [axes] {short(name)} should be a list of values, found {found_as(values)}"
            )
    builder = _Builder(path, file, tables, axes)
    points = tuple(builder.points())
    _refuse_other_problems(path, points)
    return Sweep(
        path,
        file,
        builder.base,
        axes,
        _full(path, flat(file.full, path, "full"), points),
        _shared(points, builder.base),
        points,
    )


def _read(path: Path) -> SweepFile:
    content = read_toml(path, "sweep")
    for key in content:
        if key not in SweepFile.model_fields:
            raise RecipeError(
                f"{path}: a sweep has no {found_as(key)}{near(key, SweepFile.model_fields)}"
            )
    try:
        file = SweepFile.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{path}: {describe(error)}") from None
    if not file.recipe:
        raise RecipeError(
            f"{path}: recipe is empty: name the base recipe, by its path from this file"
        )
    for field in ("recipe", "folder", "runs"):
        path_of(getattr(file, field), f"{path}: {field}")
    return file


def flat(tables: dict[str, Any], path: Path, where: str) -> Settings:
    """{"truncation": {"fraction": 0.5}} → {"truncation.fraction": 0.5}."""
    for table, fields in tables.items():
        if not isinstance(fields, dict):
            example = "should be table.field, for example truncation.fraction"
            raise RecipeError(
                f"{path}: [{where}] {short(table)} {example}, found {found_as(fields)}"
            )
    return {
        f"{table}.{name}": value
        for table, fields in tables.items()
        for name, value in fields.items()
    }


def _assign(tables: dict[str, Any], settings: Settings, path: Path) -> None:
    for name, value in settings.items():
        table, _, key = name.partition(".")
        if not isinstance(tables.setdefault(table, {}), dict):
            raise RecipeError(
                f"{path}: [{short(table)}] must be a table, found {found_as(tables[table])}"
            )
        tables[table][key] = value


def _refuse_no_axis(path: Path, name: str) -> None:
    if name in NOT_AN_AXIS:
        raise RecipeError(
            f"{path}: {name} does not make runs that can be compared: {NOT_AN_AXIS[name]}"
        )


class _Builder:
    """Turns settings into points over one base."""

    def __init__(self, path: Path, file: SweepFile, tables: dict[str, Any], axes: dict[str, list]):
        self.path, self.file, self.tables, self.axes = path, file, tables, axes
        self.base = build_recipe(tables, path.parent / file.recipe)
        self.runs = file.runs or str(_results_folder(file, path) / "runs")

    def points(self) -> Iterator[Point]:
        """Seed by seed, so that a sweep that is stopped has whole comparisons: the grid,
        token-matched arms, other arms. One of two conditions that are the same run under the same
        label is left out.
        """
        wanted = math.prod(map(len, self.axes.values())) * max(1, len(self.file.seeds))
        if wanted > MOST_RUNS:
            raise RecipeError(
                f"{self.path}: its axes and seeds make {wanted:,} runs, a sweep can have "
                f"{MOST_RUNS:,}: name fewer values"
            )
        grid = (
            [
                ("", dict(zip(self.axes, values, strict=True)))
                for values in itertools.product(*self.axes.values())
            ]
            if self.axes
            else []
        )
        found = [*grid, *self._matched(), *self._arms()]
        if not found:
            raise RecipeError(
                f"{self.path}: nothing to run: give [axes] with lists of values, or [[arms]] with "
                "a name and settings"
            )
        made = set()
        for seed in self.file.seeds or (self.base.run.seed,):
            for label, settings in found:
                point = self._point(label, settings, seed)
                if (label, point.folder.path, point.recipe.digest()) not in made:
                    made.add((label, point.folder.path, point.recipe.digest()))
                    yield point

    def _matched(self) -> Iterator[tuple[str, Settings]]:
        """As many tokens as the whole sequences have, of 1/fraction times as many examples (and
        steps, where those are given).
        """
        examples, steps, cut = (
            self.base.data.train_examples,
            self.base.optim.steps,
            self.base.truncation,
        )
        if self.file.token_matched and not examples:
            raise RecipeError(
                f"{self.path}: token_matched asks for more examples, but data.train_examples is "
                "0, which is all: set it"
            )
        if self.file.token_matched and (cut.keep, cut.span, cut.context, cut.max_tokens) != (
            "prefix",
            "sequence",
            "drop",
            0,
        ):
            raise RecipeError(
                f"{self.path}: token_matched needs a cut whose tokens grow with its fraction: "
                'keep = "prefix", '
                'span = "sequence", context = "drop" and max_tokens = 0 in the base'
            )
        for fraction in self.file.token_matched:
            if fraction == 1:
                raise RecipeError(
                    f"{self.path}: token_matched = 1.0 is the whole sequence itself: name "
                    "fractions below it"
                )
            settings = {
                "truncation.fraction": fraction,
                "data.train_examples": round(examples / fraction),
            }
            yield MATCHED, settings | ({"optim.steps": round(steps / fraction)} if steps else {})

    def _arms(self) -> Iterator[tuple[str, Settings]]:
        for number, arm in enumerate(self.file.arms, 1):
            name, settings = (
                arm.get("name"),
                {key: value for key, value in arm.items() if key != "name"},
            )
            if not isinstance(name, str) or not name:
                raise RecipeError(
                    f"{self.path}: [[arms]] number {number} has no name: give it one for the table"
                )
            found = flat(settings, self.path, f"arms {name!r}")
            for field in found:
                _refuse_no_axis(self.path, field)
            yield name, found

    def _point(self, label: str, settings: Settings, seed: int) -> Point:
        tables = copy.deepcopy(self.tables)
        alone = {
            "run.seed": seed,
            "eval.score_teacher": False,
            "eval.score_base": False,
            "eval.compare": [],
        }
        _assign(tables, settings | alone, self.path)
        try:
            recipe = self._cached_where_it_serves(tables, insist="teacher.cache" in settings)
        except RecipeError as error:
            what = label or ", ".join(
                f"{name} = {json.dumps(value, default=str)}" for name, value in settings.items()
            )
            raise RecipeError(f"{error} (at {short(what)})") from None
        named = with_values(
            recipe, run={"name": run_name(recipe, self.base, settings), "folder": self.runs}
        )
        return Point(label, {name: value_of(recipe, name) for name in self.axes} | settings, named)

    def _cached_where_it_serves(self, tables: dict[str, Any], insist: bool) -> Recipe:
        """The recipe with the teacher's cache that the tables ask for, or without one where none
        can serve it.
        """
        teacher = tables.get("teacher", {})
        asked = {name: teacher.pop(name) for name in CACHE_FIELDS if name in teacher}
        kind = asked.get("cache", "off")
        if not insist:
            plain = build_recipe(tables, self.path)
            if kind == "off" or not cache_serves(plain, kind):
                return plain
        teacher.update(asked)
        return build_recipe(tables, self.path)


def value_of(recipe: Recipe, name: str) -> Any:
    """The value of `table.field`, as TOML has it; None for a field that does not exist."""
    table, _, field = name.partition(".")
    return recipe.model_dump(mode="json").get(table, {}).get(field)


def run_name(recipe: Recipe, base: Recipe, settings: Settings) -> str:
    """What a run's folder is called: the fields in which it differs from the base, and its seed;
    the same in every sweep of this base.

    How the teacher's answers are kept is a part of it only where the settings ask for it.
    """
    ours, theirs = (one.model_dump(mode="json", exclude=OUTSIDE_DIGEST) for one in (recipe, base))
    tables_of = Counter(name for fields in ours.values() for name in fields)
    changed = [
        f"{name if tables_of[name] == 1 else f'{table}.{name}'}={_slug(value)}"
        for table, fields in ours.items()
        for name, value in fields.items()
        if value != theirs[table][name]
        and (table, name) != ("run", "seed")
        and (name not in CACHE_FIELDS or f"{table}.{name}" in settings)
    ]
    name = "_".join([*changed, f"seed={recipe.run.seed}"])
    whole = name.encode()
    return (
        name
        if len(whole) <= LONGEST_NAME
        else f"{whole[:LONGEST_NAME].decode(errors='ignore')}-{_digest(name)}"
    )


def _slug(value: Any) -> str:
    """A value as a part of a file's name; what is lost is made up for by a digest."""
    text = "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    slug = re.sub(r"[^\w.+-]+", "-", text)
    return slug if slug == text else f"{slug}-{_digest(text)}"


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:6]


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
    recipes = [point.recipe for point in points]
    bases = {
        (one.student.model, one.student.revision, one.eval.model_dump_json()) for one in recipes
    }
    teachers = {
        (
            one.teacher.model,
            one.teacher.revision,
            one.teacher.quantize_bits,
            one.eval.model_dump_json(),
        )
        for one in recipes
    }
    asked = {
        "base": base.eval.score_base and len(bases) == 1,
        "teacher": base.eval.score_teacher and len(teachers) == 1 and bool(base.teacher.model),
    }
    return frozenset(role for role, wanted in asked.items() if wanted)
