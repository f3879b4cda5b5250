"""Which room may import which: ground first, and a room imports only what stands above it here.

`backends` reads neither `cost` nor `runs` nor anything below them by the same order.
"""

import ast
from pathlib import Path

import pytest

import mlx_distill

PACKAGE = Path(mlx_distill.__file__).parent
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ORDER = [
    "errors",
    "words",
    "readers",
    "files",
    "caches",
    "signals",
    "processes",
    "awake",
    "slots",
    "blas",
    "machine",
    "view",
    "recipe",
    "models",
    "embedded",
    "data",
    "verify",
    "divergences",
    "objective",
    "backends",
    "cost",
    "teaching",
    "runs",
    "pruning",
    "writing",
    "training",
    "scoring",
    "reporting",
    "exporting",
    "terminal",
    "pipeline",
    "stages",
    "sweeps",
    "commands",
    "cli",
    "__main__",
]


def room(module: str) -> str:
    """The room of a dotted name below the package."""
    return module.split(".")[0]


def imports(path: Path, package: str = "mlx_distill") -> set[str]:
    """Dotted names below the package that a file imports, wherever in it; for types alone does not
    count.
    """
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            base = node.module.split(".")[1:]
            found |= {".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {".".join(name[1:]) for name in names if name[0] == package and name[1:]}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_above_it(path: Path):
    here = room(path.relative_to(PACKAGE).with_suffix("").parts[0])
    if here == "__init__":
        return
    wrong = {
        name
        for name in imports(path)
        if room(name) in ORDER and ORDER.index(room(name)) > ORDER.index(here)
    }
    assert not wrong, f"{here} stands above {sorted(wrong)}"
    unknown = {name for name in imports(path) if room(name) not in ORDER} - {"__version__"}
    assert not unknown, f"no place in ORDER for {sorted(unknown)}"


def graph(folder: Path) -> dict[str, set[str]]:
    """Each file's dotted name below the folder's package, and the files of it that it imports."""
    files = {
        str(path.relative_to(folder).with_suffix("")).replace("/", "."): path
        for path in folder.rglob("*.py")
    }
    found = {}
    for name, path in files.items():
        asked = imports(path, folder.name)
        parents = {one.rpartition(".")[0] for one in asked}
        found[name] = {other for other in files if other in asked | parents} - {name}
    return found


@pytest.mark.parametrize("folder", [PACKAGE, BENCHMARKS], ids=lambda folder: folder.name)
def test_no_circle_between_files(folder: Path):
    """Two files that import each other cannot be read one after the other."""
    arrows = graph(folder)
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " → ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in sorted(arrows[name]):
                walk(other, (*way, name))
            done.add(name)

    for name in sorted(arrows):
        walk(name, ())


def test_benchmarks_stand_below_the_package():
    """The package reads no benchmark, and a benchmark names its own package in full."""
    upward = {path.name for path in FILES if imports(path, "benchmarks")}
    assert not upward
    own = {path.stem for path in BENCHMARKS.glob("*.py")}
    bare = set()
    for path in BENCHMARKS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                bare |= {(path.name, one.name) for one in node.names if one.name in own}
            elif isinstance(node, ast.ImportFrom) and node.module in own:
                bare.add((path.name, node.module))
    assert not bare
