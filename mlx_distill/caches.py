"""What this program keeps in the user's cache folder for later starts, and for how long.

In: what is kept there, by name. Out: its folder. Decided here: where the folder is, and that what
no start has read or written for `UNUSED_DAYS` goes: a newer version of this program asks for other
names, and what the older one kept would lie there for ever. All of it may be deleted at any time.
"""

import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

UNUSED_DAYS = 30
OURS = re.compile(r"[0-9a-f]{32}(\.json)?")  # names that this program gives


def kept_for_later(name: str) -> Path:
    """The folder of what is kept under a name: in `$MLX_DISTILL_CACHE`, else in `mlx-distill` of the
    user's cache folder.
    """
    if asked := os.environ.get("MLX_DISTILL_CACHE"):
        return Path(asked).expanduser() / name
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "mlx-distill" / name


def mark_used(entry: Path) -> None:
    """Count an entry as used now, if it is there and may be touched."""
    with suppress(OSError):
        os.utime(entry)


def forget_unused(folder: Path) -> None:
    """Delete the entries of a folder, named by their digests, that nothing has used lately; one that
    cannot be deleted stays.
    """
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    with suppress(OSError):
        for entry in list(folder.iterdir()):
            if OURS.fullmatch(entry.name) and entry.lstat().st_mtime < oldest:
                _delete(entry)


def _delete(entry: Path) -> None:
    with suppress(OSError):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink()
