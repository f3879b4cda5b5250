"""What only an NVIDIA GPU can show, and on every machine that `benchmarks/gpu_day.sh` still runs."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import model_folder

from benchmarks import workers
from mlx_distill.backends import choose_backend
from mlx_distill.errors import OutOfMemory

ROOT = Path(__file__).parents[1]
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.mark.cuda
@no_gpu
def test_the_loss_on_the_gpu_is_the_definition():
    assert choose_backend("torch").self_test().loss_error() < 1e-4


@pytest.mark.cuda
@no_gpu
def test_a_real_out_of_memory_is_told_as_one(bytes_tokenizer, tmp_path: Path):
    folder = model_folder(tmp_path / "model", bytes_tokenizer("qwen2_5"), seed=1, layers=2)
    backend = choose_backend("torch")
    teacher = backend.load_teacher(folder, "m")
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(int(0.98 * free), dtype=torch.uint8, device="cuda")
    with pytest.raises(OutOfMemory):
        teacher.activations([np.ones(2**20, np.int32)], 16)
    del held


@pytest.mark.cuda
@no_gpu
@pytest.mark.parametrize(
    "asked", [(), ("student.tuning=lora", "student.quantize_bits=nf4", "teacher.quantize_bits=nf4")]
)
def test_a_run_on_the_gpu_ends_in_a_student(tiny_recipe: Path, tmp_path: Path, asked):
    settings = (f"run.folder={tmp_path}", "eval.task=", "optim.steps=2", *asked)
    words = [word for one in settings for word in ("--set", one)]
    command = [sys.executable, "-m", "mlx_distill", "run", str(tiny_recipe), "--backend", "torch"]
    found = subprocess.run([*command, *words], capture_output=True, text=True)
    assert found.returncode == 0 and "CUDA" in found.stdout, found.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="a script for Linux")
def test_the_script_of_a_gpu_day_runs_here_with_tiny_shapes(tmp_path: Path):
    found = subprocess.run(
        ["bash", "benchmarks/gpu_day.sh", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"DEVICE": "cpu", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    logs = {log.name: log.read_text()[-500:] for log in tmp_path.glob("*.log")}
    assert found.returncode == 0, (found.stdout, found.stderr, logs)
    parts = [line.split("\t")[0] for line in found.stdout.splitlines()]
    assert parts == ["doctor", "loss", "step", "fractions"]


def test_a_part_that_is_cut_off_keeps_what_it_measured():
    """What failed before is known too; the one that Ctrl-C met in the middle has its repetitions."""

    def attempt(name: str, into: list) -> bool:
        into.append({"seconds": 1.0})
        if name == "cut":
            raise KeyboardInterrupt
        return name != "fails"

    found, stopped = workers.in_rounds(["whole", "fails", "cut", "never"], 2, attempt)
    once = [{"seconds": 1.0}]
    assert (found, stopped) == ({"whole": once, "fails": [], "cut": once}, True)
    found, stopped = workers.in_rounds(["whole", "fails"], 2, attempt)
    assert (found, stopped) == ({"whole": once * 2, "fails": []}, False)
