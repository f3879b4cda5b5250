"""The rows of a source → its usable examples, with an account of all others.

In: the `[data]` table of a recipe. Out: `Example`s. Decided here: each example comes once, rows with
nothing to learn from are counted by their reason, and what a row carries besides by its name.
"""

from collections import Counter
from collections.abc import Iterator

from mlx_distill.data.account import listed, remedy, unused_lines
from mlx_distill.data.chosen import fits
from mlx_distill.data.columns import COLUMNS, OPTIONAL, OPTIONAL_ROLES, Place, column_of
from mlx_distill.data.content import count_unused
from mlx_distill.data.detection import detected
from mlx_distill.data.examples import Example, Skip
from mlx_distill.data.formats import FORMATS
from mlx_distill.data.named import resolved
from mlx_distill.data.sources import embedded_examples, rows_of
from mlx_distill.errors import DataError
from mlx_distill.recipe.tables import DataTable


def read_examples(
    data: DataTable,
    seed: int = 0,
    skipped: Counter[str] | None = None,
    unused: Counter[str] | None = None,
) -> Iterator[Example]:
    """Every usable example of `data.source`, in its order, each id once; reasons for the others are
    added to `skipped`.

    What has content in a row and is not used is added to `unused`, by kind and name ("column
    source", "key name"), for every row that `data.where` chooses. `seed` matters to `embedded:NAME`
    alone, which writes `validation_examples + train_examples` problems of its own. Raises
    `NotFound` for a source that is not there, `DataError` for a row that cannot be read and when
    nothing is left.
    """
    data = detected(resolved(data))
    skipped = Counter() if skipped is None else skipped
    unused = Counter() if unused is None else unused
    found: set[str] = set()
    before = skipped.copy()
    items = (
        embedded_examples(data, seed)
        if data.source.startswith("embedded:")
        else _read_rows(data, seed, unused)
    )
    for item in items:
        if isinstance(item, Example) and item.id not in found:
            found.add(item.id)
            yield item
        else:
            skipped["same as an earlier row" if isinstance(item, Example) else item] += 1
    if not found:
        raise DataError(_nothing_usable(data, skipped - before, unused))


def _nothing_usable(data: DataTable, reasons: Counter[str], unused: Counter[str]) -> str:
    found = f"{data.source}: no usable example with format = {data.format!r}"
    if not reasons:
        return f"{found}: it has no rows; name a source that has some"
    columns = [line for line in unused_lines(unused) if line.startswith("column ")]
    also = f"; not used: {', '.join(columns)}" if columns else ""
    return f"{found}: {listed(reasons)}; {remedy(reasons, 'correct these rows')}{also}"


def _read_rows(data: DataTable, seed: int, unused: Counter[str]) -> Iterator[Example | str]:
    """An `Example`, or the reason why there is none, for each row."""
    read = FORMATS[data.format]
    known = {
        *(column_of(data, role) for role in COLUMNS[data.format]),
        *(column_of(data, role) for role in OPTIONAL_ROLES.get(data.format, ())),
        *OPTIONAL[data.format],
        *data.where,
    }
    left = data.stream_rows or -1
    for where, row in rows_of(data, seed):
        place = Place(f"{data.source}, {where}", data, unused)
        if not all(
            fits(place.cell(row, column, "data.where"), asked)
            for column, asked in data.where.items()
        ):
            yield "not chosen by data.where"
            continue
        if left == 0:
            return
        left -= 1
        count_unused(row, known, "column", unused)
        try:
            yield read(row, place)
        except Skip as skip:
            yield str(skip)
