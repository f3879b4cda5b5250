"""The named datasets as a person sees them."""

from mlx_distill.data.named import shown_datasets
from mlx_distill.view import Screen

HEAD = ["data.source", "on the hub", "format", "rows", "size", "licence"]


def print_datasets(console: Screen) -> None:
    """One line a dataset, never broken, and how a copy on disk is named."""
    rows = [HEAD, *shown_datasets()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        console.print("  ".join(cells).rstrip(), soft_wrap=True, markup=False, highlight=False)
    console.print(
        "A copy on disk: NAME:FILE, for example gsm8k:train.jsonl. What a recipe sets itself "
        "(split, where, a column) stands. Rows, sizes and licences are as the hub's cards say."
    )
