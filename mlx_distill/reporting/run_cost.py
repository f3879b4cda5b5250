"""What a run cost, as text; what it did not record is a dash."""

import statistics
from collections.abc import Callable

from mlx_distill.reporting.kept_run import Run
from mlx_distill.words import DASH, amount, duration


def cost_of(run: Run) -> dict[str, str]:
    """What the training steps so far took, by the name of each figure."""
    made, rates = run.manifest, _column(run, "tokens_per_second")
    return {
        "steps": _text(run.metrics[-1].step if run.metrics else made.steps, "{:,}".format),
        "tokens read": _text(max(_column(run, "tokens_seen"), default=None), amount),
        "with loss": _text(sum(_column(run, "loss_tokens")) or None, amount),
        "tokens per second": _text(statistics.median(rates) if rates else None, "{:,.0f}".format),
        "training time": _text(made.elapsed_seconds, duration),
        "peak memory": _bytes(run, "peak"),
        "arithmetic": _text(made.total_flops or None, lambda total: amount(total, "FLOP")),
    }


def cost_tiles(run: Run) -> list[tuple[str, str, str]]:
    """(value, name, remark) for each figure."""
    cost, made = cost_of(run), run.manifest
    planned = _text(made.steps, "{:,}".format)
    known = {name: _bytes(run, name) for name in ("active", "footprint")}
    held = ", ".join(f"{name} {size}" for name, size in known.items() if size != DASH)
    split = ", ".join(f"{part} {amount(n)}" for part, n in made.flops.items() if part != "total")
    remarks = {
        "training time": f"{cost['steps']} of {planned} steps{_why_fewer(run)}",
        "peak memory": held,
        "tokens read": f"{cost['with loss']} carried loss",
        "tokens per second": "median over steps",
        "arithmetic": split,
    }
    return [
        (cost[name], name, remark if cost[name] != DASH else "not recorded")
        for name, remark in remarks.items()
    ]


def _why_fewer(run: Run) -> str:
    made = run.manifest
    early = None not in (made.steps, made.trained_steps) and made.trained_steps != made.steps
    return ", ended by optim.patience" if early else ""


def _column(run: Run, name: str) -> list[float]:
    return [row.numbers[name] for row in run.metrics if name in row.numbers]


def _bytes(run: Run, name: str) -> str:
    """The most of one of the framework's counters."""
    most = max(_column(run, f"{name}_bytes"), default=0) or None
    return _text(most, lambda size: amount(size, "B"))


def _text(value: float | None, words: Callable[[float], str]) -> str:
    return DASH if value is None else words(value)
