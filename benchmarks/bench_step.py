"""A training step on torch, ours beside TRL's, Liger's and the paper's formulation: same model,
batch, objective, optimizer.

    python benchmarks/bench_step.py run --model models/SmolLM2-135M-Instruct      on the CPU, 2 ×
    512 tokens python benchmarks/bench_step.py run --shape qwen3-0.6b --teacher-shape qwen3-8b
    --device cuda --dtype bfloat16 \\
        --batch 1 --tokens 4096 --rounds 1 --repetitions 5 --contender …          random weights, no
        download
    python benchmarks/bench_step.py check --model models/SmolLM2-135M-Instruct    equal losses and
    gradients? python benchmarks/bench_step.py table                                         rewrite
    the README's tables only
    python benchmarks/bench_step.py mlx run      pairs on MLX, with mlx-lm and unsloth_zoo's losses:
    pairs_mlx.py

Two parts are measured: `head`, from given hidden states to the loss and its gradients of hidden
states and head, and `step`, all of it (teacher forward, student forward, loss, backward, clipping,
AdamW). The model is a real one (benchmarks/prepare_smollm2.py makes models/SmolLM2-135M-Instruct)
or a shape of models_torch.SHAPES with random weights; the teacher is a shape, a folder or, by
default, the student's weights with noise. Objective: forward KL and cross-entropy, `--kd-weight`
and the rest, temperature 1, on the chain of thought alone: `--supervised-share` of every sequence,
after its prompt. What contenders compute: contenders_torch.py and steps_torch.py.

Each contender is a fresh process in each round, so one model is held at a time and a busy machine
is busy for all. It runs once unmeasured, then `--repetitions` times. Peak memory is over what was
held before the repetition (weights, optimizer, inputs): CUDA's counter or, on the CPU, resident
memory. Rows are appended to results/bench_step.csv. Shares are of the fastest square product
measured in the same rounds, in `--dtype`; operations are those of mlx_distill/cost/flops.py, which
counts what has to be computed: the head at supervised positions, nothing twice.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import (
    agreement,
    machines,
    models_torch,
    pairs_mlx,
    steps_table,
    steps_torch,
    workers,
)
from benchmarks import contenders_torch as losses
from benchmarks.tables import append_rows, read_rows, rewrite_section
from mlx_distill.backends import chunks
from mlx_distill.cost.flops import step_flops

FILE, CHECKS = "bench_step", "bench_step_check"
NOWHERE = "/nothing"
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
app = typer.Typer(add_completion=False)
app.add_typer(pairs_mlx.app, name="mlx")


@dataclass(frozen=True)
class Case:
    """One comparison. Folders are "" until they are made; `part` is "head" or "step"."""

    model: str
    shape: str
    teacher_model: str
    teacher_shape: str
    batch: int
    tokens: int
    prompt_tokens: int
    kd_weight: float
    chunk_tokens: int
    device: str
    dtype: str
    gradient_checkpointing: bool
    part: str = "step"
    student_folder: str = ""
    teacher_folder: str = ""

    @property
    def positions(self) -> int:
        return self.batch * (self.tokens - self.prompt_tokens)

    @property
    def config(self) -> dict:
        return models_torch.config_of(self.model, self.shape)

    @property
    def teacher_config(self) -> dict:
        named = self.teacher_model or self.teacher_shape
        return (
            models_torch.config_of(self.teacher_model, self.teacher_shape) if named else self.config
        )

    def names(self) -> dict[str, str]:
        student = Path(self.model).name if self.model else f"{self.shape}, random weights"
        teacher = (
            Path(self.teacher_model).name
            if self.teacher_model
            else f"{self.teacher_shape}, random weights"
        )
        return {
            "model": student,
            "teacher": teacher
            if self.teacher_model or self.teacher_shape
            else "the same, with noise",
        }

    def step(self):
        return models_torch.make_step(
            self.config["vocab_size"], self.batch, self.tokens, self.prompt_tokens
        )

    def flops(self) -> float:
        student, teacher = (
            models_torch.shape_of(self.config),
            models_torch.shape_of(self.teacher_config),
        )
        parts = step_flops(self.step(), teacher, student, full=True)
        return parts["head"] if self.part == "head" else sum(parts.values())

    def setting(self) -> steps_torch.Setting:
        return steps_torch.Setting(
            self.kd_weight, self.chunk_tokens, self.device, self.dtype, self.gradient_checkpointing
        )


Model = Annotated[
    str,
    typer.Option(help="a Hugging Face folder, e.g. models/SmolLM2-135M-Instruct; or give --shape"),
]
Shape = Annotated[
    str, typer.Option(help=f"random weights instead: {', '.join(models_torch.SHAPES)}")
]
TeacherModel = Annotated[
    str,
    typer.Option(help="a folder; neither it nor --teacher-shape: the student's weights with noise"),
]
Share = Annotated[
    float, typer.Option(help="of each sequence that carries loss; the rest is its prompt")
]
ChunkTokens = Annotated[
    int,
    typer.Option(
        help="ours: positions whose logits exist at once; 0: as a recipe that does not say"
    ),
]
Contenders = Annotated[
    list[str],
    typer.Option(help=f"default: {', '.join(losses.CONTENDERS)}; on CUDA also liger-triton"),
]


@app.command()
def run(
    model: Model = NOWHERE,
    shape: Shape = "",
    teacher_model: TeacherModel = "",
    teacher_shape: Shape = "",
    batch: int = 2,
    tokens: int = 512,
    supervised_share: Share = 0.8,
    kd_weight: float = 0.5,
    chunk_tokens: ChunkTokens = 0,
    device: str = "cpu",
    dtype: str = "float32",
    gradient_checkpointing: bool = False,
    part: Annotated[list[str], typer.Option(help="head, step")] = ["head", "step"],  # noqa: B006
    contender: Contenders = [],  # noqa: B006
    rounds: int = 3,
    repetitions: int = 1,
    threads: Annotated[int, typer.Option(help="0: torch's choice")] = 0,
    scratch: Annotated[
        str, typer.Option(help="keep made model folders here, for the next run")
    ] = "",
    keep: Annotated[bool, typer.Option(help="append the rows and rewrite the table")] = True,
) -> None:
    """Measure, keep the rows, rewrite the tables."""
    whole = make_case(
        model,
        shape,
        teacher_model,
        teacher_shape,
        batch,
        tokens,
        supervised_share,
        kd_weight,
        chunk_tokens,
        device,
        dtype,
        gradient_checkpointing,
    )
    contenders = contender or [
        *losses.CONTENDERS,
        *(losses.ON_CUDA_ALONE if device == "cuda" else ()),
    ]
    with tempfile.TemporaryDirectory() as temporary:
        if "step" in part:
            whole = with_folders(whole, Path(scratch or temporary))
        for p in part:
            case = replace(whole, part=p)
            rows, stopped = measure(case, contenders, rounds, repetitions, threads)
            if keep and rows:
                append_rows(FILE, rows)
                table()
            if stopped:
                raise SystemExit(130)


@app.command()
def check(
    model: Model = NOWHERE,
    shape: Shape = "",
    teacher_model: TeacherModel = "",
    teacher_shape: Shape = "",
    batch: int = 2,
    tokens: int = 64,
    supervised_share: Share = 0.8,
    kd_weight: float = 0.5,
    chunk_tokens: int = 24,
    device: str = "cpu",
    dtype: str = "float32",
    contender: Contenders = [],  # noqa: B006
    scratch: str = "",
    keep: bool = True,
) -> None:
    """Losses and every gradient of each contender against ours on one small batch, and ours against
    the definition in float64.
    """
    os.environ |= {
        "TRL_EXPERIMENTAL_SILENCE": "1",
        **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
    }
    case = make_case(
        model,
        shape,
        teacher_model,
        teacher_shape,
        batch,
        tokens,
        supervised_share,
        kd_weight,
        chunk_tokens,
        device,
        dtype,
        False,
    )
    contenders = contender or [
        *losses.CONTENDERS,
        *(losses.ON_CUDA_ALONE if device == "cuda" else ()),
    ]
    with tempfile.TemporaryDirectory() as temporary:
        case = with_folders(case, Path(scratch or temporary))
        errors = [
            *agreement.head_errors(case, contenders),
            *agreement.step_errors(case, contenders),
        ]
    facts = {
        **facts_of(),
        **case.names(),
        "kd_weight": kd_weight,
        "device": device,
        "dtype": dtype,
        "positions": case.positions,
    }
    for error in errors:
        print(error)
    if keep:
        append_rows(CHECKS, [{**facts, **error} for error in errors])
        table()
    worst = max(
        (error[key] for error in errors for key in ("loss_error", "gradient_error")),
        key=lambda e: (e != e, e),
    )  # a NaN wins
    if not worst <= TOLERANCE[dtype]:
        raise SystemExit(
            f"the contenders do not compute the same: {worst:.2g} apart, {TOLERANCE[dtype]:g} "
            "allowed"
        )


@app.command()
def table() -> None:
    """Rewrite the README's tables from the kept rows: the newest row of each combination."""
    rewrite_section("step", steps_table.render(kept(FILE), kept(CHECKS)))


