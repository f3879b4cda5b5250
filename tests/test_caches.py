"""What is kept for later starts: where it lies, and what goes."""

import os
import time
from pathlib import Path

import pytest

from mlx_distill.caches import UNUSED_DAYS, forget_unused, kept_for_later, mark_used

DIGITS = "0123456789abcdef" * 2


def aged(entry: Path, days: float) -> Path:
    then = time.time() - days * 24 * 3600
    os.utime(entry, (then, then))
    return entry


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A file and a folder of each age, and things of other people's that are older still."""
    for days in (0, UNUSED_DAYS - 1, UNUSED_DAYS + 1):
        name = f"{DIGITS[:30]}{days:02}"
        (tmp_path / f"{name}.json").write_text("{}")
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.json").write_text("[]")
        aged(tmp_path / f"{name}.json", days)
        aged(tmp_path / name, days)
    for name in ("notes.txt", f"{DIGITS}.txt", f"my-{DIGITS}"):
        (tmp_path / name).write_text("")
        aged(tmp_path / name, 1000)
    return tmp_path


def test_what_nothing_used_for_long_goes_and_nothing_else(folder: Path):
    before = {entry.name for entry in folder.iterdir()}
    forget_unused(folder)
    old = f"{DIGITS[:30]}{UNUSED_DAYS + 1}"
    assert before - {entry.name for entry in folder.iterdir()} == {old, f"{old}.json"}


def test_what_is_used_stays(folder: Path):
    old = folder / f"{DIGITS[:30]}{UNUSED_DAYS + 1}"
    mark_used(old)
    forget_unused(folder)
    assert (old / "rows.json").exists()
    mark_used(folder / "absent")
    assert not (folder / "absent").exists()


def test_a_link_goes_and_what_it_names_stays(folder: Path, tmp_path_factory):
    theirs = tmp_path_factory.mktemp("theirs")
    (theirs / "file").write_text("")
    link = folder / f"{DIGITS[:30]}99"
    link.symlink_to(theirs)
    then = time.time() - 99 * 24 * 3600
    os.utime(link, (then, then), follow_symlinks=False)
    forget_unused(folder)
    assert (theirs / "file").exists() and not link.is_symlink()


def test_a_folder_that_is_not_there_is_no_error(tmp_path: Path):
    forget_unused(tmp_path / "absent")


def test_where_it_lies(monkeypatch, tmp_path: Path):
    monkeypatch.delenv("MLX_DISTILL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kept_for_later("scores") == tmp_path / ".cache" / "mlx-distill" / "scores"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert kept_for_later("gguf") == tmp_path / "xdg" / "mlx-distill" / "gguf"
    monkeypatch.setenv("MLX_DISTILL_CACHE", "~/ours")
    assert kept_for_later("probes") == tmp_path / "ours" / "probes"
