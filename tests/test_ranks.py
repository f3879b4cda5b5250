"""Several processes train one student: the same run as one process makes, and what happens when one
of them dies.

Two real processes on the CPU: torch's over gloo with FSDP2, MLX's over its ring. A launcher costs
seconds, so each test asks much.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from endings import TORCH_STUDENT, arguments
from safetensors.numpy import load_file
from torch.distributed.tensor import DTensor

from mlx_distill.backends.torch import loading
from mlx_distill.backends.torch import model as models
from mlx_distill.backends.torch import ranks as together
from mlx_distill.recipe.load import load_recipe
from mlx_distill.runs.run_folder import RunFolder

SCRIPTS = Path(sys.executable).parent
# three micro-batches for two ranks: one of them runs one without weight; accumulation and
# recomputation under shards
UNEVEN = (
    "batch.micro_batch_size=1",
    "batch.global_batch_size=3",
    "student.gradient_checkpointing=true",
)


def sets(*items: str) -> list[str]:
    return [word for item in items for word in ("--set", item)]


def torchrun(
    *words: str | Path, program: tuple[str, ...] = ("-m", "mlx_distill")
) -> subprocess.CompletedProcess:
    """`torchrun --nproc-per-node 2` of the command line, or of another program."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    return subprocess.run(
        [*launcher, *program, *map(str, words)], capture_output=True, text=True, timeout=300
    )


def mlx_launch(*words: str | Path) -> subprocess.CompletedProcess:
    """`mlx.launch -n 2` over the ring."""
    launcher = [
        SCRIPTS / "mlx.launch",
        "-n",
        "2",
        "--backend",
        "ring",
        "--",
        sys.executable,
        "-m",
        "mlx_distill",
    ]
    return subprocess.run(
        [*map(str, launcher), *map(str, words)], capture_output=True, text=True, timeout=300
    )


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_same_run(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """The same files, steps and losses, and students that differ by rounding."""
    assert files(found) == files(expected)
    for log in ("metrics.jsonl", "validation.jsonl"):
        ours, theirs = RunFolder(found).rows(log), RunFolder(expected).rows(log)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for row, other in zip(ours, theirs, strict=True):
            for name in {"loss", "ce", "grad_norm", "tokens_seen", "loss_tokens"} & other.keys():
                assert row[name] == pytest.approx(other[name], rel=tolerance), (
                    log,
                    row["step"],
                    name,
                )
    for file in ("student/model.safetensors", "checkpoints/step-000006/weights.safetensors"):
        ours, theirs = load_file(found / file), load_file(expected / file)
        assert ours.keys() == theirs.keys()
        assert max(np.abs(ours[name] - theirs[name]).max() for name in ours) < 1e-5, file


@pytest.fixture
def one_process(command_line, tiny_recipe, tmp_path):
    """The run of `mode` with `settings` on one process, for comparison."""

    def run(mode: str, *settings: str) -> Path:
        result = command_line(*arguments(tiny_recipe, tmp_path / "one", mode), *sets(*settings))
        assert result.code == 0, result.err
        return tmp_path / "one" / "tiny"

    return run


@pytest.mark.parametrize(
    "mode, settings", [("torch", UNEVEN), ("torch lora", ())], ids=["full", "lora"]
)
def test_two_torch_ranks_are_one(
    one_process, tiny_recipe, tmp_path, mode: str, settings: tuple[str, ...]
):
    result = torchrun(*arguments(tiny_recipe, tmp_path / "two", mode), *sets(*settings))
    assert result.returncode == 0, result.stderr
    assert (
        "x86_64 x 2" in result.stdout.replace("aarch64", "x86_64")
        and result.stdout.count("training 6/6") == 1
    )
    assert_same_run(tmp_path / "two" / "tiny", one_process(mode, *settings))


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_two_mlx_ranks_are_one(one_process, tiny_recipe, tmp_path, mode: str):
    settings = UNEVEN if mode == "full" else ()
    result = mlx_launch(*arguments(tiny_recipe, tmp_path / "two", mode), *sets(*settings))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("training 6/6") == 1
    assert_same_run(tmp_path / "two" / "tiny", one_process(mode, *settings))


def test_a_rank_that_dies_costs_no_checkpoint_and_fewer_ranks_continue(
    one_process, command_line, tiny_recipe, tmp_path
):
    """Untied, so that the head has shards of its own; then more ranks continue what one process
    began.
    """
    words = arguments(tiny_recipe, tmp_path / "two", "torch")
    job = {"arguments": words, "at": f"{TORCH_STUDENT}.apply", "call": 4, "rank": "1"}
    died = torchrun(json.dumps(job), program=(str(Path(__file__).parent / "kill_at.py"),))
    assert died.returncode != 0
    folder = RunFolder(tmp_path / "two" / "tiny")
    assert folder.last_state().step == 3
    assert (
        "[rank" not in died.stderr
    )  # torch's mark on the lines of a rank's traceback: only the launcher has one
    continued = command_line(*words)
    assert continued.code == 0 and "continuing after step 3" in continued.out
    assert_same_run(folder.path, one_process("torch"))


def test_more_ranks_continue(one_process, command_line, tiny_recipe, tmp_path):
    words = arguments(tiny_recipe, tmp_path / "two", "torch")
    assert command_line(*words, at=f"{TORCH_STUDENT}.apply", call=4).code == -9
    result = torchrun(*words)
    assert result.returncode == 0, result.stderr
    assert "continuing after step 3" in result.stdout
    assert_same_run(tmp_path / "two" / "tiny", one_process("torch"))


def test_a_refusal_is_one_line_and_nobody_waits(tiny_recipe, tmp_path):
    words = arguments(tiny_recipe, tmp_path / "two", "torch")
    result = torchrun(*words, *sets("optim.optimizer=lion"))
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert lines and all(
        'optim.optimizer = "lion" asked, but torch has none' in line for line in lines
    )
    assert "[rank" not in result.stderr


def test_a_rank_ends_while_its_last_sum_is_let_go():
    """Once in a few hundred runs, torch's thread takes the interpreter down with it; here always."""
    result = torchrun(program=(str(Path(__file__).parent / "ends_early.py"),))
    assert result.returncode == 0, result.stderr


def test_two_ranks_in_half_precision(one_process, tiny_recipe, tmp_path):
    """Near one process, and no nearer: norms' weights are gathered in bfloat16 too, which it reads
    in float32.
    """
    settings = (*UNEVEN, "student.compute_dtype=bfloat16")
    result = torchrun(*arguments(tiny_recipe, tmp_path / "two", "torch"), *sets(*settings))
    assert result.returncode == 0, result.stderr
    ours, theirs = (
        RunFolder(path).rows("metrics.jsonl")
        for path in (tmp_path / "two" / "tiny", one_process("torch", *settings))
    )
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-3)


