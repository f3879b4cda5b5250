"""Every field of a recipe is read: change it, and something other than the saved recipe and its
digest changes.

Each field has a case: another value, and what must be set beside it for the field to matter. The
tiny pipeline runs with the companions alone and with the field on top; the two outcomes must differ
in a student's byte, a row of a log, a score, the list of files, where they lie, what the report
says beside, a generated token, or in a recorded call where a field is about speed, memory or a hub
alone.
"""

import hashlib
import importlib
import inspect
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from endings import logged, timeless
from rich.console import Console
from test_recipe import FIELDS

from mlx_distill import pipeline
from mlx_distill.backends.mlx import student as mlx_student
from mlx_distill.backends.mlx.generate import MlxModel
from mlx_distill.recipe.load import load_recipe
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.scoring import score as scoring
from mlx_distill.scoring.task_scores import TaskScores
from mlx_distill.training import loop, schedule
from mlx_distill.view import View

BASE = (
    "truncation.fraction=0.7",
    "optim.steps=1",
    "batch.global_batch_size=3",
    "data.validation_examples=2",
    "data.train_examples=8",
    "run.checkpoint_every=0",
    "run.validate_every=0",
    "eval.task=",
    "optim.schedule=constant",
    "optim.warmup_fraction=0.0",
)
SCORED = (
    "eval.task=jsonl:{root}/rows.jsonl",
    "eval.examples=2",
    "eval.max_new_tokens=3",
    "eval.score_teacher=false",
    "eval.score_base=false",
)
LORA = ("student.tuning=lora", "student.rank=2", "student.alpha=4.0")
TWICE = ("optim.steps=2",)  # what only a second step shows
OFTEN = ("optim.steps=3", "run.validate_every=1")
SAMPLED = (*SCORED, "eval.temperature=0.9", "eval.max_new_tokens=6")

CACHED = ("teacher.cache=top_k", "teacher.cache_folder={out}/answers")
DRAWN = ("teacher.cache=sampled", "teacher.cache_folder={out}/answers")
WRITES = (
    "rollouts.by=teacher",
    "rollouts.folder={out}/texts",
    "rollouts.max_new_tokens=5",
    "rollouts.samples=3",
    "truncation.span=cot",
)
PRUNED = ("prune.folder={out}/pruned", "student.model={root}/deep")
REWRITES = ("rollouts.by=student", "rollouts.max_new_tokens=5", "truncation.span=cot", *TWICE)

