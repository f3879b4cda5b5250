"""The whole recipe: its tables together, checked, with its digest and its text."""

import hashlib
import json
from typing import Any

import tomli_w
from pydantic import model_validator

from mlx_distill.recipe.contradictions import contradictions
from mlx_distill.recipe.read_when import unread
from mlx_distill.recipe.tables import (
    BatchTable,
    DataTable,
    EvalTable,
    ObjectiveTable,
    OptimTable,
    RolloutsTable,
    RunTable,
    StudentTable,
    Table,
    TeacherTable,
    TruncationTable,
)
from mlx_distill.recipe.values import Mark


class Recipe(Table):
    """A recipe that can be run as far as its own words tell; pydantic raises its first fault."""

    teacher: TeacherTable = TeacherTable()
    student: StudentTable = StudentTable()
    data: DataTable = DataTable()
    rollouts: RolloutsTable = RolloutsTable()
    truncation: TruncationTable = TruncationTable()
    objective: ObjectiveTable = ObjectiveTable()
    batch: BatchTable = BatchTable()
    optim: OptimTable = OptimTable()
    eval: EvalTable = EvalTable()
    run: RunTable = RunTable()

    @model_validator(mode="after")
    def _refuse_what_makes_no_sense(self) -> "Recipe":
        for line in (*contradictions(self), *unread(self)):
            raise ValueError(line)
        return self

    def digest(self) -> str:
        """16 hex digits over every field that shapes the result: all but where it is kept and what
        it is shown beside.
        """
        content = self.model_dump(mode="json", exclude=OUTSIDE_DIGEST)
        for table, fields in NEWER.items():
            for field in fields:
                if (
                    getattr(getattr(self, table), field)
                    == TABLES[table].model_fields[field].default
                ):
                    del content[table][field]
            if not content[table]:
                del content[table]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def toml(self) -> str:
        """The resolved recipe as TOML: every field, defaults included; loading it gives an equal
        recipe.
        """
        return tomli_w.dumps(self.model_dump(mode="json"))

    def differences(self, other: "Recipe") -> list[str]:
        """`table.field: ours → theirs`, for every field in the digest that differs."""
        ours, theirs = (
            recipe.model_dump(mode="json", exclude=OUTSIDE_DIGEST) for recipe in (self, other)
        )
        return [
            f"{table}.{field}: {value!r} → {theirs[table][field]!r}"
            for table, fields in ours.items()
            for field, value in fields.items()
            if value != theirs[table][field]
        ]


TABLES: dict[str, type[Table]] = {
    name: info.annotation
    for name, info in Recipe.model_fields.items()
    if isinstance(info.annotation, type)
}


def _marked(mark: Mark) -> dict[str, set[str]]:
    """Table → its fields that bear the mark."""
    found = {
        table: {field for field, info in part.model_fields.items() if mark in info.metadata}
        for table, part in TABLES.items()
    }
    return {table: fields for table, fields in found.items() if fields}


OUTSIDE_DIGEST = _marked(Mark.OUTSIDE)
NEWER = _marked(Mark.NEWER)


def with_values(recipe: Recipe, **tables: dict[str, Any]) -> Recipe:
    """The recipe with some fields of some tables replaced, unchecked."""
    return recipe.model_copy(
        update={
            name: getattr(recipe, name).model_copy(update=values) for name, values in tables.items()
        }
    )