@app.command(hidden=True)
def worker(contender: str, settings: str) -> None:
    """Hold the inputs or the models; for every line read, one repetition and its numbers as one
    line of JSON.
    """
    case = Case(**json.loads(settings))
    workers.serve(
        lambda: (head_repetition if case.part == "head" else step_repetition)(contender, case)
    )


def make_case(
    model: str,
    shape: str,
    teacher_model: str,
    teacher_shape: str,
    batch: int,
    tokens: int,
    share: float,
    kd_weight: float,
    chunk_tokens: int,
    device: str,
    dtype: str,
    gradient_checkpointing: bool,
) -> Case:
    if not shape and not (Path(model) / "config.json").exists():
        raise SystemExit(
            f"{model} has no config.json: give --model FOLDER or --shape "
            f"{'|'.join(models_torch.SHAPES)}"
        )
    prompt = tokens - round(share * tokens)
    if not 1 <= prompt < tokens:
        raise SystemExit(
            f"--supervised-share {share} of {tokens} tokens leaves a prompt of {prompt}: 1 to "
            f"{tokens - 1} are possible"
        )
    if not 0 < kd_weight <= 1:
        raise SystemExit(
            f"--kd-weight {kd_weight} leaves no divergence to compare: more than 0, 1 at most"
        )
    return Case(
        "" if shape else model,
        shape,
        teacher_model,
        teacher_shape,
        batch,
        tokens,
        prompt,
        kd_weight,
        chunks.chunk_tokens(chunk_tokens, "torch", device),
        device,
        dtype,
        gradient_checkpointing,
    )


