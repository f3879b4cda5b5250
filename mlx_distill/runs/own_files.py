"""Which files of a run folder a run made, by name, and how they alone are removed.

In: folders. Out: what in them is foreign, and folders without what is the run's own. Decided here:
the names. Whatever has another name is somebody else's: it is not removed and not overwritten, and
a folder that holds it stays. Links are never followed: a link with one of our names is removed
itself.
"""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mlx_distill.files import COMPANION, LEFT_BY_SYSTEMS

SCORES = "eval.json"
CARD = "README.md"  # of a student
REPORTS = ("report.md", "report.html")
FILES = (
    "manifest.json",
    "recipe.toml",
    "metrics.jsonl",
    "validation.jsonl",
    "sample.json",
    SCORES,
    "generations.jsonl",
    "rollouts.jsonl",
    "tracked.json",
    *REPORTS,
)
LOCK = "run.lock"
STARTING_OVER = ".starting-over"  # stands while the files of an earlier run are being removed
CHECKPOINT = ("state.json", "weights.safetensors", "optimizer.safetensors", "SHA256SUMS")
STUDENT = re.compile(  # what a run writes there, where its manifest does not say
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|chat_template|preprocessor_config|processor_config|model\.safetensors\.index)\.json"
    r"|(merges|vocab)\.txt|chat_template\.jinja|(tokenizer|spiece)\.model|[\w.-]+\.tiktoken"
    r"|model(-\d{5}-of-\d{5})?\.safetensors"
    r"|adapters(-peft)?/(adapters|adapter_model|adapter_config)\.(safetensors|json)"
)

Own = Callable[[str], bool]  # whether a path, relative to a folder, is the run's own


def is_own_file(name: str) -> bool:
    """Whether a file of this name in a run folder is the run's."""
    plain = name.removeprefix(".").removesuffix(".tmp")
    return name in FILES or (name == f".{plain}.tmp" and plain in FILES)


def is_checkpoint_file(name: str) -> bool:
    return name in CHECKPOINT


def is_student_file(name: str) -> bool:
    return STUDENT.fullmatch(name) is not None


def foreign(folder: Path, own: Own) -> list[Path]:
    """The files and links in a folder, at any depth, that are not the run's own, in order."""
    return [path for path in _files(folder) if not _is_own(folder, path, own)]


def remove(folder: Path, own: Own) -> None:
    """Remove the run's own files from a folder, and then the folders that are empty, itself
    included.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in _files(folder):
        if _is_own(folder, path, own):
            path.unlink(missing_ok=True)
    for parent in _folders(folder):
        with suppress(OSError):  # it holds something that is not ours
            parent.rmdir()


def remove_named(folder: Path, own: Own) -> None:
    """Remove the run's own files that lie in a folder itself, those that make a run first."""
    entries = {
        path.name: path for path in sorted(folder.iterdir()) if path.is_symlink() or path.is_file()
    }
    for name in sorted(filter(own, entries), key=lambda name: (*FILES, name).index(name)):
        entries[name].unlink(missing_ok=True)


def _is_own(folder: Path, path: Path, own: Own) -> bool:
    owner = path.with_name(path.name.removeprefix(COMPANION))
    return path.name in LEFT_BY_SYSTEMS or own(owner.relative_to(folder).as_posix())


def _files(folder: Path) -> list[Path]:
    """All that is not a folder, in order; links are files here, and empty folders are nothing."""
    found = []
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        found += [Path(parent, name) for name in (*files, *links)]
    return sorted(found)


def _folders(folder: Path) -> list[Path]:
    """The folder and those in it, the deepest first."""
    return [Path(parent) for parent, _, _ in os.walk(folder, topdown=False)]


def few(paths: list[Path], root: Path) -> str:
    """Some paths as a person reads them: "thesis.txt, src and 3 more"."""
    names = [str(path.relative_to(root)) for path in paths]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
