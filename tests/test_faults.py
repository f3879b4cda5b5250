"""The faults once found are kept as shell scripts in `faults/`, each with what must happen.

They are run by hand (`PY=.venv/bin/python CHECKOUT=$PWD bash tests/faults/NAME/cmd.sh`); the tests
beside this file assert the same of the functions. Here: what the scripts patch is still there.
"""

import importlib
import re
import subprocess
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parent / "faults").rglob("*.sh"))
MODULE = re.compile(r"(?:import|,) (mlx_distill(?:\.\w+)*) as (\w)\b")
IMPORTED = re.compile(r"from (mlx_distill(?:\.\w+)*) import (\w+)")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.parent.name)
def test_what_a_fault_patches_is_there(script: Path):
    text = script.read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    for module, name in IMPORTED.findall(text):
        assert hasattr(importlib.import_module(module), name)
    for module, alias in MODULE.findall(text):
        patched = re.findall(rf"(?m)^{alias}((?:\.\w+)+) =", text)
        assert patched, f"{script}: nothing of {module} is patched"
        for way in patched:
            found = importlib.import_module(module)
            for step in way.strip(".").split("."):
                found = getattr(found, step)
