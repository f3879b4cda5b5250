"""What a run cost, as text; what it did not record is a dash."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_distill.reporting.kept_run import Run
from mlx_distill.words import DASH, amount, duration, finite, is_number


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
    steps, planned = column(run.metrics, "step"), known(run.manifest.get("steps"))
    tokens, loss_tokens = column(run.metrics, "tokens_seen"), column(run.metrics, "loss_tokens")
    rates, peak = column(run.metrics, "tokens_per_second"), column(run.metrics, "peak_bytes")
    flops = dict(items(run.manifest.get("flops"))).get("total")
    return Cost(
        steps=_text(steps[-1] if steps else planned, "{:,.0f}".format),
        planned=_text(planned, "{:,.0f}".format),
        tokens=_text(tokens[-1] if tokens else None, amount),
        loss_tokens=_text(sum(loss_tokens) if loss_tokens else None, amount),
        time=_text(known(run.manifest.get("elapsed_seconds")), duration),
        rate=_text(statistics.median(rates) if rates else None, "{:,.0f}".format),
        memory=_text(max(peak) if peak else None, lambda size: amount(size, "B")),
        flops=_text(known(flops), lambda total: amount(total, "FLOP")),
    )


def cost_tiles(run: Run) -> list[tuple[str, str, str]]:
    """(value, name, remark) for each figure."""
    cost = cost_of(run)
    parts = [
        (part, known(value)) for part, value in items(run.manifest.get("flops")) if part != "total"
    ]
    split = ", ".join(f"{part} {amount(value)}" for part, value in parts if value is not None)
    held = [(name, column(run.metrics, f"{name}_bytes")) for name in ("active", "cache")]
    memory = ", ".join(f"{name} {amount(max(used), 'B')}" for name, used in held if used)
    tiles = [
        (
            cost.time,
            "training time",
            f"{cost.steps} of {cost.planned} steps" if cost.planned != DASH else "",
        ),
        (cost.memory, "peak memory", memory),
        (
            cost.tokens,
            "tokens read",
            f"{cost.loss_tokens} carried loss" if cost.loss_tokens != DASH else "",
        ),
        (cost.rate, "tokens per second", "median over steps"),
        (cost.flops, "arithmetic", split),
    ]
    return [
        (value, name, remark if value != DASH else "not recorded") for value, name, remark in tiles
    ]


def column(rows: list[dict], name: str) -> list[float]:
    """What the rows hold under a name, as far as it is a number."""
    return [value for _, value in finite(range(len(rows)), [row.get(name) for row in rows])]


def known(value: Any) -> float | None:
    """A number of a file; None for anything else."""
    return float(value) if is_number(value) else None


def items(content: Any) -> list[tuple[str, Any]]:
    """The entries of what should be a table."""
    return list(content.items()) if isinstance(content, dict) else []


def _text(value: float | None, words: Callable[[float], str]) -> str:
    return DASH if value is None else words(value)
