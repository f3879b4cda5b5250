"""What machine this is, as far as it can be asked: pretended Macs and GPUs."""

import mlx.core as mx
import pytest

from mlx_distill import machine as subject
from mlx_distill.backends.protocol import DeviceInfo
from mlx_distill.errors import DistillError
from mlx_distill.machine import Machine


@pytest.fixture(autouse=True)
def on_its_gpu(monkeypatch):
    monkeypatch.delenv("MLX_DISTILL_DEVICE")


def test_mlx_can_be_kept_off_the_gpu(monkeypatch):
    monkeypatch.setenv("MLX_DISTILL_DEVICE", "cpu")
    monkeypatch.setattr(subject, "total_memory_bytes", lambda: 7)
    monkeypatch.setattr(subject.platform, "system", lambda: "Darwin")
    expected = Machine("mlx", "cpu", "float32", 7, "physical memory")
    assert subject.this_machine() == expected
    monkeypatch.setattr(subject.platform, "system", lambda: "Linux")
    monkeypatch.setattr(subject, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(subject, "_installed", lambda prefix: True)
    assert subject.this_machine("mlx") == expected
    monkeypatch.setenv("MLX_DISTILL_DEVICE", "gpu")
    with pytest.raises(DistillError, match=r"^MLX_DISTILL_DEVICE=gpu: it may be cpu"):
        subject.this_machine()


def test_a_mac_has_a_working_set(monkeypatch):
    monkeypatch.setattr(subject.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(subject, "total_memory_bytes", lambda: 16 * 2**30)
    monkeypatch.setattr(subject, "_working_set", lambda: 0)  # MLX is not installed
    answers = {"sysctl": 0}
    monkeypatch.setattr(subject, "_asked", lambda command, *rest: answers[command])
    machine = subject.this_machine()
    assert (machine.backend, machine.device, machine.dtype, machine.memory_bytes) == (
        "mlx",
        "metal",
        "bfloat16",
        12 * 2**30,
    )
    answers["sysctl"] = 14_000
    assert subject.this_machine().memory_bytes == 14_000 * 2**20


def test_what_mlx_says_of_the_working_set_is_the_limit(monkeypatch):
    """Two thirds of a small Mac's memory, 84 % of a large one's: no share of ours fits all."""
    monkeypatch.setattr(subject.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    said = {"max_recommended_working_set_size": 11_453_251_584}
    monkeypatch.setattr(mx, "device_info", lambda: said)
    assert subject.this_machine().memory_bytes == 11_453_251_584
    assert "as MLX says" in subject.this_machine().limit


def nvidia_smi(answers: dict[str, str], gpu: str = ""):
    """What `_said` gives where NVIDIA's tool, asked of this GPU alone, answers so."""

    def said(command: str, *words: str) -> str:
        assert command == "nvidia-smi"
        *which, query, _ = words
        assert which == (["-i", gpu] if gpu else [])
        return answers[query.removeprefix("--query-gpu=")]

    return said


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ("7.0", "float32"),
        ("7.5", "float32"),
        ("8.0", "bfloat16"),
        ("12.0", "bfloat16"),
        ("", "bfloat16"),
    ],
)
def test_a_gpu_before_ampere_has_no_bfloat16(capability, dtype, monkeypatch):
    monkeypatch.setattr(subject.platform, "system", lambda: "Linux")
    monkeypatch.setattr(subject, "has_nvidia_driver", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    answers = {"memory.free": "15000", "compute_cap": capability}
    monkeypatch.setattr(subject, "_said", nvidia_smi(answers, gpu="2"))
    machine = subject.this_machine("torch")
    assert (machine.dtype, machine.memory_bytes) == (dtype, 15_000 * 2**20)
    assert machine.limit == "free GPU memory"


@pytest.mark.parametrize(
    ("asked", "torch", "expected"),
    [
        ("auto", True, ("torch", "cuda", "bfloat16", 80_000 * 2**20)),
        ("auto", False, ("mlx", "cpu", "float32", 7)),
        ("mlx", True, ("mlx", "cpu", "float32", 7)),
        ("torch", False, ("torch", "cuda", "bfloat16", 80_000 * 2**20)),
    ],
)
def test_linux_with_an_nvidia_gpu(asked, torch, expected, monkeypatch):
    monkeypatch.setattr(subject.platform, "system", lambda: "Linux")
    monkeypatch.setattr(subject, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(subject, "_installed", lambda prefix: False)
    monkeypatch.setattr(subject, "total_memory_bytes", lambda: 7)
    answers = {"memory.free": "80000\n70000", "compute_cap": "9.0\n7.5"}
    monkeypatch.setattr(subject, "_said", nvidia_smi(answers))
    monkeypatch.setattr(subject.importlib.util, "find_spec", lambda name: torch or None)
    machine = subject.this_machine(asked)
    assert (machine.backend, machine.device, machine.dtype, machine.memory_bytes) == expected


def test_the_machine_as_a_backend_describes_it(monkeypatch):
    monkeypatch.setattr(subject, "device_memory", lambda kind: (5, kind))
    for text, kind in (
        ("CPU (x86_64, BLAS: OpenBLAS)", "cpu"),
        ("Metal (Apple M4)", "metal"),
        ("CUDA (H200 x 2)", "cuda"),
    ):
        assert Machine.of(DeviceInfo("mlx", text, "float32", "", "")) == Machine(
            "mlx", kind, "float32", 5, kind
        )
    assert (
        subject._asked("no-such-command") == 0
        and subject._asked("echo", "12", "34") == 12
        and subject._asked("echo", "x") == 0
    )
