"""Which number formats an NVIDIA GPU is asked for, on a pretended one."""

from pathlib import Path

import mlx.core as mx
import pytest
import torch

from mlx_distill.backends.mlx import backend as mlx_backend
from mlx_distill.backends.torch import backend as backends
from mlx_distill.backends.torch.backend import TorchBackend
from mlx_distill.errors import RecipeError


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """A backend that believes to sit at a GPU of this compute capability."""

    def made(capability: tuple[int, int]) -> TorchBackend:
        backend = TorchBackend()
        backend._device = torch.device("cuda", 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return backend

    return made


@pytest.mark.parametrize("capability, dtype", [((7, 5), "float32"), ((8, 0), "bfloat16")])
def test_auto_is_a_format_that_the_gpu_has(gpu, capability: tuple[int, int], dtype: str):
    backend = gpu(capability)
    assert backend.device().dtype == dtype
    assert backend.dtype("auto") == getattr(torch, dtype)


@pytest.mark.parametrize("capability, asked", [((7, 5), torch.float32), ((8, 0), None)])
def test_a_teacher_is_as_stored_where_the_gpu_can_be_trusted_with_it(
    gpu, capability: tuple[int, int], asked: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
):
    """A folder in bfloat16 would be imitated, too."""
    seen = []
    monkeypatch.setattr(backends.loading, "load_teacher", lambda *given: seen.append(given[-1]))
    monkeypatch.setattr(backends, "TorchTeacher", lambda split: split)
    gpu(capability).load_teacher(Path("m"), "m")
    assert seen == [asked]


def test_mlx_asks_a_gpu_before_ampere_for_float32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mlx_backend.mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mlx_backend.mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mlx_backend.mx, "device_info", lambda: {"device_name": "Tesla T4"})
    for has, dtype in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr(mlx_backend, "gpu_has_bfloat16", lambda has=has: has)
        found = mlx_backend.MlxBackend().device()
        assert (found.dtype, found.device) == (dtype, "CUDA (Tesla T4)")


def test_bfloat16_is_refused_where_it_would_be_imitated(gpu):
    with pytest.raises(RecipeError, match='compute_dtype = "bfloat16": the Tesla T4 has no bfl'):
        gpu((7, 5)).dtype("bfloat16")
    assert gpu((9, 0)).dtype("bfloat16") == torch.bfloat16
