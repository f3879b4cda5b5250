"""Learning rates by step."""

import math

import pytest

from mlx_distill.recipe.training_tables import OptimTable
from mlx_distill.training.schedule import learning_rate

PEAK = 0.3
SCHEDULES = ("one_cycle", "cosine", "linear", "constant")


def rates(schedule: str, total: int, warmup: float) -> list[float]:
    table = OptimTable(schedule=schedule, learning_rate=PEAK, warmup_fraction=warmup)
    return [learning_rate(step, total, table) for step in range(total)]


def one_cycle_of_torch(total: int, warmup: float) -> list[float]:
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=PEAK,
        total_steps=total,
        pct_start=warmup,
        anneal_strategy="cos",
        div_factor=25,
        final_div_factor=1e4,
        cycle_momentum=False,
    )
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step() if len(found) < total else None
    return found


@pytest.mark.parametrize("warmup", [0.0, 0.07, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("total", [2, 3, 6, 11, 30, 101])
def test_one_cycle_is_torchs(total: int, warmup: float):
    assert rates("one_cycle", total, warmup) == pytest.approx(
        one_cycle_of_torch(total, warmup), rel=1e-9
    )


@pytest.mark.parametrize("total, warmup", [(10, 0.1), (2, 0.5), (4, 0.25)])
def test_one_cycle_with_a_warmup_of_one_step(total: int, warmup: float):
    """OneCycleLR divides by zero; here the first step is the peak."""
    found = rates("one_cycle", total, warmup)
    assert found[0] == PEAK and found[-1] == pytest.approx(PEAK / 25e4)
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.9])
def test_a_single_step_is_at_the_peak(schedule: str, warmup: float):
    assert rates(schedule, 1, warmup) == [PEAK]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.33, 0.99])
@pytest.mark.parametrize("total", [2, 7, 40, 100])
def test_rates_rise_to_the_peak_and_never_again(schedule: str, warmup: float, total: int):
    found = rates(schedule, total, warmup)
    assert all(0 < rate <= PEAK * (1 + 1e-12) for rate in found)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1]) and found[top:] == sorted(
        found[top:], reverse=True
    )
    if schedule != "one_cycle":
        assert max(found) == PEAK and top == int(warmup * total)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warmup_is_linear_from_above_zero(schedule: str):
    assert rates(schedule, 40, 0.1)[:5] == pytest.approx([PEAK * k / 5 for k in (1, 2, 3, 4, 5)])
    assert rates(schedule, 40, 0.0)[0] == PEAK


def test_what_follows_the_warmup():
    left = [k / 36 for k in range(36)]  # how far each of the 36 steps after 4 of warm-up has come
    assert rates("constant", 40, 0.1)[4:] == [PEAK] * 36
    assert rates("linear", 40, 0.1)[4:] == pytest.approx([PEAK * (1 - x) for x in left])
    assert rates("cosine", 40, 0.1)[4:] == pytest.approx(
        [PEAK * (1 + math.cos(math.pi * x)) / 2 for x in left]
    )
