"""What a run cost, as text; what it did not record is a dash."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from mlx_distill.reporting.kept_run import Run
from mlx_distill.words import DASH, amount, duration


@dataclass(frozen=True)
class Cost:
    """What the training steps so far took. planned: how many steps there are to be."""

    steps: str
    planned: str
    tokens: str
    loss_tokens: str
    time: str
    rate: str
    memory: str
    flops: str


def cost_of(run: Run) -> Cost:
    """The cost of a run's training."""
    made, rates = run.manifest, _column(run, "tokens_per_second")
    return Cost(
        steps=_text(run.metrics[-1].step if run.metrics else made.steps, "{:,}".format),
        planned=_text(made.steps, "{:,}".format),
        tokens=_text(max(_column(run, "tokens_seen"), default=None), amount),
        loss_tokens=_text(sum(_column(run, "loss_tokens")) or None, amount),
        time=_text(made.elapsed_seconds, duration),
        rate=_text(statistics.median(rates) if rates else None, "{:,.0f}".format),
        memory=_bytes(run, "peak"),
        flops=_text(made.total_flops or None, lambda total: amount(total, "FLOP")),
    )


def cost_tiles(run: Run) -> list[tuple[str, str, str]]:
    """(value, name, remark) for each figure."""
    cost, flops = cost_of(run), run.manifest.flops
    split = ", ".join(f"{part} {amount(n)}" for part, n in flops.items() if part != "total")
    held = [(name, _bytes(run, name)) for name in ("active", "cache")]
    tiles = [
        (cost.time, "training time", f"{cost.steps} of {cost.planned} steps"),
        (cost.memory, "peak memory", ", ".join(f"{name} {size}" for name, size in held)),
        (cost.tokens, "tokens read", f"{cost.loss_tokens} carried loss"),
        (cost.rate, "tokens per second", "median over steps"),
        (cost.flops, "arithmetic", split),
    ]
    return [
        (value, name, remark if value != DASH else "not recorded") for value, name, remark in tiles
    ]


def _column(run: Run, name: str) -> list[float]:
    return [row.numbers[name] for row in run.metrics if name in row.numbers]


def _bytes(run: Run, name: str) -> str:
    """The most of one of the framework's counters."""
    most = max(_column(run, f"{name}_bytes"), default=None)
    return _text(most, lambda size: amount(size, "B"))


def _text(value: float | None, words: Callable[[float], str]) -> str:
    return DASH if value is None else words(value)