def with_folders(case: Case, scratch: Path) -> Case:
    """The models of a case on disk, made in `scratch` where they are not there."""
    student = models_torch.student_folder(case.model, case.shape, scratch, case.device, case.dtype)
    made = (
        models_torch.teacher_folder(student, case.teacher_shape, scratch, case.device, case.dtype)
        if not case.teacher_model
        else ""
    )
    return replace(
        case, student_folder=str(student), teacher_folder=str(made or case.teacher_model)
    )


def measure(
    case: Case, contenders: list[str], rounds: int, repetitions: int, threads: int
) -> tuple[list[dict[str, object]], bool]:
    """One row a contender, medians over all rounds; one that fails (memory) gets a row that says
    so. And whether it was stopped by Ctrl-C: then those have rows that were measured before.
    """
    names = [*contenders, *(["matmuls"] if case.part == "head" else [])]
    found, stopped = workers.in_rounds(
        names, rounds, lambda name, into: attempt(case, name, repetitions, threads, into)
    )
    facts = {**facts_of(), **place_of(found.values(), threads)}
    rows = [{**facts, **row_of(case, name, numbers)} for name, numbers in found.items()]
    shown = (
        "part",
        "contender",
        "seconds_median",
        "cpu_seconds_min",
        "tokens_per_second",
        "peak_bytes",
        "held_bytes",
        "loss",
        "grad_norm",
    )
    for row in rows:
        print({key: row[key] for key in shown}, flush=True)
    report_differences(rows, TOLERANCE[case.dtype])
    return rows, stopped