# (table.field, another value, companions); the shipped defaults are the first value
CASES = {
    "teacher.model": ("{root}/student", ()),
    "teacher.revision": ("v2", ("teacher.model=org/teacher",)),
    "teacher.quantize_bits": ("4", ("teacher.model={root}/wide",)),
    "teacher.compute_dtype": ("bfloat16", ()),
    "teacher.keep_answers": ("off", ("optim.steps=0", "optim.epochs=2")),
    "teacher.cache": ("sampled", CACHED),
    "teacher.cache_folder": (
        "{out}/tiny/answers",
        CACHED,
    ),  # in the run's folder, where its files are seen
    "teacher.cache_top_k": ("3", CACHED),
    "teacher.cache_samples": ("3", DRAWN),
    "student.model": ("{root}/teacher", ()),
    "student.revision": ("v2", ("student.model=org/student",)),
    "student.tuning": ("dora", LORA),
    "student.rank": ("3", LORA),
    "student.alpha": ("8.0", LORA),
    "student.lora_layers": ("1", LORA),
    "student.lora_targets": ('["q_proj"]', LORA),
    "student.gradient_checkpointing": ("true", ()),
    "student.compute_dtype": ("bfloat16", ()),
    "student.quantize_aware_bits": ("4", ("student.model={root}/wide",)),
    "student.quantize_bits": ("4", (*LORA, "student.model={root}/wide")),
    "student.save_dtype": ("bfloat16", ()),
    "data.source": ("{root}/other.jsonl", ()),
    "data.config": ("hard", ("data.source=org/rows",)),
    "data.split": ("test", ("data.source=org/rows",)),
    "data.format": ("response", ("data.source={root}/many.jsonl",)),
    "data.prompt_column": ("q", ("data.source={root}/many.jsonl",)),
    "data.cot_column": ("r", ("data.source={root}/many.jsonl",)),
    "data.answer_column": ("a", ("data.source={root}/many.jsonl",)),
    "data.response_column": (
        "response2",
        ("data.source={root}/many.jsonl", "data.format=response"),
    ),
    "data.messages_column": (
        "messages2",
        ("data.source={root}/many.jsonl", "data.format=messages"),
    ),
    "data.where": ('{{kind="odd"}}', ("data.source={root}/many.jsonl",)),
    "data.compat": ("paper", ()),
    "data.stream_rows": ("20", ("data.source=org/rows",)),
    "data.train_examples": ("5", ()),
    "data.validation_examples": ("3", ()),
    "data.longest_tokens": ("137", ()),
    "data.date": (
        "2026-01-02",
        ("student.model={root}/clock", "eval.task=", "run.validate_every=0"),
    ),
    "prune.layers": ("1", PRUNED),
    "prune.layers_by": ("change", ("prune.layers=2", *PRUNED)),
    "prune.channels": ("16", PRUNED),
    "prune.kv_heads": ("1", PRUNED),
    "prune.rounds": ("2", ("prune.channels=16", *PRUNED)),
    "prune.until": ("1.0", ("prune.channels=16", "prune.rounds=2", "optim.steps=6", *PRUNED)),
    "prune.examples": ("1", ("prune.channels=16", *PRUNED)),
    "prune.folder": ("{out}/tiny/pruned", ("prune.layers=1", *PRUNED)),
    "rollouts.by": ("student", WRITES),
    "rollouts.share": ("0.5", WRITES),
    "rollouts.samples": ("2", WRITES),
    "rollouts.temperature": ("0.0", (*WRITES[:3], WRITES[4])),
    "rollouts.top_p": ("0.5", WRITES),
    "rollouts.max_new_tokens": ("7", WRITES),
    "rollouts.batch_size": ("5", WRITES),
    "rollouts.keep": ("right", WRITES),
    "rollouts.weigh": ("pass_rate", WRITES),
    "rollouts.refresh_every": ("1", (*REWRITES, "rollouts.folder={out}/texts")),
    "rollouts.folder": ("{out}/tiny/texts", WRITES),
    "truncation.keep": ("suffix", ()),
    "truncation.span": ("cot", ()),
    "truncation.fraction": ("0.9", ()),
    "truncation.spread": ("0.5", ("truncation.fraction=0.5",)),
    "truncation.max_tokens": ("88", ()),
    "truncation.context": ("keep", ("truncation.keep=suffix",)),
    "truncation.token_share": ("0.5", ()),
    "truncation.whole_share": ("0.5", ()),
    "truncation.ending": ("answer", ()),
    "selection.share": ("0.5", ()),
    "selection.by": ("divergence", ("selection.share=0.5",)),
    "selection.redraw": ("once", ("selection.share=0.5", *TWICE)),
    "selection.position_weight": ("rising", ()),
    "objective.segments": ('["prompt"]', ()),
    "objective.divergence": ("reverse_kl", ()),
    "objective.jsd_beta": ("0.2", ("objective.divergence=jsd",)),
    "objective.skew_alpha": ("0.2", ("objective.divergence=skew_kl",)),
    "objective.mixed_weight": ("0.2", ("objective.divergence=mixed_kl",)),
    "objective.entropy_half": ("0.2", ("objective.divergence=entropy_kl",)),
    "objective.tvd_scale": ("log", ("objective.divergence=tvd",)),
    "objective.dkd_target": ("2.0", ("objective.divergence=dkd",)),
    "objective.dkd_rest": ("8.0", ("objective.divergence=dkd",)),
    "objective.hidden_weight": ("0.5", ()),
    "objective.hidden_layers": ("[1]", ("objective.hidden_weight=0.5",)),
    "objective.hidden_distance": ("cosine", ("objective.hidden_weight=0.5",)),
    "objective.kd_weight": ("0.9", ()),
    "objective.temperature": ("2.0", ()),
    "objective.temperature_scaling": ("none", ("objective.temperature=2.0",)),
    "objective.chunk_tokens": ("7", ()),
    "batch.micro_batch_size": ("1", ()),
    "batch.global_batch_size": ("4", ()),
    "batch.pad_multiple": ("5", ()),
    "batch.shuffle": ("false", TWICE),
    "batch.sort_window": ("2", TWICE),
    "optim.optimizer": ("lion", ()),
    "optim.learning_rate": ("2e-3", ()),
    "optim.schedule": ("linear", TWICE),
    "optim.warmup_fraction": ("0.5", TWICE),
    "optim.weight_decay": ("0.1", ()),
    "optim.decayed": ("all", ("optim.weight_decay=0.1",)),
    "optim.beta1": ("0.5", TWICE),
    "optim.beta2": ("0.5", TWICE),
    "optim.eps": ("1e-2", ()),
    "optim.max_grad_norm": ("0.01", ("optim.optimizer=adafactor", "optim.eps=1e-8")),
    "optim.epochs": ("2", ("optim.steps=0",)),
    "optim.steps": ("3", ()),
    "eval.task": ("jsonl:{root}/other.jsonl", SCORED),
    "eval.also": ('["jsonl:{root}/other.jsonl"]', SCORED),
    "eval.prompt": ("Q {{problem}}", SCORED),
    "eval.answer": ("anywhere", SCORED),
    "eval.examples": ("3", SCORED),
    "eval.max_new_tokens": ("5", SCORED),
    "eval.batch_size": ("1", SCORED),
    "eval.temperature": ("5.0", SCORED),
    "run.track": ('["tensorboard"]', ()),
    "optim.patience": ("1", ("optim.learning_rate=0.3", *OFTEN)),
    "eval.top_p": ("0.01", SAMPLED),
    "eval.samples": ("2", SAMPLED),
    "eval.seed": ("7", SAMPLED),
    "eval.score_teacher": ("true", SCORED),
    "eval.score_base": ("true", SCORED),
    "eval.compare": ('["{root}/neighbour"]', SCORED),
    "run.name": ("other", ()),
    "run.folder": ("{out}/other", ()),
    "run.seed": ("7", ()),
    "run.checkpoint_every": ("1", ("run.keep_checkpoints=all", *TWICE)),
    "run.validate_every": ("1", TWICE),
    "run.keep_checkpoints": ("all", OFTEN),
    "run.export": ("last", ("optim.learning_rate=0.5", *OFTEN)),
}


