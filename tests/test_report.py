"""The report: the numbers on it are those of the files, what is missing is said, and the page needs nothing else."""

import json
import math
import random
import re
from pathlib import Path

import pytest

from mlx_distill.charts import line_chart, log_ticks, number, smoothed, thinned, ticks, Series
from mlx_distill.errors import NotFound, RunError
from mlx_distill.evaluate import Score, interval
from mlx_distill.recipe import Recipe
from mlx_distill.report import amount, duration, points, report

PARTS = ("recipe.toml", "manifest.json", "metrics.jsonl", "validation.jsonl", "eval.json", "sample.json")


def make_score(right, problems=500, unfinished=0.01, start=0):
    """A score that solves the first `right` problems, from `start` on."""
    correct = {f"p{(i + start) % problems}": [float(i < right)] for i in range(problems)}
    low, high = interval(correct.values())
    return Score(right / problems, low, high, problems, 1, correct, unfinished, 1 - unfinished - 0.002, 143.2, 21.4)


def make_recipe(name, kd_weight=0.5, compare=(), fraction=0.5):
    return Recipe.model_validate({
        "teacher": {"model": "embedded:teacher"}, "student": {"model": "embedded:student"},
        "data": {"source": "embedded:chain", "train_examples": 2000},
        "truncation": {"fraction": fraction}, "objective": {"kd_weight": kd_weight},
        "optim": {"learning_rate": 1e-3, "epochs": 2},
        "eval": {"task": "embedded:chain", "compare": compare}, "run": {"name": name},
    })


def make_sample():
    random_ = random.Random(3)
    digits = "".join(f"{a} + {b} = {a + b}; " for a, b in ((random_.randrange(90), random_.randrange(90)) for _ in range(22)))
    whole = [("prompt", t) for t in "<|user|>Start at 17 & add what follows, then <b>tell</b> me the end.<|assistant|>"]
    whole += [("cot", "<think>"), ("cot", "\n"), *[("cot", c) for c in digits], ("cot", "</think>"), ("cot", "\n")]
    whole += [("answer", c) for c in "861"] + [("answer", "<|end|>")]
    half = len(whole) // 2
    return [{"text": text, "segment": segment, "kept": i < half, "supervised": i < half and segment == "cot"}
            for i, (segment, text) in enumerate(whole)]


def write_run(folder: Path, kd_weight=0.5, student=356, compare=(), seed=0, steps=500, fraction=0.5, floor=0.2) -> Path:
    """A run folder as `run_dir.py` lays it out, with curves that look like a real run's."""
    noise = random.Random(seed)
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(make_recipe(folder.name, kd_weight, compare, fraction).toml(), encoding="utf-8")
    metrics, seen = [], 0
    for step in range(1, steps + 1):
        kd = (1.4 * math.exp(-step / 60) + floor) * noise.uniform(0.85, 1.15)
        ce = (1.6 * math.exp(-step / 70) + 1.5 * floor) * noise.uniform(0.88, 1.12)
        tokens = noise.randrange(1800, 2300)
        seen += tokens
        metrics.append({
            "step": step, "loss": kd_weight * kd + (1 - kd_weight) * ce, "kd": kd, "ce": ce, "kd_cot": kd,
            "grad_norm": 0.4, "learning_rate": 1e-3, "tokens": tokens, "tokens_seen": seen, "loss_tokens": tokens // 2,
            "seconds": 0.41, "tokens_per_second": tokens / 0.41, "active_bytes": 61_400_000, "cache_bytes": 120_000_000,
            "peak_bytes": 412_345_678 if step == 7 else 399_000_000,
        })
    validation = []
    for step in range(0, steps + 1, 50):
        near = math.exp(-step / 90)
        row = {"step": step, "kl": 1.75 * near + floor, "ce": 1.9 * near + 1.4 * floor, "agree": 0.93 - 0.5 * near}
        for part, scale in (("prompt", 1.4), ("cot", 1.0), ("answer", 0.6)):
            row |= {f"kl_{part}": row["kl"] * scale, f"ce_{part}": row["ce"] * scale, f"agree_{part}": row["agree"] ** scale,
                    f"tokens_{part}": 4000}
        validation.append(row)
    manifest = {
        "name": folder.name, "recipe_digest": "0123456789abcdef", "backend": "mlx", "device": "cpu", "dtype": "float32",
        "backend_reason": "no Metal and no CUDA here, so MLX on the CPU", "versions": {"mlx": "0.32.4", "python": "3.11.7"},
        "machine": {"system": "Linux x86_64", "cores": 2, "memory_bytes": 17179869184, "blas": "OpenBLAS 0.3.21"},
        "git_commit": "a1b2c3d", "seed": 42, "created": "2025-11-23 02:40", "elapsed_seconds": 252.4, "finished": True,
        "models": {"teacher": {"name": "embedded:teacher", "fingerprint": "9f2c41d07ab3", "parameters": 864_512},
                   "student": {"name": "embedded:student", "fingerprint": "17be0c55d2f1", "parameters": 433_152}},
        "data": {"read": 2064, "kept": 1987, "dropped": {"no supervised token": 13, "longer than longest_tokens": 64},
                 "segments": {"prompt": {"before": 180_112, "after": 180_112, "supervised": 0},
                              "cot": {"before": 402_340, "after": 124_113, "supervised": 124_113},
                              "answer": {"before": 25_998, "after": 0, "supervised": 0}}},
        "steps": steps, "flops": {"teacher": 1.8e12, "student": 2.7e12, "head": 0.4e12, "total": 4.9e12},
    }
    scores = {"teacher": make_score(487), "base": make_score(119, unfinished=0.036), "student": make_score(student)}
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "validation.jsonl", validation)
    write_json(folder / "manifest.json", manifest)
    write_json(folder / "eval.json", {"task": "embedded:chain", "scores": {key: one.to_json() for key, one in scores.items()}})
    write_json(folder / "sample.json", make_sample())
    return folder


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
