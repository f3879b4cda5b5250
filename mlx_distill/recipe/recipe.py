"""The whole recipe: its tables together, checked, with its digest and its text."""

import hashlib
import json
from typing import Any

import tomli_w
from pydantic import model_validator

from mlx_distill.recipe.contradictions import contradictions
from mlx_distill.recipe.defaults import following
from mlx_distill.recipe.read_when import is_read, unread
from mlx_distill.recipe.tables import (
    DataTable,
    PruneTable,
    RolloutsTable,
    StudentTable,
    Table,
    TeacherTable,
    TruncationTable,
)
from mlx_distill.recipe.training_tables import (
    BatchTable,
    EvalTable,
    ObjectiveTable,
    OptimTable,
    RunTable,
    SelectionTable,
)
from mlx_distill.recipe.values import CameLater, FormerDefault, OutsideDigest


class Recipe(Table):
    """A recipe that can be run as far as its own words tell; pydantic raises its first fault."""

    teacher: TeacherTable = TeacherTable()
    student: StudentTable = StudentTable()
    prune: PruneTable = PruneTable()
    data: DataTable = DataTable()
    rollouts: RolloutsTable = RolloutsTable()
    truncation: TruncationTable = TruncationTable()
    selection: SelectionTable = SelectionTable()
    objective: ObjectiveTable = ObjectiveTable()
    batch: BatchTable = BatchTable()
    optim: OptimTable = OptimTable()
    eval: EvalTable = EvalTable()
    run: RunTable = RunTable()

    @model_validator(mode="after")
    def _check_and_fill(self) -> "Recipe":
        for line in (*contradictions(self), *unread(self)):
            raise ValueError(line)
        for table, values in following(self).items():  # before anyone sees the frozen recipe
            self.__dict__[table] = getattr(self, table).model_copy(update=values)
        return self

    @property
    def asks_cache_for_the_text(self) -> bool:
        """Whether a teacher cache that knows some ids a token is asked about the text's own."""
        return self.objective.divergence == "dkd" and self.teacher.cache == "top_k"

    def digest(self) -> str:
        """16 hex digits over every field that shapes the result: all but where it is kept and what
        it is shown beside.
        """
        content = self._shaping()
        for (table, field), mark in CAME_LATER.items():
            if content[table][field] == mark.value:
                del content[table][field]
        content = {table: fields for table, fields in content.items() if fields}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def _shaping(self) -> dict[str, dict[str, Any]]:
        """The fields that shape the result, those that nothing reads here as earlier versions had
        them.
        """
        content = self.model_dump(mode="json", exclude=OUTSIDE_DIGEST)
        for (table, field), mark in (FORMER_DEFAULTS | CAME_LATER).items():
            if not is_read(self, f"{table}.{field}"):
                content[table][field] = mark.value
        return content

    def toml(self) -> str:
        """The resolved recipe as TOML: every field, defaults included; loading it gives an equal
        recipe.
        """
        return tomli_w.dumps(self.model_dump(mode="json"))

    def differences(self, other: "Recipe") -> list[str]:
        """`table.field: ours → theirs`, for every field in the digest that differs."""
        ours, theirs = self._shaping(), other._shaping()
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


def _marked(kind: type) -> dict[tuple[str, str], Any]:
    """(table, field) → its mark of this kind."""
    return {
        (table, field): mark
        for table, part in TABLES.items()
        for field, info in part.model_fields.items()
        for mark in info.metadata
        if isinstance(mark, kind)
    }


CAME_LATER, FORMER_DEFAULTS = _marked(CameLater), _marked(FormerDefault)
OUTSIDE_DIGEST: dict[str, set[str]] = {}
for _table, _field in _marked(OutsideDigest):
    OUTSIDE_DIGEST.setdefault(_table, set()).add(_field)


def with_values(recipe: Recipe, **tables: dict[str, Any]) -> Recipe:
    """The recipe with some fields of some tables replaced, unchecked."""
    return recipe.model_copy(
        update={
            name: getattr(recipe, name).model_copy(update=values) for name, values in tables.items()
        }
    )