@pytest.fixture(scope="module")
def world(tiny_recipe, bytes_tokenizer, tmp_path_factory) -> Path:
    """The tiny world with more to choose from: a teacher wide enough to quantise, rows with twice
    the columns, a kept run.
    """
    from tiny import model_folder, rows_file

    root = tmp_path_factory.mktemp("rot")
    shutil.copytree(tiny_recipe.parent, root, dirs_exist_ok=True)
    (root / "tiny.toml").write_text(
        (root / "tiny.toml").read_text().replace(str(tiny_recipe.parent), str(root))
    )
    model_folder(root / "teacher", bytes_tokenizer("qwen2_5"), seed=1, layers=1)
    model_folder(root / "wide", bytes_tokenizer("qwen2_5"), seed=3, layers=1, width=64)
    model_folder(root / "deep", bytes_tokenizer("qwen2_5"), seed=7, layers=4)
    model_folder(root / "clock", bytes_tokenizer("clock"), seed=2)
    rows_file(root / "other.jsonl", seed=9)
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    (root / "many.jsonl").write_text(
        "".join(json.dumps(_with_more_columns(row, i)) + "\n" for i, row in enumerate(rows))
    )
    kept = root / "neighbour"
    run(
        load_recipe(
            root / "tiny.toml",
            tuple(
                s.format(root=root)
                for s in (*BASE, *SCORED, f"run.folder={root}", "run.name=neighbour")
            ),
        )
    )
    assert (kept / "eval.json").exists()
    return root


