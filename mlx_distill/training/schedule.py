"""The learning rate of each step, in plain Python: the same numbers on every backend."""

import math

from mlx_distill.recipe.training_tables import OptimTable

START_DIVISOR = (
    25.0  # one_cycle: the first rate is the peak / 25, as torch.optim.lr_scheduler.OneCycleLR
)
END_DIVISOR = 1e4  # one_cycle: the last rate is the first / 1e4, likewise


def learning_rate(step: int, total_steps: int, optim: OptimTable) -> float:
    """Rate of step `step` (0-based) of `total_steps`; the peak is `optim.learning_rate`.

    one_cycle: cosine from peak/25 up to the peak over the warm-up, cosine down to peak/25e4
    (OneCycleLR's phases). cosine, linear: linear warm-up from peak/warm-up steps, then down to 0
    after the last step. constant: warm-up, then flat.
    """
    peak = optim.learning_rate
    if optim.schedule == "one_cycle":
        return _one_cycle(step, total_steps, peak, optim.warmup_fraction)
    warmup = int(optim.warmup_fraction * total_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    if optim.schedule == "cosine":
        return peak * (1 + math.cos(math.pi * progress)) / 2
    if optim.schedule == "linear":
        return peak * (1 - progress)
    return peak


def _one_cycle(step: int, total_steps: int, peak: float, warmup_fraction: float) -> float:
    if total_steps == 1:
        return peak  # OneCycleLR's only rate would be its last one, which is next to nothing
    start, end = peak / START_DIVISOR, peak / START_DIVISOR / END_DIVISOR
    # the step at the peak, below 0 where the warm-up is shorter than a step
    top = warmup_fraction * total_steps - 1
    if step <= top and top > 0:
        return _cosine(start, peak, step / top)
    return _cosine(peak, end, (step - top) / (total_steps - 1 - top))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * min(1.0, progress)))
