"""Every command on a pretended Mac with Metal (`fakemac/`), and what goes wrong on its GPU."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from endings import arguments

from mlx_distill.__main__ import main

COMMAND_BUFFER = "[METAL] Command buffer execution failed: "
NO_MEMORY = "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
TIME_OUT = "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)."
NO_BUFFER = (
    "[metal::malloc] Attempting to allocate 40000000000 bytes which is greater than the maximum "
    "allowed buffer size of 20000000000 bytes."
)
NO_CHARTS = {"mlx_distill.reporting.drawing:drawn": "<svg></svg>"}
M5 = [{"FAKEMAC_TF32": "1"}]


@pytest.fixture
def run_on_a_mac(on_a_mac, tiny_recipe, tmp_path) -> Callable[..., SimpleNamespace]:
    def run(*sets: str, **job) -> SimpleNamespace:
        words = (
            word for item in ("eval.task=", "optim.steps=2", *sets) for word in ("--set", item)
        )
        return on_a_mac(*arguments(tiny_recipe, tmp_path), *words, returns=NO_CHARTS, **job)

    return run


def test_a_run_computes_in_bfloat16_on_metal(run_on_a_mac, tmp_path: Path):
    result = run_on_a_mac()
    assert result.code == 0, result.err
    device = json.loads((tmp_path / "tiny" / "manifest.json").read_text())
    assert "Metal (Apple M4 Pro)" in json.dumps(device) and "bfloat16" in json.dumps(device)


def test_doctor_names_the_chip_the_system_and_the_limits(on_a_mac):
    result = on_a_mac("doctor")
    assert result.code == 0, result.out
    for words in (
        "Apple M4 Pro\n",
        "macOS 15.5",
        "memory       34.4 GB, GPU's working set 22.9 GB, largest buffer 19.3 GB",
        "MLX's cache limit 32.6 GB, wired limit not set",
        "mlx on Metal (Apple M4 Pro), bfloat16",
        "against float64: ok",
    ):
        assert words in result.out


def test_doctor_on_an_m5_says_ok(on_a_mac):
    """Its products of float32 keep 11 bits unless they are told not to."""
    result = on_a_mac("doctor", environments=M5)
    assert result.code == 0, result.out
    assert "keep 11 bits on this GPU" in result.out
    assert "with MLX_ENABLE_TF32=0 (6.1e-04 without), relative error 2" in result.out
    plain = on_a_mac("doctor", environments=[M5[0] | {"MLX_ENABLE_TF32": "0"}])
    assert plain.code == 0 and "keep 11 bits" not in plain.out


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("accumulate", COMMAND_BUFFER + NO_MEMORY),
        ("accumulate", COMMAND_BUFFER + TIME_OUT),
        ("accumulate", NO_BUFFER),
        ("save_state", COMMAND_BUFFER + NO_MEMORY),
    ],
)
def test_what_a_gpu_refuses_is_one_line(run_on_a_mac, where: str, text: str):
    result = run_on_a_mac(mlx_fails={where: text})
    assert result.code == 2, result.err
    assert len(result.err.strip().splitlines()) == 1, result.err
    assert "disk" not in result.err


def test_training_wires_its_share_and_gives_it_back(
    tiny_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of the GPU's working set, by the sweep's jobs; the cache keeps a quarter of that. The log has
    what was held of the memory.
    """
    limits, asked = {"wired": 0, "cache": 6000}, []

    def setting(name: str) -> Callable[[int], int]:
        def set_limit(limit: int) -> int:
            before, limits[name] = limits[name], limit
            asked.append((name, limit))
            return before

        return set_limit

    gpu = SimpleNamespace(type=mx.DeviceType.gpu)
    monkeypatch.setattr(mx, "default_device", lambda: gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    said = {"device_name": "Apple M4 Pro", "max_recommended_working_set_size": 4000}
    monkeypatch.setattr(mx, "device_info", lambda: said)
    for name in limits:
        monkeypatch.setattr(mx, f"set_{name}_limit", setting(name))
    monkeypatch.setenv("MLX_DISTILL_JOBS", "2")
    words = ("--set", "eval.task=", "--set", "optim.steps=1", "--force")
    monkeypatch.setattr("sys.argv", ["mlx-distill", *arguments(tiny_recipe, tmp_path), *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert asked == [("wired", 2000), ("cache", 500), ("wired", 0), ("cache", 6000)]
    row = json.loads((tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["footprint_bytes"] == row["active_bytes"] + row["cache_bytes"] > 0
