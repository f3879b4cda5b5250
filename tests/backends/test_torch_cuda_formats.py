"""Which number formats an NVIDIA GPU is asked for, on a pretended one."""

import pytest
import torch

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


def test_bfloat16_is_refused_where_it_would_be_imitated(gpu):
    with pytest.raises(RecipeError, match='compute_dtype = "bfloat16": the Tesla T4 has no bfl'):
        gpu((7, 5)).dtype("bfloat16")
    assert gpu((9, 0)).dtype("bfloat16") == torch.bfloat16
