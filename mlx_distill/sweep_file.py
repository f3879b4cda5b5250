"""A sweep file: a base recipe, and the runs that axes, arms and seeds make of it.

In: a TOML file. Out: a `Sweep` with its `Point`s, each a complete recipe. Decided here: which runs a sweep consists of, what they
are called, and which of them can read the teacher's cache. A run's name says how its recipe differs from the base, so that sweeps
over the same base that keep their runs in one folder share those that are equal.
"""

import copy
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from mlx_distill.errors import RecipeError
from mlx_distill.recipe import (
    OUTSIDE_DIGEST,
    Fraction,
    Recipe,
    Table,
    apply_override,
    build_recipe,
    cache_serves,
    describe,
    near,
    read_toml,
)
from mlx_distill.run_dir import RunFolder

Settings = dict[str, Any]  # "table.field" → value
LONGEST_NAME = 120  # of a run folder
MATCHED = "token-matched"
CACHE_FIELDS = ("cache", "cache_folder", "cache_top_k", "cache_samples")


class SweepFile(Table):
    """A sweep as it is written; nested tables hold `table.field = value` as in a recipe."""

    recipe: str = ""  # the base; a path from this file
    question: str = ""  # what the sweep is to answer, for its page
    folder: str = ""  # of the results; "" = runs/NAME
    runs: str = ""  # of the run folders, which several sweeps may share; "" = FOLDER/runs
    seeds: Annotated[tuple[int, ...], Field(strict=False)] = ()  # values of run.seed; () = the base's
    token_matched: Annotated[tuple[Fraction, ...], Field(strict=False)] = ()  # fractions to run with 1/fraction times the examples
    set: Annotated[dict[str, Any], Field(default_factory=dict)]  # changes the base
    axes: Annotated[dict[str, Any], Field(default_factory=dict)]  # a list of values each; every combination is run
    full: Annotated[dict[str, Any], Field(default_factory=dict)]  # the condition that the others are compared with; {} = the dearest
    arms: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] = ()  # single conditions beside the axes, each with a name


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
        return RunFolder(Path(self.recipe.run.folder).expanduser() / self.name)

    @property
    def scored(self) -> set[str]:
        """What the run is to score beside its student."""
        table = self.recipe.eval
        wanted = {"base": table.score_base, "teacher": table.score_teacher and bool(self.recipe.teacher.model)}
        return {role for role, asked in wanted.items() if asked}

    @property
    def done(self) -> bool:
        """Whether its run folder has all that it is to have."""
        scores = self.folder.read_json("eval.json").get("scores", {}).keys()
        wanted = self.scored | {"student"} if self.recipe.eval.task else set()
        return bool(self.folder.read_json("manifest.json").get("finished")) and wanted <= scores


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read and checked, with all of its points."""

    path: Path
    file: SweepFile
    base: Recipe
    axes: dict[str, list]
    full: Settings
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
    """Read a sweep file and make its points; `overrides` change the base recipe as its own `[set]` does, and after it.

    Raises `NotFound` or `RecipeError`, in one line, for whatever a recipe would be refused for, and for points that are the same.
    """
    file = _read(path)
    tables = read_toml(path.parent / file.recipe)
    _assign(tables, flat(file.set, path, "set"))
    for override in overrides:
        apply_override(tables, override)
    axes = flat(file.axes, path, "axes")
    for name, values in axes.items():
        if not isinstance(values, list) or not values:
            raise RecipeError(f"{path}: [axes] {name} should be a list of values, found {values!r}")
    builder = _Builder(path, file, tables)
    points = list(builder.points(axes))
    _refuse_other_problems(path, points)
    points = _scoring_once(points, builder.base)
    return Sweep(path, file, builder.base, axes, flat(file.full, path, "full"), tuple(points))


def _read(path: Path) -> SweepFile:
    content = read_toml(path, "sweep")
    for key in content:
        if key not in SweepFile.model_fields:
            raise RecipeError(f"{path}: a sweep has no {key!r}{near(key, SweepFile.model_fields)}")
    try:
        file = SweepFile.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{path}: {describe(error)}") from None
    if not file.recipe:
        raise RecipeError(f"{path}: recipe is empty: name the base recipe, by its path from this file")
    return file


def flat(tables: dict[str, Any], path: Path, where: str) -> Settings:
    """{"truncation": {"fraction": 0.5}} → {"truncation.fraction": 0.5}."""
    for table, fields in tables.items():
        if not isinstance(fields, dict):
            raise RecipeError(f"{path}: [{where}] {table} should be table.field, for example truncation.fraction, found {fields!r}")
    return {f"{table}.{name}": value for table, fields in tables.items() for name, value in fields.items()}


def _assign(tables: dict[str, Any], settings: Settings) -> None:
    for name, value in settings.items():
        table, _, key = name.partition(".")
        tables.setdefault(table, {})[key] = value


class _Builder:
    """Turns settings into points over one base."""

    def __init__(self, path: Path, file: SweepFile, tables: dict[str, Any]):
        self.path, self.file, self.tables = path, file, tables
        self.base = build_recipe(tables, path.parent / file.recipe)
        self.runs = file.runs or str(_results_folder(file, path) / "runs")

    def points(self, axes: dict[str, list]) -> Iterator[Point]:
        """Seed by seed, so that a sweep that is stopped has whole comparisons: the grid, token-matched arms, other arms."""
        grid = [("", dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())] if axes else []
        found = [*grid, *self._matched(), *self._arms()]
        if not found:
            raise RecipeError(f"{self.path}: nothing to run: give [axes] with lists of values, or [[arms]] with a name and settings")
        made = set()
        for seed in self.file.seeds or (self.base.run.seed,):
            for label, settings in found:
                key = json.dumps([label, settings, seed], default=str)
                if key not in made:
                    made.add(key)
                    yield self._point(label, settings, seed)

    def _matched(self) -> Iterator[tuple[str, Settings]]:
        """As many tokens as the whole sequences have, of 1/fraction times as many examples (and steps, where those are given)."""
        examples, steps = self.base.data.train_examples, self.base.optim.steps
        if self.file.token_matched and not examples:
            raise RecipeError(f"{self.path}: token_matched asks for more examples, but data.train_examples is 0, which is all: set it")
        for fraction in self.file.token_matched:
            settings = {"truncation.fraction": fraction, "data.train_examples": round(examples / fraction)}
            yield MATCHED, settings | ({"optim.steps": round(steps / fraction)} if steps else {})

    def _arms(self) -> Iterator[tuple[str, Settings]]:
        for number, arm in enumerate(self.file.arms, 1):
            name, settings = arm.get("name"), {key: value for key, value in arm.items() if key != "name"}
            if not isinstance(name, str) or not name:
                raise RecipeError(f"{self.path}: [[arms]] number {number} has no name: give it one for the table")
            yield name, flat(settings, self.path, f"arms {name!r}")

    def _point(self, label: str, settings: Settings, seed: int) -> Point:
        tables = copy.deepcopy(self.tables)
        _assign(tables, settings | {"run.seed": seed, "eval.score_teacher": False, "eval.score_base": False, "eval.compare": []})
        try:
            recipe = self._cached_where_it_serves(tables, insist="teacher.cache" in settings)
        except RecipeError as error:
            what = label or ", ".join(f"{name} = {json.dumps(value)}" for name, value in settings.items())
            raise RecipeError(f"{error} (at {what})") from None
        return Point(label, settings, with_values(recipe, run={"name": run_name(recipe, self.base, settings), "folder": self.runs}))

    def _cached_where_it_serves(self, tables: dict[str, Any], insist: bool) -> Recipe:
        """The recipe with the teacher's cache that the tables ask for, or without one where none can serve it."""
        teacher = tables.get("teacher", {})
        asked = {name: teacher.pop(name) for name in CACHE_FIELDS if name in teacher}
        kind = asked.get("cache", "off")
        if not insist:
            plain = build_recipe(tables, self.path)
            if kind == "off" or not cache_serves(plain, kind):
                return plain
        teacher.update(asked)
        return build_recipe(tables, self.path)


