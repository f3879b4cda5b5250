"""The runs of a sweep: each point is a complete recipe with a name.

In: a sweep file and the tables of its base recipe. Out: `Point`s. Decided here: which runs axes,
seeds, token-matched fractions and arms make, what a run is called, and which of them can read the
teacher's cache. A run's name says how its recipe differs from the base, so that sweeps over the
same base that keep their runs in one folder share those that are equal.
"""

import copy
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from mlx_distill.data.detection import with_format
from mlx_distill.errors import RecipeError
from mlx_distill.recipe.complaints import short
from mlx_distill.recipe.contradictions import cache_serves
from mlx_distill.recipe.load import build_recipe
from mlx_distill.recipe.recipe import OUTSIDE_DIGEST, Recipe, with_values
from mlx_distill.recipe.tables import TeacherTable, TruncationTable
from mlx_distill.reporting.condition_words import in_words
from mlx_distill.reporting.study import MATCHED
from mlx_distill.runs.manifest import Manifest
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.scoring.task_scores import TaskScores
from mlx_distill.sweeps.file import (
    Settings,
    SweepFile,
    assign,
    flat,
    refuse_no_axis,
    results_folder,
)

LONGEST_NAME = 120  # bytes of a run folder's name, before its digest
MOST_RUNS = 10_000
# base and teacher are the same for all runs, and scored once
SCORED_ALONE = {"eval.score_teacher": False, "eval.score_base": False, "eval.compare": []}
CACHE_FIELDS = tuple(name for name in TeacherTable.model_fields if name.startswith("cache"))


@dataclass(frozen=True)
class Point:
    """One run of a sweep: what sets it apart from the base, its seed aside, and its recipe."""

    label: str
    settings: Settings
    recipe: Recipe

    @property
    def name(self) -> str:
        return self.recipe.run.name

    @property
    def words(self) -> str:
        """What it is called where a person reads it: its condition and its seed."""
        settings = in_words(self.settings)
        named = f"{self.label}, {settings}" if self.label == MATCHED else self.label or settings
        return f"{named or 'as in the recipe'}, seed {self.recipe.run.seed}"

    @property
    def folder(self) -> RunFolder:
        return RunFolder.of(self.recipe)

    @property
    def done(self) -> bool:
        """Whether its student is trained, scored and reported. A damaged run is not: started again,
        it says or mends that.
        """
        folder = self.folder
        if not folder.readable(Manifest).finished:
            return False
        if not (folder.path / "report.html").is_file():
            return False
        return "student" in folder.readable(TaskScores).whole


@dataclass(frozen=True)
class Builder:
    """Makes the points of a sweep file: settings over the tables of one base recipe."""

    path: Path
    file: SweepFile
    tables: dict[str, Any]
    axes: dict[str, list]
    base: Recipe

    def points(self) -> Iterator[Point]:
        """Seed by seed, so that a sweep that is stopped has whole comparisons: the grid,
        token-matched arms, other arms. One of two conditions that are the same run under the same
        label is left out.
        """
        seeds = self.file.seeds or (self.base.run.seed,)
        self._refuse_too_many(len(seeds))
        conditions = [*self._grid(), *self._matched(), *self._arms()]
        if not conditions:
            raise RecipeError(
                f"{self.path}: nothing to run: give [axes] with lists of values, or [[arms]] with "
                "a name and settings"
            )
        made = set()
        for seed, (label, settings) in itertools.product(seeds, conditions):
            point = self._point(label, settings, seed)
            known_by = label, point.folder.path, point.recipe.digest()
            if known_by not in made:
                made.add(known_by)
                yield point

    def _refuse_too_many(self, seeds: int) -> None:
        wanted = math.prod(map(len, self.axes.values())) * seeds
        if wanted > MOST_RUNS:
            raise RecipeError(
                f"{self.path}: its axes and seeds make {wanted:,} runs, a sweep can have "
                f"{MOST_RUNS:,}: name fewer values"
            )

    def _grid(self) -> Iterator[tuple[str, Settings]]:
        """Every combination of the axes' values."""
        if self.axes:
            for values in itertools.product(*self.axes.values()):
                yield "", dict(zip(self.axes, values, strict=True))

    def _matched(self) -> Iterator[tuple[str, Settings]]:
        """As many tokens as the whole sequences have, of 1/fraction times as many examples (and
        steps, where those are given).
        """
        if not self.file.token_matched:
            return
        examples, steps = self.base.data.train_examples, self.base.optim.steps
        cut = self.base.truncation
        if not examples:
            raise RecipeError(
                f"{self.path}: token_matched asks for more examples, but data.train_examples is "
                "0, which is all: set it"
            )
        if cut != TruncationTable(fraction=cut.fraction, token_share=cut.token_share):
            raise RecipeError(
                f"{self.path}: token_matched needs a cut whose tokens grow with its fraction: "
                'keep = "prefix", span = "sequence", context = "drop", max_tokens = 0, spread = 0.0, '
                'whole_share = 0.0 and ending = "none" in the base'
            )
        if 1 in self.file.token_matched:
            raise RecipeError(
                f"{self.path}: token_matched = 1.0 is the whole sequence itself: name fractions "
                "below it"
            )
        for fraction in self.file.token_matched:
            settings = {
                "truncation.fraction": fraction,
                "data.train_examples": round(examples / fraction),
            }
            if steps:
                settings["optim.steps"] = round(steps / fraction)
            yield MATCHED, settings

    def _arms(self) -> Iterator[tuple[str, Settings]]:
        for number, arm in enumerate(self.file.arms, 1):
            name = arm.get("name")
            if not isinstance(name, str) or not name:
                raise RecipeError(
                    f"{self.path}: [[arms]] number {number} has no name: give it one for the table"
                )
            tables = {key: value for key, value in arm.items() if key != "name"}
            settings = flat(tables, self.path, f"arms {name!r}")
            for field in settings:
                refuse_no_axis(self.path, field)
            yield name, settings

    def _point(self, label: str, settings: Settings, seed: int) -> Point:
        tables = copy.deepcopy(self.tables)
        assign(tables, settings | SCORED_ALONE | {"run.seed": seed}, self.path)
        try:
            insist = "teacher.cache" in settings
            recipe = with_format(self._cached_where_it_serves(tables, insist))
        except RecipeError as error:
            what = label or ", ".join(
                f"{name} = {json.dumps(value, default=str)}" for name, value in settings.items()
            )
            raise RecipeError(f"{error} (at {short(what)})") from None
        runs = self.file.runs or str(results_folder(self.file, self.path) / "runs")
        named = with_values(
            recipe, run={"name": run_name(recipe, self.base, settings), "folder": runs}
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
    parts = []
    for table, fields in ours.items():
        for name, value in fields.items():
            if value == theirs[table][name] or (table, name) == ("run", "seed"):
                continue
            if name in CACHE_FIELDS and f"{table}.{name}" not in settings:
                continue
            called = name if tables_of[name] == 1 else f"{table}.{name}"
            parts.append(f"{called}={_slug(value)}")
    name = "_".join([*parts, f"seed={recipe.run.seed}"])
    whole = name.encode()
    if len(whole) <= LONGEST_NAME:
        return name
    return f"{whole[:LONGEST_NAME].decode(errors='ignore')}-{_digest(name)}"


def _slug(value: Any) -> str:
    """A value as a part of a file's name; what is lost is made up for by a digest."""
    text = "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    slug = re.sub(r"[^\w.+-]+", "-", text)
    return slug if slug == text else f"{slug}-{_digest(text)}"


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:6]