def _with_more_columns(row: dict, index: int) -> dict:
    turns = lambda mark: [  # noqa: E731
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": f"<think>{mark}{row['cot']}</think>{row['answer']}"},
    ]
    return row | {
        "q": "Q " + row["prompt"],
        "r": "R " + row["cot"],
        "a": "7" + row["answer"],
        "kind": "odd" if index % 3 else "even",
        "response": f"<think>said: {row['cot']}</think>{row['answer']}",
        "response2": f"<think>2 {row['cot']}</think>{row['answer']}",
        "messages": turns(""),
        "messages2": turns("2 "),
    }


@pytest.fixture(autouse=True)
def calls(monkeypatch, world) -> set:
    """What speed, memory and hubs are asked for, recorded; a hub model is the tiny one, a hub
    dataset the tiny rows.
    """
    asked: set = set()
    generate = importlib.import_module("mlx_lm.generate")  # mlx_lm has a function of that name
    names = list(inspect.signature(mlx_student.kd_loss).parameters)
    kd_loss, accumulate = mlx_student.kd_loss, mlx_student.MlxStudent.accumulate
    generate_ids = MlxModel.generate
    checkpoint_layers, generator = mlx_student.checkpoint_layers, generate.BatchGenerator

    def recorded_loss(*args, **kwargs):
        asked.add(("chunk_tokens", dict(zip(names, args, strict=False), **kwargs)["chunk_tokens"]))
        return kd_loss(*args, **kwargs)

    def recorded_accumulate(self, batch, *rest):
        asked.add(("shape", batch.tokens.shape))
        return accumulate(self, batch, *rest)

    def recorded_generate(*args):
        asked.add(("generated", str(texts := list(generate_ids(*args)))))
        return iter(texts)

    def recorded_generator(*args, **kwargs):
        asked.add(("generator", kwargs["completion_batch_size"]))
        return generator(*args, **kwargs)

    monkeypatch.setattr(
        "mlx_distill.reporting.page.Page.html",
        lambda page: "the page, which takes half of a tiny run's time",
    )
    monkeypatch.setattr(
        "mlx_distill.writing.write.Writing.is_right",  # random weights are never right
        lambda writing, asked, tokens: int(asked.example[:4], 16) * (asked.sample + 1) % 5 < 2,
    )
    monkeypatch.setattr(mlx_student, "kd_loss", recorded_loss)
    monkeypatch.setattr(mlx_student.MlxStudent, "accumulate", recorded_accumulate)
    monkeypatch.setattr(MlxModel, "generate", recorded_generate)
    monkeypatch.setattr(generate, "BatchGenerator", recorded_generator)
    monkeypatch.setattr(
        mlx_student,
        "checkpoint_layers",
        lambda split: asked.add("checkpointing") or checkpoint_layers(split),
    )
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, revision, **_: (
            asked.add((name, revision)) or str(world / name.removeprefix("org/"))
        ),
    )
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    monkeypatch.setitem(
        sys.modules,
        "datasets",
        SimpleNamespace(
            load_dataset=lambda name, config, split, streaming=False: (
                asked.add((name, config, split)) or (Streamed(rows) if streaming else rows)
            )
        ),
    )
    return asked


class Streamed(list):
    """Rows as `datasets` streams them."""

    def shuffle(self, seed, buffer_size):
        return self[::-1]


def run(recipe) -> RunFolder:
    return RunFolder(pipeline.run(recipe, View(Console(file=io.StringIO()))))


