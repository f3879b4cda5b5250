"""A run that was stopped anywhere and started again ends as one that was never stopped, to the bit
on a CPU.
"""

import subprocess
import sys

import pytest
from endings import STUDENT, TORCH_STUDENT, arguments, assert_same, ending, logged

from mlx_distill.runs.manifest import Manifest
from mlx_distill.runs.run_folder import RunFolder

RUN = "mlx_distill.runs.run_folder:RunFolder"
PRUNE = "mlx_distill.runs.checkpoints:Checkpoints.prune"
# 6 steps of 2 micro-batches; checkpoints after 2, 3 (validated, improved), 4, 6; validation (2
# batches) before 1, after 3 and 6
KILLS = {
    "in a step": dict(at=f"{STUDENT}.accumulate", call=6, when="after"),
    "before the weights change": dict(at=f"{STUDENT}.apply", call=4),
    "after the weights changed": dict(at=f"{STUDENT}.apply", call=5, when="after"),
    "in the first validation": dict(at=f"{STUDENT}.score", call=2),
    "in a validation": dict(at=f"{STUDENT}.score", call=4),
    "between a validation and its checkpoint": dict(at=f"{RUN}.append", call=5, when="after"),
    "between a checkpoint's files": dict(at="mlx.core:save_safetensors", call=6),
    "before a checkpoint's rename": dict(
        at="mlx_distill.files:flush_to_disk", call=3, when="after"
    ),
    "between rename and prune": dict(at=PRUNE, call=2),
    "between the last rename and prune": dict(at=PRUNE, call=4),
    "in a prune": dict(at="os:unlink", call=2),
    "between an export's files": dict(at="mlx.core:save_safetensors", call=9),
    "after the export": dict(at=f"{RUN}.write_student", when="after"),
    "while generating": dict(at="mlx_distill.view:Counter.__call__", call=6),
    "between two models": dict(at="mlx_distill.backends.mlx.backend:MlxBackend.release", call=1),
    "before the report": dict(at="mlx_distill.pipeline:report"),
}


def test_two_runs_of_one_recipe_are_equal_and_the_other_mode_differs(
    run_tiny, never_stopped, tmp_path
):
    assert run_tiny().code == 0
    assert_same(tmp_path / "tiny", never_stopped("full"))
    assert (
        never_stopped("full")["student/model.safetensors"]
        != never_stopped("lora")["student/model.safetensors"]
    )


@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS)
def test_a_killed_run_ends_as_one_never_stopped(run_tiny, never_stopped, tmp_path, kill):
    assert run_tiny(**kill).code == -9
    result = run_tiny()
    assert result.code == 0, result.err
    assert_same(tmp_path / "tiny", never_stopped("full"))


def test_lora_on_a_share_of_tokens_killed_everywhere_in_turn(run_tiny, never_stopped, tmp_path):
    step, save, score = f"{STUDENT}.accumulate", "mlx.core:save_safetensors", f"{STUDENT}.score"
    for kill in (
        dict(at=step, call=2),
        dict(at=save, call=2),
        dict(at=step, call=6),
        dict(at=score, call=1),
        dict(at=PRUNE, call=2),
        dict(at=f"{STUDENT}.apply", call=1, when="after"),
        dict(at=save, call=1, when="after"),
        dict(at=save, call=4),
        dict(at="mlx_distill.backends.mlx.student:write_adapters"),
        dict(at="mlx_distill.view:Counter.__call__", call=6),
    ):
        assert run_tiny("lora", **kill).code == -9, kill
    assert run_tiny("lora").code == 0
    assert_same(tmp_path / "tiny", never_stopped("lora"))


@pytest.mark.parametrize("mode", ["torch", "torch nf4"])
def test_a_run_on_torch_killed_in_turn(run_tiny, never_stopped, tmp_path, mode):
    save = "mlx_distill.backends.torch.student:save_file"
    for kill in (
        dict(at=f"{TORCH_STUDENT}.accumulate", call=4),
        dict(at=save, call=2),
        dict(at=f"{TORCH_STUDENT}.apply", call=1, when="after"),
        dict(at="mlx_distill.backends.torch.weights:save_file"),
        dict(at="mlx_distill.view:Counter.__call__", call=2),
    ):
        assert run_tiny(mode, **kill).code == -9, kill
    assert run_tiny(mode).code == 0
    assert_same(tmp_path / "tiny", never_stopped(mode))


@pytest.mark.parametrize("mode", ["patience", "torch patience"])
def test_a_run_out_of_patience_ends_there_after_kills_too(run_tiny, never_stopped, tmp_path, mode):
    expected = never_stopped(mode)
    assert [row["step"] for row in expected["validation.jsonl"]] == [0, 1, 2, 3]
    assert expected["manifest.json"]["trained_steps"] == 3
    student = TORCH_STUDENT if mode.startswith("torch") else STUDENT
    for kill in (
        dict(at=f"{student}.apply", call=2, when="after"),
        dict(at=f"{RUN}.append", call=3, when="after"),  # a validation, before its checkpoint
        dict(at=f"{RUN}.write_student"),
    ):
        assert run_tiny(mode, **kill).code == -9, kill
    result = run_tiny(mode)
    assert result.code == 0, result.err
    said = "training ends after step 3 of 6: validation was best after step 1 (optim.patience = 2)"
    assert said in result.out
    assert ending(tmp_path / "tiny") == expected


