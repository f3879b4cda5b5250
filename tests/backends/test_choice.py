"""Which backend is taken, why, and what is said where it cannot be."""

import subprocess
import sys

import pytest

from mlx_distill import backends
from mlx_distill.backends import choose_backend
from mlx_distill.errors import DistillError


@pytest.mark.parametrize(
    "asked, gpu, expected",
    [
        ("auto", False, "mlx"),
        ("auto", True, "torch"),
        ("mlx", True, "mlx"),
        ("torch", False, "torch"),
    ],
)
def test_the_choice(monkeypatch, asked: str, gpu: bool, expected: str):
    monkeypatch.setattr(backends, "_torch_has_gpu", lambda: gpu)
    chosen = choose_backend(asked)
    assert chosen.name == chosen.device().backend == expected
    assert chosen.device().reason and chosen.ranks.size == 1


def test_an_unknown_backend_is_refused():
    with pytest.raises(DistillError, match=r"^--backend jax: this version has auto, mlx, torch$"):
        choose_backend("jax")


@pytest.mark.parametrize(
    "name, package, extra",
    [("torch", "torch", r'"mlx-distill\[torch\]"'), ("mlx", "MLX", "mlx-lm")],
)
def test_a_framework_that_is_not_installed_is_named_with_how_to_get_it(
    monkeypatch, name: str, package: str, extra: str
):
    monkeypatch.setitem(sys.modules, f"mlx_distill.backends.{name}.backend", None)
    with pytest.raises(
        DistillError,
        match=f"^--backend {name}: {package} cannot be imported .*pip install .*{extra}",
    ):
        choose_backend(name)


def test_our_own_modules_import_no_framework():
    modules = (
        "cli",
        "recipe.load",
        "backends.protocol",
        "pipeline",
        "training.loop",
        "scoring.score",
        "reporting.runs_page",
        "terminal.show",
        "data.prepare",
        "terminal.doctor",
    )
    imports = ", ".join(f"mlx_distill.{module}" for module in modules)
    check = (
        f"import sys, {imports}; print([name for name in ('torch', 'mlx.core', 'peft') if "
        "name in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", check], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )
