"""What a student says while it trains is what its exported folder scores in transformers, and what
generation on MLX computes, token by token and text beside text, is what the whole text gives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, transformers_logits
from tiny import texts

from mlx_distill.backends.mlx.backend import MlxBackend
from mlx_distill.backends.protocol import Student
from mlx_distill.backends.torch.backend import TorchBackend
from mlx_distill.data.batches import Batch, make_batch
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.objective import Objective
from mlx_distill.recipe.recipe import Recipe

STEPS = 3
RATE = 3e-3
torch.set_num_threads(1)


def recipe(tuning: str) -> Recipe:
    return Recipe.model_validate(
        {
            "student": {"model": "s", "tuning": tuning},
            "data": {"source": "rows.jsonl"},
            "objective": {"kd_weight": 0.0},
        }
    )


def a_batch() -> Batch:
    random = np.random.default_rng(2)
    lengths = (40, 33, 24)
    texts = [random.integers(3, 96, length).astype(np.int32) for length in lengths]
    rows = [
        TokenSequence(f"s{i}", text, 8, len(text) - 4, np.ones(len(text), bool))
        for i, text in enumerate(texts)
    ]
    return make_batch(rows, ("prompt", "cot", "answer"), 1)


def cross_entropy(student: Student, batch: Batch, objective: Objective) -> float:
    sums = student.score(batch, None, objective)
    return float(sums.terms["ce"].sum() / sums.tokens.sum())


def cross_entropy_of(folder: Path, batch: Batch) -> float:
    """By transformers."""
    logits = transformers_logits(folder, batch.tokens.astype(np.int64)).astype(np.float64)
    logits = logits.reshape(-1, logits.shape[-1])[batch.positions]
    logits -= logits.max(axis=-1, keepdims=True)
    chosen = logits[np.arange(len(logits)), batch.targets]
    return float((np.log(np.exp(logits).sum(axis=-1)) - chosen).mean())


@pytest.mark.parametrize("backend", [MlxBackend, TorchBackend])
@pytest.mark.parametrize(
    "name, tuning", [("llama", "full"), ("llama-yarn", "lora"), ("mistral-window", "full")]
)
def test_an_exported_student_scores_in_transformers_what_it_said(
    name: str, tuning: str, backend: type, tmp_path: Path
):
    asked = recipe(tuning)
    student = backend().load_student(FAMILIES[name].save(tmp_path / "base"), "s", asked)
    batch, objective = a_batch(), Objective(kd_weight=0.0)
    before = cross_entropy(student, batch, objective)
    for _ in range(STEPS):
        student.accumulate(batch, None, objective, float(batch.weight.sum()))
        student.apply(RATE)
    said = cross_entropy(student, batch, objective)
    assert said < before - 0.01
    student.export(tmp_path / "student", [2])
    assert cross_entropy_of(tmp_path / "student", batch) == pytest.approx(said, abs=1e-4)
    again = MlxBackend().load_student(tmp_path / "student", "s", asked)
    assert cross_entropy(again, batch, objective) == pytest.approx(said, abs=1e-4)


@pytest.mark.parametrize(
    "name",
    ["llama", "llama-dynamic", "mistral-window", "gemma2-window", "cohere2", "phi3-longrope"],
)
def test_generation_is_what_the_whole_text_gives(name: str, tmp_path: Path):
    teacher = MlxBackend().load_teacher(FAMILIES[name].save(tmp_path / name), "t")
    random = np.random.default_rng(3)
    prompts = [random.integers(3, 96, length).tolist() for length in (20, 9)]
    # llama-dynamic's angles follow the longest text of a batch
    found = texts(teacher, prompts, 8, batch_size=1 if name == "llama-dynamic" else 2)
    for prompt, new in zip(prompts, found, strict=True):
        whole = transformers_logits(tmp_path / name, np.array([[*prompt, *new]]))[0]
        assert whole[len(prompt) - 1 : -1].argmax(axis=-1).tolist() == new