@pytest.mark.parametrize(
    "first, second", [("full", "torch"), ("torch", "full"), ("lora", "torch lora")]
)
def test_a_run_moves_to_the_other_backend(run_tiny, never_stopped, tmp_path, first, second):
    student = TORCH_STUDENT if first.startswith("torch") else STUDENT
    assert run_tiny(first, at=f"{student}.apply", call=4).code == -9
    moved = run_tiny(second)
    assert moved.code == 0, moved.err
    assert "continuing after step 3" in moved.out
    folder = RunFolder(tmp_path / "tiny")
    begun = ["torch" if mode.startswith("torch") else "mlx" for mode in (first, second)]
    assert [start.backend for start in folder.read(Manifest).starts] == begun
    for found, expected in zip(
        logged(folder.path, "metrics.jsonl"), never_stopped(second)["metrics.jsonl"], strict=True
    ):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def test_a_killed_fresh_start_is_gone_on_with(
    run_tiny, tiny_recipe, command_line, never_stopped, tmp_path
):
    assert run_tiny("lora").code == 0
    words = [*arguments(tiny_recipe, tmp_path, "full"), "--fresh"]
    for place in (
        "mlx_distill.runs.own_files:remove_named",
        "mlx_distill.runs.checkpoints:Checkpoints.remove_all",
    ):
        assert command_line(*words, at=place, when="after").code == -9
    assert run_tiny().code == 0
    assert_same(tmp_path / "tiny", never_stopped("full"))


def test_the_plain_command_continues_a_killed_process(
    run_tiny, tiny_recipe, never_stopped, tmp_path
):
    assert run_tiny(**KILLS["between a checkpoint's files"]).code == -9
    words = arguments(tiny_recipe, tmp_path)
    result = subprocess.run(
        [sys.executable, "-m", "mlx_distill", *words], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "continuing after step 3" in result.stdout
    assert_same(tmp_path / "tiny", never_stopped("full"))


@pytest.mark.parametrize("step", [5, 6], ids=["in between", "in the last step"])
def test_ctrl_c_saves_says_where_and_the_same_command_continues(
    run_tiny, never_stopped, tmp_path, step
):
    stopped = run_tiny(at=f"{STUDENT}.apply", call=step, signals=["INT"])
    assert stopped.code == 130
    assert (
        f"stopped; saved at step {step} in {tmp_path / 'tiny'}. The same command continues."
        in stopped.out
    )
    assert not stopped.err.strip()
    assert RunFolder(tmp_path / "tiny").last_state().step == step
    assert not (tmp_path / "tiny" / "student").exists()
    assert run_tiny().code == 0
    assert_same(tmp_path / "tiny", never_stopped("full"))


@pytest.mark.parametrize(
    "stop",
    [
        dict(at=f"{STUDENT}.apply", call=5, signals=["INT", "INT"]),
        dict(at="mlx_distill.view:Counter.__call__", call=6, signals=["INT"]),
    ],
    ids=["twice in a step", "while scoring"],
)
def test_ctrl_c_that_cannot_save_stops_at_once_and_the_same_command_continues(
    run_tiny, never_stopped, tmp_path, stop
):
    stopped = run_tiny(**stop)
    assert stopped.code == 130
    assert "stopped. The same command continues" in stopped.out
    assert "Traceback" not in stopped.out + stopped.err
    assert run_tiny().code == 0
    assert_same(tmp_path / "tiny", never_stopped("full"))


def test_a_finished_run_only_writes_its_report_again(run_tiny, tmp_path):
    assert run_tiny().code == 0
    folder = tmp_path / "tiny"
    before = {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".md", ".html")
    }
    (folder / "report.html").unlink()
    for place in (f"{STUDENT}.__init__", "mlx_distill.backends.mlx.teacher:MlxTeacher.__init__"):
        assert run_tiny(at=place).code == 0, "a model was loaded"
    assert (folder / "report.html").is_file()
    assert {path: path.read_bytes() for path in before} == before
    for name in ("metrics.jsonl", "generations.jsonl"):
        (folder / name).write_text(
            (folder / name).read_text().replace('"seconds": 0', '"seconds": 1')
        )
        assert f"note: {folder / name} is damaged" in run_tiny().out


def test_a_torn_last_line_of_the_log_is_cut(run_tiny, never_stopped, tmp_path):
    assert run_tiny(at=f"{STUDENT}.apply", call=4).code == -9
    with (tmp_path / "tiny" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 4, "lo')
    assert run_tiny().code == 0
    assert_same(tmp_path / "tiny", never_stopped("full"))


def test_elapsed_time_adds_up_over_a_stop(run_tiny, tmp_path):
    run_tiny(at=f"{STUDENT}.apply", call=4)
    run_tiny()
    folder = RunFolder(tmp_path / "tiny")
    spent = sum(
        row["seconds"]
        for log in ("metrics.jsonl", "validation.jsonl")
        for row in logged(folder.path, log)
    )
    assert folder.read(Manifest).elapsed_seconds >= spent - 1e-9


def test_a_second_process_is_refused_and_touches_nothing(
    run_tiny, tiny_recipe, command_line, tmp_path
):
    run_tiny(at=f"{STUDENT}.apply", call=4)
    folder = tmp_path / "tiny"
    before = sorted(folder.rglob("*"))
    with RunFolder(folder).locked():
        for words in ([], ["--fresh"]):
            second = command_line(*arguments(tiny_recipe, tmp_path), *words)
            assert second.code == 2
            assert second.err.splitlines() == [
                f"error: {folder} is in use by another mlx-distill process: wait for it or choose "
                "another run.name"
            ]
    assert sorted(folder.rglob("*")) == before