def outcome(world: Path, out: Path, settings: tuple[str, ...], calls: set) -> dict:
    """What a run leaves that is not its recipe, digest, name, time or memory."""
    calls.clear()
    sets = tuple(
        setting.format(root=world, out=out) for setting in (*BASE, f"run.folder={out}", *settings)
    )
    folder = run(load_recipe(world / "tiny.toml", sets))
    student = folder.student / "model.safetensors"
    return {
        "student": hashlib.sha256(student.read_bytes()).hexdigest(),
        "rows": [
            timeless(logged(folder.path, log)) for log in ("metrics.jsonl", "validation.jsonl")
        ],
        "scores": {
            part: timeless(score.content()) for part, score in folder.read(TaskScores).whole.items()
        },
        "put": (folder.read(TaskScores).prompt, folder.read(TaskScores).answer),
        "files": sorted(str(path.relative_to(folder.path)) for path in folder.path.rglob("*")),
        "folder": str(folder.path),
        "beside": "neighbour" in (folder.path / "report.md").read_text().split("## Recipe")[0],
        "calls": set(calls),
    }


def changes(
    field: str, world: Path, tmp_path: Path, calls: set, kept: dict | None = None
) -> set[str]:
    """In what the two outcomes of a field's case differ. The folder counts only for the fields that
    name it.
    """
    value, companions = CASES[field]
    kept = {} if kept is None else kept
    if companions not in kept:
        kept[companions] = outcome(world, tmp_path / "without", companions, calls)
    before = kept[companions]
    after = outcome(world, tmp_path / "with", (*companions, f"{field}={value}"), calls)
    if field not in ("run.name", "run.folder"):
        after["folder"] = before["folder"]
    elif field == "run.name":
        assert Path(after["folder"]).name == "other"
        before = before | {"folder": before["folder"].replace("without", "with")}
    else:
        assert Path(after["folder"]).parent.name == "other"
    return {part for part in before if before[part] != after[part]}


@pytest.fixture(scope="module")
def kept() -> dict:
    """companions → their outcome: many fields share it."""
    return {}


def test_every_field_has_a_case():
    alias = "student.from_teacher"  # of a student.model: tests/test_pruning.py
    assert sorted([*CASES, alias]) == sorted(f"{table}.{field}" for table, field in FIELDS)


@pytest.mark.parametrize("field", CASES)
def test_a_field_is_read(field, world, tmp_path, calls, kept):
    assert changes(field, world, tmp_path, calls, kept)


def test_the_same_recipe_twice_changes_nothing(world, tmp_path, calls):
    first, second = (outcome(world, tmp_path / name, SAMPLED, calls) for name in "ab")
    assert {part for part in first if first[part] != second[part]} == {"folder"}


@pytest.mark.parametrize(
    "field",
    ["optim.warmup_fraction", "eval.batch_size", "eval.max_new_tokens", "objective.chunk_tokens"],
)
def test_a_field_that_is_ignored_would_be_found(field, world, tmp_path, calls, monkeypatch):
    """Mutants: the program ignores one field."""
    if field == "optim.warmup_fraction":
        monkeypatch.setattr(
            loop,
            "learning_rate",
            lambda step, total, optim: schedule.learning_rate(
                step, total, optim.model_copy(update={"warmup_fraction": 0.0})
            ),
        )
    elif field == "objective.chunk_tokens":
        made = mlx_student.MlxStudent.__init__
        monkeypatch.setattr(
            mlx_student.MlxStudent,
            "__init__",
            lambda self, *rest: made(self, *rest) or setattr(self, "chunk_tokens", 16),
        )
    else:
        scored = scoring.score
        ignored = {field.split(".")[1]: 3}
        monkeypatch.setattr(
            scoring,
            "score",
            lambda model, tokenizer, task, settings, *rest: scored(
                model, tokenizer, task, settings.model_copy(update=ignored), *rest
            ),
        )
    assert not changes(field, world, tmp_path, calls)
