"""Files and folders that appear whole or not at all, locks, and what is said where a disk refuses."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_distill.errors import CacheError, DistillError, RunError
from mlx_distill.files import (
    REMEDIES,
    InUse,
    is_locked,
    left_overs,
    locked,
    made_whole,
    one_line,
    remedy,
    sha256_of,
    told_as,
    write_json,
    write_text,
)


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_json(file, {"old": 1})
    before = file.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mlx_distill.files.flush_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(file, "new")
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "student"
    with pytest.raises(KeyError), made_whole(folder) as half:
        (half / "a").write_text("a")
        assert not folder.exists()
        raise KeyError
    assert not list(tmp_path.iterdir())
    with made_whole(folder) as half:
        (half / "a").write_text("a")
    found = [path.relative_to(tmp_path) for path in tmp_path.rglob("*")]
    assert found == [Path("student"), Path("student/a")]
    assert folder.stat().st_mode & 0o777 == 0o777 & ~_umask(), "readable as any other folder"


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def test_a_folder_that_is_there_is_not_replaced(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "thesis.tex").write_text("mine")
    with pytest.raises(OSError, match="not empty"), made_whole(tmp_path / "student"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["student", "thesis.tex"]


def test_what_a_killed_process_left_goes_and_what_is_being_made_stays(tmp_path):
    others = [".a-0123abcd.tmp.txt", ".a-mine.tmp", ".b-0123abcd.tmp"]
    for name in (".a-0123abcd.tmp", ".a.tmp", *others):
        (tmp_path / name).mkdir()
    with made_whole(tmp_path / "a") as half:
        assert left_overs(tmp_path, re.compile("a")) == [], (
            "neither gone ones nor the one that is being made"
        )
        (half / "content").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [*others, "a"]


def test_one_process_at_a_time(tmp_path):
    lock = tmp_path / "run.lock"
    assert not is_locked(lock) and not lock.exists()
    program = (
        "import sys; from pathlib import Path; from mlx_distill.files import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(lock)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n" and is_locked(lock)
        with pytest.raises(InUse, match=r"run\.lock is held by another process"), locked(lock):
            pass
        with locked(lock, waiting=lambda: other.stdin.close()):
            pass
    assert not is_locked(lock)


def test_a_lock_that_is_no_file_is_not_said_to_be_held(tmp_path):
    (tmp_path / "run.lock").mkdir()
    assert not is_locked(tmp_path / "run.lock")
    text = r"run\.lock: cannot be written \(Is a directory\); a folder has that name: move it away"
    with (
        pytest.raises(RunError, match=text),
        told_as(RunError, tmp_path / "run.lock"),
        locked(tmp_path / "run.lock"),
    ):
        pass


@pytest.mark.parametrize("number", REMEDIES)
def test_only_a_full_disk_is_told_to_free_some(tmp_path, number):
    with (
        pytest.raises(CacheError) as told,
        told_as(CacheError, tmp_path, "complete parts are intact"),
    ):
        raise OSError(number, os.strerror(number))
    text = str(told.value)
    said = f"{tmp_path}: cannot be written ({os.strerror(number)}); complete parts are intact; "
    assert text == said + REMEDIES[number] and len(text.splitlines()) == 1
    assert ("free some disk" in text) == (number == errno.ENOSPC)


def test_a_library_that_says_the_cause_in_words_gets_its_remedy():
    assert "free some disk" in remedy(
        RuntimeError("I/O error: No space left on device (os error 28)")
    )
    assert "reading only" in remedy(RuntimeError("Read-only file system (os error 30)"))
    unsaid = remedy(RuntimeError("[write] Unable to write 30551 bytes to file."))
    assert "free some disk (or raise your quota" in unsaid


def test_errors_that_are_ours_are_passed_on(tmp_path):
    with pytest.raises(InUse), told_as(RunError, tmp_path):
        raise InUse("held")
    assert issubclass(InUse, DistillError)


def test_one_printable_line_of_any_error():
    assert one_line(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
    assert one_line(ValueError("\n  first \x1b[31m\n second")) == "first ?[31m"
    assert one_line(KeyError()) == "KeyError" and len(one_line(ValueError("x" * 10_000))) == 300


def test_a_digest_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert (
        sha256_of(tmp_path / "a")
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
