"""Tables of benchmarks/README.md, rewritten in place from kept rows: each lies between `<!-- NAME
-->` markers.
"""

import csv
from pathlib import Path

README = Path(__file__).parent / "README.md"
RESULTS = Path(__file__).parent / "results"


def append_rows(name: str, rows: list[dict[str, object]]) -> None:
    """Add rows to results/NAME.csv; the columns of a kept file are never changed."""
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        elif read_header(path) != list(rows[0]):
            raise ValueError(
                f"{path.name}: columns are {read_header(path)}, the new rows have {list(rows[0])}"
            )
        writer.writerows(rows)


def read_header(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return next(csv.reader(file))


def read_rows(name: str) -> list[dict[str, str]]:
    """Every row ever kept, oldest first."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def rewrite_section(name: str, text: str, path: Path = README) -> None:
    """Put `text` between the markers of `name` in a Markdown file; one without them gets them at
    its end.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    content = path.read_text() if path.exists() else "# Benchmarks\n"
    if start not in content:
        content += f"\n{start}\n{end}\n"
    before, rest = content.split(start, 1)
    _, after = rest.split(end, 1)
    path.write_text(f"{before}{start}\n{text.strip()}\n{end}{after}")
