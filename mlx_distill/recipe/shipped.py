"""The recipes and sweeps that come with the program, by their names.

In: what a person typed. Out: the file that is meant. Decided here: a file that is there is taken;
a bare name ("cot50") that no file has is one of `recipes/` in this package, where a clone's
`recipes/` leads, too, and "paper/sky-t1" one of its folder `paper/`.
"""

from pathlib import Path

SHIPPED = Path(__file__).parents[1] / "recipes"
PAPER = "paper"
NOT_RUN = "reference"  # shows every field and names no models


def shipped_names(sweeps: bool = False) -> list[str]:
    """The names that `run` takes without a file, or `sweep`."""
    folder = SHIPPED / "sweeps" if sweeps else SHIPPED
    return sorted(file.stem for file in folder.glob("*.toml") if file.stem != NOT_RUN)


def named(path: Path, sweeps: bool = False) -> Path:
    """The file that `path` means: itself, or the shipped one of that name where there is no such
    file."""
    if path.is_file():
        return path
    if str(path) in shipped_names(sweeps):
        return (SHIPPED / "sweeps" if sweeps else SHIPPED) / f"{path}.toml"
    papers = SHIPPED / PAPER / f"{path.name}.toml"
    return papers if str(path.parent) == PAPER and papers.is_file() else path


def where_recipes_are(path: Path, sweeps: bool = False) -> str:
    """The remedy where the file `path` is not there."""
    if str(path) in shipped_names(not sweeps):
        kind, command = ("recipe", "run") if sweeps else ("sweep", "sweep")
        return f"{path} is a {kind}: `mlx-distill {command} {path}` runs it"
    command = "sweep" if sweeps else "run"
    names = ", ".join(shipped_names(sweeps))
    names += f", and in {PAPER}/ those of the paper"
    others = "" if sweeps else "; `mlx-distill init` writes one for your data"
    return f"`mlx-distill {command} NAME` knows {names}{others}"
