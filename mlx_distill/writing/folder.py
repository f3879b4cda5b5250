"""A folder of texts: written once by a model, learned from by any number of runs.

    FOLDER/BY-KEY/   manifest.json   write.lock   texts.jsonl

In: the fields that texts depend on. Out: their file, held by this process. Decided here: KEY
digests the fields, which are also compared one by one, so that texts of another model, other
prompts or other sampling are never taken for these.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_distill.errors import RunError
from mlx_distill.files import locked, told_as, write_json
from mlx_distill.readers import read_json
from mlx_distill.writing.texts import Say, TextFile

FORMAT = 1
TEXTS = "texts.jsonl"


def text_folder(root: Path, fields: dict[str, Any]) -> Path:
    """Where in `root` the texts of these fields lie."""
    key = hashlib.sha256(json.dumps(_all(fields), sort_keys=True).encode()).hexdigest()[:12]
    return root / f"{fields['by']}-{key}"


@contextmanager
def held_texts(root: Path, fields: dict[str, Any], say: Say) -> Iterator[TextFile]:
    """The file of these texts, made where it is not there; a second process waits for the first.

    Raises `RunError` where the folder holds other texts, or cannot be written.
    """
    path = text_folder(root, fields)
    with told_as(RunError, path):
        path.mkdir(parents=True, exist_ok=True)
        waiting = f"waiting for another process that writes {path}"
        with locked(path / "write.lock", lambda: say(waiting)):
            _compare(path / "manifest.json", _all(fields))
            yield TextFile(path / TEXTS, say)


def _all(fields: dict[str, Any]) -> dict[str, Any]:
    return fields | {"format_version": FORMAT}


def _compare(manifest: Path, fields: dict[str, Any]) -> None:
    if not manifest.exists():
        write_json(manifest, fields)
        return
    kept = read_json(manifest, error=RunError)
    for name, value in fields.items():
        found = kept.get(name) if isinstance(kept, dict) else None
        if found != value:
            raise RunError(
                f"{manifest}: {name} {value!r} asked, {found!r} found: the folder holds other "
                "texts; move it away, or name another rollouts.folder"
            )
