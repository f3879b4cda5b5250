"""`mlx-distill doctor`: a self-check that says ok, or WRONG and exits with 1."""

import pytest
from typer.testing import CliRunner, Result

from mlx_distill.backends.mlx import self_test
from mlx_distill.backends.mlx.backend import MlxBackend
from mlx_distill.backends.mlx.self_test import MlxSelfTest
from mlx_distill.backends.oracle import Products
from mlx_distill.cli import app
from mlx_distill.terminal import doctor


@pytest.fixture(autouse=True)
def small_matmul(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MlxSelfTest, "matmul_size", lambda self: 32)


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
        "system",
        "processor",
        "memory",
        "packages",
        "backend",
        "products",
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
    assert found["products"].startswith("of float32: ") and found["products"].endswith(": ok")
    assert found["matmul"].endswith("GFLOP/s in float32 (32 x 32)")
    assert float(found["memory"].split()[0]) > 0.1 and float(found["disk"].split()[0]) >= 0


@pytest.mark.parametrize("error", [1e-3, float("nan"), float("inf")])
def test_a_wrong_loss_exits_with_1(monkeypatch: pytest.MonkeyPatch, error: float):
    monkeypatch.setattr(MlxSelfTest, "loss_error", lambda self: error)
    result = run()
    assert result.exit_code == 1
    assert lines(result)["loss"].endswith("against float64: WRONG")
    assert "matmul" in lines(result)  # the rest is still said


REDUCED = Products(short=2e-7, whole=3e-4)


def test_reduced_products_are_told_from_wrong_ones(monkeypatch: pytest.MonkeyPatch):
    """An M5, or CUDA: the loss is checked in a process that multiplies all bits (`test_mac.py`
    starts it).
    """
    monkeypatch.setattr(MlxSelfTest, "products", lambda self: REDUCED)
    monkeypatch.setattr(MlxSelfTest, "loss_error", lambda self: 6e-4)
    monkeypatch.setattr(doctor, "program", lambda module: ("sh", "-c", "echo 2.7e-07"))
    result = run()
    assert result.exit_code == 0, result.output
    found = lines(result)
    assert "keep 11 bits" in found["products"] and "MLX_ENABLE_TF32=0" in found["products"]
    assert found["loss"].startswith("with MLX_ENABLE_TF32=0 (6.0e-04 without), relative error 2")
    assert found["loss"].endswith(": ok")


def test_a_loss_that_is_wrong_with_all_bits_too_is_wrong(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MlxSelfTest, "products", lambda self: REDUCED)
    monkeypatch.setattr(MlxSelfTest, "loss_error", lambda self: 6e-4)
    monkeypatch.setattr(doctor, "program", lambda module: ("false",))
    result = run()
    assert result.exit_code == 1 and lines(result)["loss"].endswith("WRONG")


def test_wrong_products_exit_with_1(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MlxSelfTest, "products", lambda self: Products(short=2e-7, whole=2e-3))
    result = run()
    assert result.exit_code == 1 and lines(result)["products"].endswith("WRONG")


def test_matmul_is_measured_at_a_size_that_takes_a_while(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    for seconds, size in ((lambda size: 1.0, 256), (lambda size: 1e-9, 4096)):
        timed = lambda size, repeats, dtype, seconds=seconds: seconds(size)  # noqa: E731
        monkeypatch.setattr(self_test, "_seconds", timed)
        test = MlxBackend().self_test()
        assert test.matmul_size() == size
        assert test.matmul_rate() == 8 * 2 * size**3 / seconds(size)


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
