"""`mlx-distill doctor`: a self-check that says ok, or WRONG and exits with 1."""

import pytest
from typer.testing import CliRunner, Result

from mlx_distill.backends.mlx.backend import MlxBackend
from mlx_distill.backends.mlx.self_test import MlxSelfTest
from mlx_distill.cli import app
from mlx_distill.terminal import doctor


@pytest.fixture(autouse=True)
def small_matmul(monkeypatch: pytest.MonkeyPatch):
    measured = MlxSelfTest.matmul_rate
    monkeypatch.setattr(MlxSelfTest, "matmul_rate", lambda self: measured(self, 32, 1))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


def lines(result: Result) -> dict[str, str]:
    return {
        line.partition(" ")[0]: line.partition(" ")[2].strip()
        for line in result.output.splitlines()
    }


def test_doctor_says_what_is_installed_and_that_the_loss_is_right():
    result = run()
    assert result.exit_code == 0, result.output
    found = lines(result)
    assert set(found) - {"note:"} == {
        "mlx-distill",
        "python",
        "processor",
        "memory",
        "packages",
        "backend",
        "loss",
        "matmul",
        "disk",
    }
    assert found["loss"].startswith("relative error ") and found["loss"].endswith(
        "against float64: ok"
    )
    assert (
        "mlx 0." in found["packages"]
        and "numpy 2." in found["packages"]
        and "torch 2.13.0" in found["packages"]
    )
    assert found["backend"].startswith("mlx on ")
    assert found["matmul"].endswith(("GFLOP/s in float32", "GFLOP/s in bfloat16"))
    assert float(found["memory"].split()[0]) > 0.1 and float(found["disk"].split()[0]) >= 0


@pytest.mark.parametrize("error", [1e-3, float("nan"), float("inf")])
def test_a_wrong_loss_exits_with_1(monkeypatch: pytest.MonkeyPatch, error: float):
    monkeypatch.setattr(MlxSelfTest, "loss_error", lambda self: error)
    result = run()
    assert result.exit_code == 1
    assert lines(result)["loss"].endswith("against float64: WRONG")
    assert "matmul" in lines(result)  # the rest is still said


def test_a_real_fault_in_the_loss_is_found(monkeypatch: pytest.MonkeyPatch):
    """The check runs the loss: the other direction of the divergence is no forward KL."""
    from mlx_distill.backends.mlx import divergences

    monkeypatch.setitem(divergences.LINEAR, "forward_kl", divergences.ReverseKL)
    assert run().exit_code == 1


def test_what_is_missing_is_a_dash(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "OPTIONAL", ("no-such-package",))
    assert lines(run())["packages"].endswith("no-such-package -")


def test_advice_is_printed(monkeypatch: pytest.MonkeyPatch):
    import dataclasses

    device = dataclasses.replace(MlxBackend().device(), advice="install a faster BLAS")
    monkeypatch.setattr(MlxBackend, "device", lambda self: device)
    assert lines(run())["note:"] == "install a faster BLAS"


def test_memory_is_unknown_where_it_cannot_be_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sysconf", lambda name: (_ for _ in ()).throw(ValueError(name)))
    assert doctor.total_memory_bytes() == 0
    assert lines(run())["memory"] == "unknown"


def test_an_unknown_backend_is_a_users_mistake():
    from mlx_distill.errors import DistillError

    result = run("--backend", "tensorflow")
    assert isinstance(result.exception, DistillError) and "this version has auto, mlx" in str(
        result.exception
    )
