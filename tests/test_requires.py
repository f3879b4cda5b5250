"""What is said, before anything is installed, where the program cannot be: one line, on any Python."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def requires(monkeypatch):
    """The script as a module, on a Mac that will do."""
    spec = importlib.util.spec_from_file_location("requires", ROOT / "requires.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    on(module, monkeypatch)
    return module


def on(
    module, monkeypatch, system="Darwin", machine="arm64", macos="14.0", glibc="", python="3.12"
):
    """Pretend to be on such a machine."""
    monkeypatch.setattr(module.platform, "system", lambda: system)
    monkeypatch.setattr(module.platform, "machine", lambda: machine)
    monkeypatch.setattr(module.platform, "mac_ver", lambda: (macos, ("", "", ""), machine))
    monkeypatch.setattr(module.platform, "python_version", lambda: f"{python}.9")
    monkeypatch.setattr(module.sys, "version_info", tuple(map(int, python.split("."))))
    monkeypatch.setattr(module, "_c_library", lambda: glibc)


@pytest.mark.parametrize(
    "machine",
    [
        {},
        {"macos": "26.2"},
        {"python": "3.11"},
        {"python": "3.14"},
        {"system": "Linux", "machine": "x86_64", "glibc": "glibc 2.35"},
        {"system": "Linux", "machine": "aarch64", "glibc": "glibc 2.41"},
    ],
)
def test_nothing_is_missing(requires, monkeypatch, machine: dict):
    on(requires, monkeypatch, **machine)
    assert requires.complaint() == ""


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ({"python": "3.9"}, "Python 3.11 to 3.14 is needed, .* is 3.9.9: "),
        ({"python": "3.10"}, "Python 3.11 to 3.14 is needed, .* is 3.10.9: "),
        ({"python": "3.15"}, "Python 3.11 to 3.14 is needed, .* is 3.15.9: "),
        ({"machine": "x86_64"}, "a Mac with Apple silicon is needed, .* runs as x86_64: "),
        ({"machine": "x86_64", "python": "3.9"}, "a Mac with Apple silicon is needed"),
        ({"macos": "13.7"}, "macOS 14 or newer is needed by MLX, found macOS 13.7: "),
        ({"system": "Windows", "machine": "AMD64"}, "macOS or Linux is needed, this is Windows: "),
        ({"system": "Linux", "machine": "riscv64"}, "an x86-64 or ARM processor .* is riscv64"),
        (
            {"system": "Linux", "machine": "x86_64", "glibc": "glibc 2.31"},
            "Linux with glibc 2.35 or newer is needed .*, found glibc 2.31: ",
        ),
        (
            {"system": "Linux", "machine": "x86_64", "glibc": "another C library"},
            "Linux with glibc 2.35 or newer is needed .*, found another C library: ",
        ),
    ],
)
def test_what_is_missing_is_one_line(requires, monkeypatch, machine: dict, words: str):
    on(requires, monkeypatch, **machine)
    said = requires.complaint()
    assert re.match(words, said) and "\n" not in said


def test_a_python_that_would_do_is_named(requires, monkeypatch):
    on(requires, monkeypatch, python="3.9")
    monkeypatch.setattr(requires.shutil, "which", lambda name: name in ("python3.11", "python3.12"))
    monkeypatch.setattr(requires, "_starts", lambda name: name == "python3.11")
    assert requires.complaint().endswith(
        ": python3.11 is here: begin the command with it instead of python3"
    )
    monkeypatch.setattr(requires, "_starts", lambda name: False)
    assert "brew install python@3.13" in requires.complaint()


def test_it_is_the_first_thing_that_the_commands_run_and_old_pythons_can_read_it():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python3 .*venv .venv.*$", readme, re.MULTILINE)
    assert len(commands) >= 2
    assert all(command.startswith("python3 requires.py && python3 -m venv") for command in commands)
    ast.parse((ROOT / "requires.py").read_text(encoding="utf-8"), feature_version=(3, 6))


def test_here_it_says_nothing():
    said = subprocess.run([sys.executable, ROOT / "requires.py"], capture_output=True, text=True)
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")


def test_the_pythons_are_those_of_pyproject(requires):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-python = ">={requires._dotted(requires.OLDEST)}"' in project
