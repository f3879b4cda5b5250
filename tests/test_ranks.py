"""Several processes train one student: the same run as one process makes, and what happens when one
of them dies.

Two real processes on the CPU: torch's over gloo with FSDP2, MLX's over its ring. Where the launcher
is not the point they are forks with the variables that it would set, for it costs seconds.
"""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from endings import TORCH_STUDENT, arguments, logged
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


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def two_torch_ranks(command_line):
    """The command line twice, as `torchrun --nproc-per-node 2` starts it."""

    def run(*words: str | Path):
        (port,) = free_ports(1)
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [group | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        return command_line(*words, environments=ranks)

    return run


@pytest.fixture
def two_mlx_ranks(command_line, tmp_path):
    """The command line twice, as `mlx.launch -n 2 --backend ring` starts it."""

    def run(*words: str | Path):
        hosts = tmp_path / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
        ranks = [{"MLX_RANK": rank, "MLX_HOSTFILE": str(hosts)} for rank in "01"]
        return command_line(*words, environments=ranks)

    return run


def launched(*words: str | Path) -> SimpleNamespace:
    result = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=300)
    return SimpleNamespace(code=result.returncode, out=result.stdout, err=result.stderr)


def torchrun(*words: str | Path) -> SimpleNamespace:
    """`torchrun --nproc-per-node 2` of a program."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return launched(sys.executable, *launcher, *words)


def mlx_launch(*words: str | Path) -> SimpleNamespace:
    """`mlx.launch -n 2` of the command line over the ring."""
    launcher = (SCRIPTS / "mlx.launch", "-n", "2", "--backend", "ring", "--")
    return launched(*launcher, sys.executable, "-m", "mlx_distill", *words)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_same_run(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """The same files, steps and losses, and students that differ by rounding."""
    assert files(found) == files(expected)
    for log in ("metrics.jsonl", "validation.jsonl"):
        ours, theirs = logged(found, log), logged(expected, log)
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
def one_process(command_line, whole_run, tiny_recipe, tmp_path):
    """The run of `mode` with `settings` on one process, for comparison."""

    def run(mode: str, *settings: str) -> Path:
        if not settings:
            return whole_run(mode)
        result = command_line(*arguments(tiny_recipe, tmp_path / "one", mode), *sets(*settings))
        assert result.code == 0, result.err
        return tmp_path / "one" / "tiny"

    return run


@pytest.mark.parametrize(
    "mode, settings", [("torch", UNEVEN), ("torch lora", ())], ids=["full", "lora"]
)
def test_two_torch_ranks_are_one(
    one_process, two_torch_ranks, tiny_recipe, tmp_path, mode: str, settings: tuple[str, ...]
):
    result = two_torch_ranks(*arguments(tiny_recipe, tmp_path / "two", mode), *sets(*settings))
    assert result.code == 0, result.err
    assert (
        "x86_64 x 2" in result.out.replace("aarch64", "x86_64")
        and result.out.count("training 6/6") == 1
    )
    assert_same_run(tmp_path / "two" / "tiny", one_process(mode, *settings))


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_two_mlx_ranks_are_one(one_process, two_mlx_ranks, tiny_recipe, tmp_path, mode: str):
    launch, settings = (mlx_launch, UNEVEN) if mode == "full" else (two_mlx_ranks, ())
    result = launch(*arguments(tiny_recipe, tmp_path / "two", mode), *sets(*settings))
    assert result.code == 0, result.err
    assert result.out.count("training 6/6") == 1
    assert_same_run(tmp_path / "two" / "tiny", one_process(mode, *settings))


def test_a_rank_that_dies_costs_no_checkpoint_and_fewer_ranks_continue(
    one_process, command_line, tiny_recipe, tmp_path
):
    """The launcher ends the other; its own traceback is the only one, for torch marks the lines of
    a rank's.
    """
    words = arguments(tiny_recipe, tmp_path / "two", "torch")
    job = {"arguments": words, "at": f"{TORCH_STUDENT}.apply", "call": 4, "rank": "1"}
    died = torchrun(Path(__file__).parent / "kill_at.py", json.dumps(job))
    assert died.code != 0
    folder = RunFolder(tmp_path / "two" / "tiny")
    assert folder.last_state().step == 3
    assert "[rank" not in died.err
    continued = command_line(*words)
    assert continued.code == 0 and "continuing after step 3" in continued.out
    assert_same_run(folder.path, one_process("torch"))


def test_more_ranks_continue(one_process, two_torch_ranks, command_line, tiny_recipe, tmp_path):
    words = arguments(tiny_recipe, tmp_path / "two", "torch")
    assert command_line(*words, at=f"{TORCH_STUDENT}.apply", call=4).code == -9
    result = two_torch_ranks(*words)
    assert result.code == 0, result.err
    assert "continuing after step 3" in result.out
    assert_same_run(tmp_path / "two" / "tiny", one_process("torch"))


def test_a_refusal_is_one_line_and_nobody_waits(two_torch_ranks, tiny_recipe, tmp_path):
    words = arguments(tiny_recipe, tmp_path / "two", "torch")
    result = two_torch_ranks(*words, *sets("optim.optimizer=lion"))
    assert result.code == 2
    lines = result.err.splitlines()
    assert lines and all(
        line.startswith("error") and 'optim.optimizer = "lion" asked, but torch has none' in line
        for line in lines
    )


def test_ranks_do_not_write_as_they_learn(two_mlx_ranks, tiny_recipe, tmp_path):
    """Each of them would append its texts to the one file of the run."""
    student = ["rollouts.by=student", "rollouts.refresh_every=1", "teacher.cache=off"]
    words = arguments(tiny_recipe, tmp_path)
    result = two_mlx_ranks(*words, *sets(*student, "objective.kd_weight=1.0"))
    assert result.code == 2
    assert "texts are written by one process, here are 2: start the run without" in result.err
    assert not list(tmp_path.rglob("rollouts.jsonl"))


def test_a_rank_ends_while_its_last_sum_is_let_go():
    """Once in a few hundred runs, torch's thread takes the interpreter down with it; here always."""
    program = [sys.executable, Path(__file__).parent / "ends_early.py"]
    several = os.environ | {"WORLD_SIZE": "2"}
    result = subprocess.run(program, env=several, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_two_ranks_in_half_precision(one_process, two_torch_ranks, tiny_recipe, tmp_path):
    """Near one process, and no nearer: norms' weights are gathered in bfloat16 too, which it reads
    in float32.
    """
    settings = (*UNEVEN, "student.compute_dtype=bfloat16")
    result = two_torch_ranks(*arguments(tiny_recipe, tmp_path / "two", "torch"), *sets(*settings))
    assert result.code == 0, result.err
    ours, theirs = (
        logged(path, "metrics.jsonl")
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


def student(
    tiny_recipe: Path, dtype: torch.dtype = torch.bfloat16, *settings: str
) -> models.SplitModel:
    table = load_recipe(tiny_recipe, settings).student
    return loading.load_student(Path(table.model), "student", table, 0, torch.device("cpu"), dtype)


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


def test_what_bitsandbytes_packed_stays_whole(pretended_ranks, tiny_recipe):
    """Its scales belong to the parameter that sharding would replace."""
    settings = "student.tuning=lora", "student.quantize_bits=nf4"
    split, alone = (student(tiny_recipe, torch.float32, *settings) for _ in range(2))
    together.shard(split, trains=True)
    sharded = {
        name for name, parameter in split.model.named_parameters() if isinstance(parameter, DTensor)
    }
    assert sharded and not any("_proj" in name for name in sharded)
    tokens, found = torch.arange(6)[None], []
    for one in (split, alone):
        hidden = one.hidden(tokens)
        hidden.float().square().sum().backward()
        moved = one.model.get_parameter("model.layers.0.mlp.up_proj.lora_B.default.weight")
        found.append((together.whole(hidden), moved.grad))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert found[0][1].abs().max() > 0