def attempt(
    case: Case, name: str, repetitions: int, threads: int, found: list[workers.Numbers]
) -> bool:
    """One round of one contender in a fresh process."""
    needed = losses.bytes_needed(
        name,
        case.batch * case.tokens if case.part == "step" else case.positions,
        case.config["vocab_size"],
    )
    if case.device == "cpu" and needed > 0.8 * machines.available_bytes():
        return False
    process = workers.start(
        __file__, [name, json.dumps(asdict(case))], threads, hide_gpu=case.device == "cpu"
    )
    try:
        found.extend(workers.ask(process) for _ in range(repetitions))
    except RuntimeError as error:
        print(f"{case.part} {name}: {str(error).rsplit(' ended ', 1)[-1]}, no row", file=sys.stderr)
        return False
    finally:
        workers.stop(process)
    return True


def place_of(found: Iterable[list[workers.Numbers]], threads: int) -> dict[str, object]:
    """Where the workers ran, as they said themselves."""
    said = next((numbers[-1] for numbers in found if numbers), {})
    return {"device_name": said.get("device_name", ""), "threads": said.get("threads", threads)}


def row_of(case: Case, name: str, found: list[workers.Numbers]) -> dict[str, object]:
    summary, last = workers.summary(found), found[-1] if found else {}
    seconds = summary["seconds_median"] if case.part == "step" else ""
    return {
        "device": case.device,
        **case.names(),
        "part": case.part,
        "contender": name,
        "batch": case.batch,
        "tokens": case.tokens,
        "positions": case.positions,
        "kd_weight": case.kd_weight,
        "dtype": case.dtype,
        "gradient_checkpointing": case.gradient_checkpointing,
        "chunk_tokens": case.chunk_tokens if name == "ours" else 0,
        **summary,
        "held_bytes": last.get("held_bytes", ""),
        "grad_norm": last.get("grad_norm", ""),
        "tokens_per_second": round(case.batch * case.tokens / seconds, 1) if seconds else "",
        "flops": case.flops(),
        "matmul_flops_per_second": max((r["matmul_flops"] for r in found), default=""),
    }


def facts_of() -> dict[str, object]:
    return {
        **machines.facts("mlx_distill/backends/torch"),
        **machines.versions("torch", "transformers", "trl", "liger-kernel"),
    }


def report_differences(rows: list[dict[str, object]], tolerance: float) -> None:
    """Say on stderr whose loss or gradient norm, at the first weights, is not that of ours."""
    reference = next(
        (row for row in rows if row["contender"] == "ours" and row["loss"] != ""), None
    )
    for row in rows:
        if reference is None or row["loss"] == "" or row["contender"] == "matmuls":
            continue
        error = max(
            agreement.apart(row["loss"], reference["loss"]),
            abs(row["grad_norm"] / reference["grad_norm"] - 1),
        )
        if not error <= tolerance:
            print(
                f"{row['part']} {row['contender']}: {error:.2g} from ours, more than {tolerance:g}",
                file=sys.stderr,
            )


def head_repetition(contender: str, case: Case) -> Callable[[], workers.Numbers]:
    widths = case.config["hidden_size"], case.teacher_config["hidden_size"]
    return losses.repetition(
        contender,
        case.positions,
        case.config["vocab_size"],
        widths,
        True,
        case.chunk_tokens,
        case.kd_weight,
        case.device,
        case.dtype,
    )


def step_repetition(contender: str, case: Case) -> Callable[[], workers.Numbers]:
    """Hold the models; a repetition is one optimizer step. The first was run, unmeasured; its loss
    and norm are what is reported.
    """
    trainer = steps_torch.load(
        contender, Path(case.student_folder), Path(case.teacher_folder), case.step(), case.setting()
    )
    loss, norm = trainer.accumulate(), trainer.apply()

    def step() -> float:
        trainer.accumulate()
        trainer.apply()
        return loss

    return lambda: {**losses.measured(step, case.device, case.dtype), "grad_norm": norm}


def kept(name: str) -> list[dict[str, str]]:
    try:
        return read_rows(name)
    except FileNotFoundError:
        return []


if __name__ == "__main__":
    app()