@pytest.fixture
def pretended_ranks(monkeypatch):
    """A group of this process alone, which believes to be one of two."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(together, "size", lambda: 2)
    yield
    dist.destroy_process_group()


def student(tiny_recipe: Path) -> models.SplitModel:
    table = load_recipe(tiny_recipe).student
    return loading.load_student(
        Path(table.model), "student", table, 0, torch.device("cpu"), torch.bfloat16
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_gathered_in_what_they_compute_in(
    pretended_ranks, tiny_recipe, dtype: torch.dtype
):
    """Autocast would keep a cast of every block's weights from the forward pass to the backward
    pass, whole on each rank.
    """
    split, seen = student(tiny_recipe), set()
    together.shard(split, trains=True, dtype=dtype)
    weight = split.layers[0].self_attn.q_proj.weight
    split.layers[0].self_attn.q_proj.register_forward_hook(
        lambda module, *_: seen.add(module.weight.dtype)
    )
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        hidden = split.hidden(torch.arange(6)[None])
    hidden.float().sum().backward()
    assert seen == {dtype} and hidden.dtype == torch.float32  # what blocks add up stays exact
    assert weight.dtype == weight.grad.dtype == torch.float32


def test_int8_weights_stay_whole(pretended_ranks, tiny_recipe):
    split = student(tiny_recipe)
    split.model.is_loaded_in_8bit = True
    together.shard(split)
    assert not any(isinstance(parameter, DTensor) for parameter in split.model.parameters())
