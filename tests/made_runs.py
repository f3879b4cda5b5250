"""Run folders for the pages' tests: a real run's manifest and settings, with the numbers of a
longer one.
"""

import math
import random
import shutil
from pathlib import Path

from mlx_distill.recipe.recipe import Recipe
from mlx_distill.runs.logs import kept_digests
from mlx_distill.runs.manifest import Manifest
from mlx_distill.runs.rows import MetricsRow, ValidationRow
from mlx_distill.runs.sample import Sample, SampleToken
from mlx_distill.runs.small_files import SmallFiles
from mlx_distill.scoring.intervals import interval
from mlx_distill.scoring.score import Score
from mlx_distill.scoring.task_scores import TaskScores

PARTS = (
    "recipe.toml",
    "manifest.json",
    "metrics.jsonl",
    "validation.jsonl",
    "eval.json",
    "sample.json",
)


def make_score(right, problems=500, unfinished=0.01):
    """A score that solves the first `right` problems."""
    correct = {f"p{i}": [float(i < right)] for i in range(problems)}
    low, high = interval(correct.values())
    return Score(
        accuracy=right / problems,
        low=low,
        high=high,
        problems=problems,
        samples=1,
        correct=correct,
        unfinished=unfinished,
        well_formed=1 - unfinished - 0.002,
        mean_tokens=143.2,
        seconds=21.4,
    )


def make_recipe(name, kd_weight=0.5, compare=(), fraction=0.5):
    return Recipe.model_validate(
        {
            "teacher": {"model": "embedded:teacher"},
            "student": {"model": "embedded:student"},
            "data": {"source": "embedded:chain", "train_examples": 2000},
            "truncation": {"fraction": fraction},
            "objective": {"kd_weight": kd_weight},
            "optim": {"learning_rate": 1e-3, "epochs": 2},
            "eval": {"task": "embedded:chain", "compare": compare},
            "run": {"name": name},
        }
    )


def make_tokens():
    """<prompt><cot> cut in its middle, with what HTML would take for its own."""
    random_ = random.Random(3)
    sums = ((random_.randrange(90), random_.randrange(90)) for _ in range(22))
    digits = "".join(f"{a} + {b} = {a + b}; " for a, b in sums)
    asked = "<|user|>Start at 17 & add what follows, then <b>tell</b> me the end.<|assistant|>"
    whole = [("prompt", letter) for letter in asked]
    whole += [("cot", text) for text in ("<think>", "\n", *digits, "</think>", "\n")]
    whole += [("answer", text) for text in (*"861", "<|end|>")]
    half = len(whole) // 2
    return [
        SampleToken(
            text=text, segment=segment, kept=i < half, supervised=i < half and segment == "cot"
        )
        for i, (segment, text) in enumerate(whole)
    ]


def make_metrics(steps, kd_weight, floor, noise):
    """Curves that look like those of a run that takes longer than a test may."""
    seen = 0
    for step in range(1, steps + 1):
        kd = (1.4 * math.exp(-step / 60) + floor) * noise.uniform(0.85, 1.15)
        ce = (1.6 * math.exp(-step / 70) + 1.5 * floor) * noise.uniform(0.88, 1.12)
        tokens = noise.randrange(1800, 2300)
        seen += tokens
        yield MetricsRow(
            step=step,
            loss=kd_weight * kd + (1 - kd_weight) * ce,
            kd=kd,
            ce=ce,
            kd_cot=kd,
            grad_norm=0.4,
            learning_rate=1e-3,
            tokens=tokens,
            tokens_seen=seen,
            loss_tokens=tokens // 2,
            seconds=0.41,
            tokens_per_second=tokens / 0.41,
            active_bytes=61_400_000,
            cache_bytes=120_000_000,
            footprint_bytes=181_000_000,
            peak_bytes=412_345_678 if step == 7 else 399_000_000,
        )


def make_validation(steps, floor):
    for step in range(0, steps + 1, 50):
        near = math.exp(-step / 90)
        terms = {
            "kl": 1.75 * near + floor,
            "ce": 1.9 * near + 1.4 * floor,
            "agree": 0.93 - 0.5 * near,
        }
        for part, scale in (("prompt", 1.4), ("cot", 1.0), ("answer", 0.6)):
            terms |= {
                f"kl_{part}": terms["kl"] * scale,
                f"ce_{part}": terms["ce"] * scale,
                f"agree_{part}": terms["agree"] ** scale,
                f"tokens_{part}": 4000.0,
            }
        yield ValidationRow(step=step, **terms)


def write_run(
    real: Path,
    folder: Path,
    kd_weight=0.5,
    student=356,
    compare=(),
    seed=0,
    steps=500,
    fraction=0.5,
    floor=0.2,
) -> Path:
    """A run folder made from a `real` one."""
    folder.mkdir(parents=True)
    kept, files = SmallFiles(real), SmallFiles(folder)
    files.write_text("recipe.toml", make_recipe(folder.name, kd_weight, compare, fraction).toml())
    for row in make_metrics(steps, kd_weight, floor, random.Random(seed)):
        files.append(row)
    for row in make_validation(steps, floor):
        files.append(row)
    made = kept.read(Manifest)
    unused = {"column source": 2064, "key name": 1}
    longer = {
        "name": folder.name,
        "steps": steps,
        "exported_step": max(0, steps - 50),
        "elapsed_seconds": 252.4,
        "flops": {"teacher": 1.8e12, "student": 2.7e12, "head": 0.4e12, "total": 4.9e12},
        "logs": kept_digests(folder),
        "data": made.data.model_copy(update={"not_used": unused}),
    }
    files.write(made.model_copy(update=longer))
    scores = {
        "teacher": make_score(487),
        "base": make_score(119, unfinished=0.036),
        "student": make_score(student),
    }
    shutil.copy(real / "generations.jsonl", folder)
    scored = kept.read(TaskScores)
    files.write(scored.model_copy(update={"task": "embedded:chain", "scores": scores}))
    files.write(Sample(tokens=make_tokens()))
    return folder
