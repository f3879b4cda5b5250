"""The folder of an export: it appears whole, and only an export of ours is ever replaced.

In: a path. Out: a folder to fill, with `export.json` beside what was filled in: the SHA-256 of each
file. Decided here: what may be replaced. A folder that holds anything else, or a file of an export
that was changed since, is left alone and named.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_distill import __version__
from mlx_distill.errors import DistillError, RunError
from mlx_distill.files import made_whole, sha256_of, told_as, write_json
from mlx_distill.readers import read_json
from mlx_distill.runs import own_files
from mlx_distill.runs.digests import all_files, digests

RECORD = "export.json"


@contextmanager
def made_export(target: Path, about: dict[str, Any]) -> Iterator[Path]:
    """A folder to fill, which becomes `target` at the end, in the place of an earlier export of
    ours. `about` may be added to until then, and is kept in `export.json`. Raises `RunError`.
    """
    refuse_others(target)
    with told_as(RunError, target, otherwise="choose another folder with --out"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with made_whole(target) as half:
            yield half
            files = digests(half, all_files(half))
            write_json(half / RECORD, {"mlx_distill": __version__, **about, "files": files})
            own_files.remove(target, _own(target))


def refuse_others(target: Path) -> None:
    """Raises `RunError` where something lies at `target` that is no untouched export of ours."""
    other = "choose another folder with --out, or move that away"
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        kind = "a link" if target.is_symlink() else "a file"
        raise RunError(f"{target} is {kind}: {other}")
    if not target.exists():
        return
    with told_as(RunError, target):
        found = own_files.foreign(target, _own(target))
    if found:
        names = own_files.few(found, target)
        raise RunError(f"{target} holds {names}, which no export made as it is now: {other}")


def _own(target: Path) -> own_files.Own:
    """Which files in it are an export's, as it wrote them."""
    try:
        document = read_json(target / RECORD, error=RunError)
        kept = dict(document["files"])
    except (DistillError, KeyError, TypeError, ValueError):
        return lambda name: False
    return lambda name: name == RECORD or (name in kept and sha256_of(target / name) == kept[name])
