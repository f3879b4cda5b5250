"""Every command on a pretended Mac with Metal (`fakemac/`), and on a real one where there is one:
what it computes in bfloat16 beside a CPU's float32, and what goes wrong on its GPU.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from endings import arguments, logged

import mlx_distill.backends.mlx.backend  # noqa: F401 (mlx-lm is loaded before devices are pretended)
from mlx_distill.cli import main

COMMAND_BUFFER = "[METAL] Command buffer execution failed: "
NO_MEMORY = "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
TIME_OUT = "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)."
NO_BUFFER = (
    "[metal::malloc] Attempting to allocate 40000000000 bytes which is greater than the maximum "
    "allowed buffer size of 20000000000 bytes."
)
NO_CHARTS = {"mlx_distill.reporting.drawing:drawn": "<svg></svg>"}
M5 = [{"FAKEMAC_TF32": "1"}]
SHORT = ("optim.steps=2", "eval.examples=2", "eval.max_new_tokens=3")
BFLOAT16 = 0.01  # relative; the pretended runs below differ by at most 1e-3
SWEEP = """recipe = "{recipe}"
seeds = [1]
folder = "{folder}/sweep"
runs = "{folder}/runs"
[axes]
truncation.fraction = [0.5, 1.0]
"""


def settings(*sets: str) -> Iterator[str]:
    return (word for one in sets for word in ("--set", one))


def commands(recipe: Path, folder: Path) -> dict[str, list[str | Path]]:
    """Each command once, and each way of training and of asking the teacher, in their order."""

    def run(name: str, *sets: str) -> list[str | Path]:
        own = (f"run.folder={folder}", f"run.name={name}")
        return [recipe, *settings(*SHORT, *own, *sets)]

    lora = ("student.tuning=lora", "student.gradient_checkpointing=true")
    written = ("rollouts.by=student", "rollouts.max_new_tokens=3", "truncation.span=cot")
    written += (f"rollouts.folder={folder}/texts",)
    first = folder / "first"
    every = {
        "doctor": ["doctor"],
        "plan": ["plan", recipe],
        "plan --probe": ["plan", recipe, "--probe"],
        "show": ["show", recipe],
        "run": ["run", *run("first")],
        "run, finished": ["run", *run("first")],
        "eval": ["eval", first, *settings("examples=3", "batch_size=2")],
        "chat": ["chat", first, "--prompt", "1+1?"],
        "report": ["report", first, "--out", folder / "page"],
        "write": ["write", *run("w", *written)],
        "run, written": ["run", *run("w", *written)],
        "lora": ["run", *run("lora", *lora, "teacher.quantize_bits=4")],
        "dora, jsd": ["run", *run("dora", "student.tuning=dora", "objective.divergence=jsd")],
    }
    for kind in ("top_k", "sampled", "hidden"):
        cached = run(kind, f"teacher.cache={kind}", f"teacher.cache_folder={folder}/cache")
        every |= {f"teach {kind}": ["teach", *cached], f"run {kind}": ["run", *cached]}
    sweep = folder / "sweep.toml"
    sweep.write_text(SWEEP.format(recipe=recipe, folder=folder))
    every["sweep"] = ["sweep", sweep, "--jobs", "2", *settings(*SHORT)]
    return every


def test_every_command_ends_well(on_a_mac, tiny_recipe, tmp_path):
    job = {"returns": NO_CHARTS, "fork_jobs": True}
    job["environments"] = [{"XDG_CACHE_HOME": str(tmp_path / "home")}]
    for name, words in commands(tiny_recipe, tmp_path).items():
        ended = on_a_mac(*words, **job)
        assert ended.code == 0, f"{name}: {ended.err or ended.out}"
    assert len(list((tmp_path / "runs").glob("*/report.html"))) == 2


@pytest.mark.parametrize("machine", [{}, *M5], ids=["metal", "11 bits"])
def test_a_run_in_bfloat16_learns_what_a_cpu_learns_in_float32(
    on_a_mac, machine, tiny_recipe, whole_run, tmp_path
):
    words = (*arguments(tiny_recipe, tmp_path), *settings("eval.task="))
    ended = on_a_mac(*words, returns=NO_CHARTS, environments=[machine])
    assert ended.code == 0, ended.err
    assert "mlx on Metal (Apple" in ended.out and "bfloat16" in ended.out
    for log, names in (("metrics.jsonl", ("kd", "ce")), ("validation.jsonl", ("kl", "ce"))):
        found, expected = (logged(path, log) for path in (tmp_path / "tiny", whole_run("full")))
        for ours, theirs in zip(found, expected, strict=True):
            for name in names:
                assert ours[name] == pytest.approx(theirs[name], rel=BFLOAT16)


def test_doctor_names_the_chip_the_system_and_the_limits(pretended_mac):
    result = pretended_mac("doctor")
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


def test_doctor_on_an_m5_says_ok(pretended_mac):
    """Its products of float32 keep 11 bits unless they are told not to."""
    result = pretended_mac("doctor", environments=M5)
    assert result.code == 0, result.out
    assert "keep 11 bits on this GPU" in result.out
    assert "with MLX_ENABLE_TF32=0 (6.1e-04 without), relative error 2" in result.out
    plain = pretended_mac("doctor", environments=[M5[0] | {"MLX_ENABLE_TF32": "0"}])
    assert plain.code == 0 and "keep 11 bits" not in plain.out


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("accumulate", COMMAND_BUFFER + NO_MEMORY),
        ("accumulate", COMMAND_BUFFER + TIME_OUT),
        ("score", NO_BUFFER),
        ("save_state", COMMAND_BUFFER + NO_MEMORY),
        ("load_teacher", NO_BUFFER),
        ("generate", COMMAND_BUFFER + TIME_OUT),
    ],
)
def test_what_a_gpu_refuses_is_one_line(
    pretended_mac, tiny_recipe, tmp_path, where: str, text: str
):
    words = (*arguments(tiny_recipe, tmp_path), *settings(*SHORT))
    ended = pretended_mac(*words, returns=NO_CHARTS, mlx_fails={where: text})
    assert ended.code == 2, ended.err
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    assert "disk" not in ended.err and text.rstrip(".") in ended.err
    lower = "batch_size" if where != "load_teacher" else "memory"
    assert lower in ended.err


def test_a_mac_is_kept_awake_while_a_run_lasts(pretended_mac, tiny_recipe, tmp_path):
    log = tmp_path / "caffeinate"
    words = (*arguments(tiny_recipe, tmp_path), *settings("eval.task=", "optim.steps=1"))
    job = {"returns": NO_CHARTS, "environments": [{"FAKEMAC_AWAKE": str(log)}]}
    assert pretended_mac("plan", tiny_recipe, **job).code == 0 and not log.exists()
    assert pretended_mac(*words, **job).code == 0
    asked, ended = log.read_text().splitlines()
    assert asked.startswith("-i -w ") and int(asked.split()[-1]) > 0
    assert ended == "ended"
    job["environments"] = [{"PATH": str(tmp_path)}]  # where there is no such command
    assert pretended_mac(*words, "--fresh", **job).code == 0


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