def with_values(recipe: Recipe, **tables: dict[str, Any]) -> Recipe:
    """The recipe with some fields of some tables replaced, unchecked."""
    return recipe.model_copy(update={name: getattr(recipe, name).model_copy(update=values) for name, values in tables.items()})


def run_name(recipe: Recipe, base: Recipe, settings: Settings) -> str:
    """What a run's folder is called: the fields in which it differs from the base, and its seed; the same in every sweep of this base.

    How the teacher's answers are kept is a part of it only where the settings ask for it."""
    ours, theirs = (one.model_dump(mode="json", exclude=OUTSIDE_DIGEST) for one in (recipe, base))
    tables_of = Counter(name for fields in ours.values() for name in fields)
    changed = [
        f"{name if tables_of[name] == 1 else f'{table}.{name}'}={_slug(value)}"
        for table, fields in ours.items() for name, value in fields.items()
        if value != theirs[table][name] and (table, name) != ("run", "seed") and (name not in CACHE_FIELDS or f"{table}.{name}" in settings)
    ]
    name = "_".join([*changed, f"seed={recipe.run.seed}"])
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{_digest(name)}"


def _slug(value: Any) -> str:
    """A value as a part of a file's name; what is lost is made up for by a digest."""
    text = "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    slug = re.sub(r"[^\w.+-]+", "-", text)
    return slug if slug == text else f"{slug}-{_digest(text)}"


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:6]


def _refuse_other_problems(path: Path, points: list[Point]) -> None:
    tables = [point.recipe.eval for point in points]
    if not all(table.task for table in tables):
        raise RecipeError(f"{path}: a sweep compares scores, but [eval] task is empty: name a task in the base recipe or in [set]")
    if len({(table.task, table.examples, table.seed) for table in tables}) > 1:
        raise RecipeError(f"{path}: a sweep compares scores on the same problems, but its runs differ in [eval] task, examples or seed")


def _scoring_once(points: list[Point], base: Recipe) -> list[Point]:
    """The first point scores teacher and base as the base recipe asks, for all that have the same ones; the others never do."""
    recipes = [point.recipe for point in points]
    bases = {(one.student.model, one.student.revision, one.eval.model_dump_json()) for one in recipes}
    teachers = {(one.teacher.model, one.teacher.revision, one.teacher.quantize_bits, one.eval.model_dump_json()) for one in recipes}
    flags = {"score_base": base.eval.score_base and len(bases) == 1, "score_teacher": base.eval.score_teacher and len(teachers) == 1}
    return [replace(points[0], recipe=with_values(recipes[0], eval=flags)), *points[1:]]
