"""Do the contenders of bench_step.py compute the same? Losses and every element of the gradients,
on one small batch.
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import contenders_torch as losses
from benchmarks import steps_torch
from mlx_distill import objective as definition

if TYPE_CHECKING:
    from benchmarks.bench_step import Case


def head_errors(case: "Case", contenders: list[str]) -> list[dict[str, object]]:
    """Each contender's loss and gradients, given hidden states, against the definition in float64."""
    widths = case.config["hidden_size"], case.teacher_config["hidden_size"]
    x = losses.random_inputs(
        case.positions, case.config["vocab_size"], widths, True, case.device, case.dtype
    )
    hidden, weight, teacher, teacher_weight = (
        tensor.detach().float().cpu().numpy().astype(np.float64) for tensor in x[:4]
    )
    targets, wanted = x.labels.cpu().numpy(), definition.Objective(kd_weight=case.kd_weight)
    logits, teacher_logits = hidden @ weight.T, teacher @ teacher_weight.T
    slope = definition.grad(logits, teacher_logits, targets, wanted) / len(targets)
    expected = (
        definition.loss(logits, teacher_logits, targets, wanted).mean(),
        (slope @ weight, slope.T @ hidden),
    )
    errors = []
    for name in contenders:
        loss, *gradients = losses.value_and_gradients(name, x, case.kd_weight, case.chunk_tokens)
        pairs = zip(expected[1], (g.float().cpu().numpy() for g in gradients), strict=True)
        gradient_error = max(
            float(np.abs(want - got).max() / np.abs(want).max()) for want, got in pairs
        )
        errors.append(
            error_row("head", name, "definition", float(loss), float(expected[0]), gradient_error)
        )
    return errors


def step_errors(case: "Case", contenders: list[str]) -> list[dict[str, object]]:
    """Each contender's loss and gradients of all weights against ours, relative to each tensor's
    largest.
    """
    errors, reference = [], None
    for name in ["ours", *(c for c in contenders if c != "ours")]:
        trainer = steps_torch.load(
            name, Path(case.student_folder), Path(case.teacher_folder), case.step(), case.setting()
        )
        started = time.perf_counter()
        loss = trainer.accumulate()
        gradients = {key: value.detach().clone() for key, value in trainer.gradients().items()}
        print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr)
        del trainer
        if reference is None:
            reference = loss, gradients
            continue
        if gradients.keys() != reference[1].keys():
            raise SystemExit(
                f"{name} trains other weights than ours: "
                f"{sorted(gradients.keys() ^ reference[1].keys())[:3]}"
            )
        error = max(
            float((value - gradients[key]).abs().max() / value.abs().max())
            for key, value in reference[1].items()
        )
        errors.append(error_row("step", name, "ours", loss, reference[0], error))
    return errors


def apart(value: float, expected: float) -> float:
    """Relative difference; absolute below 1, where a divergence may be next to nothing."""
    return abs(value - expected) / max(abs(expected), 1.0)


def error_row(
    part: str, name: str, against: str, loss: float, expected: float, gradient_error: float
) -> dict[str, object]:
    return {
        "part": part,
        "contender": name,
        "against": against,
        "loss": loss,
        "loss_error": apart(loss, expected),
        "gradient_error": gradient_error,
    }
