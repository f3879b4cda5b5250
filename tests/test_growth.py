"""What takes work in the number of runs takes no more than that, counted in calls of functions: the
page of a sweep, its charts, and the pages that are written while it runs. And the bench that
measures growth still runs (benchmarks/bench_growth.py).
"""

import cProfile
import gc
import json
import math
import pstats
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mlx_distill.data.prepare import choose, learnable
from mlx_distill.embedded.tokenizer import build_tokenizer
from mlx_distill.errors import DataError
from mlx_distill.recipe.load import load_recipe
from mlx_distill.recipe.recipe import with_values
from mlx_distill.reporting.drawing import drawn
from mlx_distill.reporting.study import Row
from mlx_distill.reporting.sweep_charts import pareto_chart
from mlx_distill.reporting.sweep_findings import Swept, findings
from mlx_distill.reporting.sweep_page import sweep_page
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.sweeps import queue
from mlx_distill.sweeps.jobs import Ended, Job
from mlx_distill.sweeps.queue import Queue
from mlx_distill.sweeps.sweep import distinct, load_sweep
from mlx_distill.view import silent

FRACTION, KD = "truncation.fraction", "objective.kd_weight"


def calls(work: Callable[[], object]) -> int:
    profile = cProfile.Profile()
    profile.runcall(work)
    return pstats.Stats(profile).total_calls


def exponent(work: Callable[[int], Callable[[], object]], few: int, many: int) -> float:
    """With which power of their number the calls grow."""
    return math.log(calls(work(many)) / calls(work(few))) / math.log(many / few)


def row(number: int, label: str, settings: dict, cost: float) -> Row:
    random = np.random.default_rng(number)
    right = tuple((random.random(20) < 0.2 + 0.6 * cost).astype(float))
    accuracy = float(np.mean(right))
    numbers = {"accuracy": accuracy, "flops": cost, "problems": "p", "right": right}
    return Row(f"run {number}", "student", label, settings, 1, **numbers)


def grid(count: int) -> Swept:
    """A condition for each of `count` runs: an axis of numbers, crossed with another one."""
    weights = [i / count for i in range(count // 4)]
    axes = {FRACTION: [0.25, 0.5, 0.75, 1.0], KD: weights}
    settings = [{FRACTION: x, KD: kd} for x in axes[FRACTION] for kd in weights]
    costs = [one[FRACTION] * (1 + one[KD]) / 2 for one in settings]
    pairs = enumerate(zip(settings, costs, strict=True))
    rows = [row(i, "", one, cost) for i, (one, cost) in pairs]
    return Swept("s", "", axes, ("", {FRACTION: 1.0, KD: 0.0}), rows, count, {})


def arms(count: int) -> Swept:
    """Arms beside a grid, whose settings have its axis too."""
    rows = [row(i, f"arm {i}", {FRACTION: 0.5, KD: 0.5}, (i + 1) / count) for i in range(count)]
    rows += [row(count + i, "", {FRACTION: x, KD: 0.5}, x) for i, x in enumerate((0.5, 1.0))]
    return Swept("s", "", {FRACTION: [0.5, 1.0], KD: [0.5]}, None, rows, count + 2, {})


@pytest.mark.parametrize("swept", [grid, arms])
def test_a_sweeps_page_takes_work_in_the_number_of_its_runs(swept):
    def page(count: int) -> Callable[[], object]:
        made = swept(count)
        return lambda: sweep_page(findings(made))

    assert exponent(page, 64, 256) < 1.1


def test_a_chart_takes_work_in_the_number_of_its_points():
    def chart(count: int) -> Callable[[], object]:
        made = pareto_chart(findings(grid(count)))
        return lambda: drawn.__wrapped__(made, 560, 360)

    chart(8)()  # what matplotlib does once
    assert exponent(chart, 101, 303) < 1.1


def test_the_pages_of_a_sweep_that_runs_take_work_in_the_number_of_its_runs(tmp_path, monkeypatch):
    """A page reads all runs that are done, so it is not written again for each of very many."""
    runs: list[Job] = []
    pages: list[int] = []

    def side_by_side(jobs, *rest):
        for job in jobs:
            runs.append(job)
            yield Ended(job, 1, 1.0)

    made: Counter[str] = Counter()
    of = RunFolder.of.__func__

    def counted(kind, recipe):
        made["folders"] += 1
        return of(kind, recipe)

    monkeypatch.setattr(RunFolder, "of", classmethod(counted))
    monkeypatch.setattr(queue, "side_by_side", side_by_side)
    monkeypatch.setattr(queue, "write_results", lambda one, troubles: pages.append(len(troubles)))
    monkeypatch.setattr(Ended, "trouble", property(lambda self: "it failed"))
    found: dict[int, int] = {}
    for count in (50, 200):
        runs.clear(), pages.clear(), made.clear()
        path = tmp_path / f"{count}.toml"
        seeds = ", ".join(map(str, range(count // 2)))
        path.write_text(
            f'recipe = "{tmp_path}/base.toml"\nfolder = "{tmp_path}/{count}"\nseeds = [{seeds}]\n'
            "[axes]\ntruncation.fraction = [0.5, 1.0]\n"
        )
        (tmp_path / "base.toml").write_text(BASE)
        one = load_sweep(path)
        for part in queue.PARTS:
            (one.folder / part).mkdir(parents=True)
        Queue([one], distinct([one]), silent(), "mlx", 1).run()
        assert len(runs) == count and pages[:20] == list(range(1, 21))  # a page for each of few
        lacking = [later - now for now, later in zip(pages, [*pages[1:], count], strict=True)]
        assert all(20 * lack < told + 20 for told, lack in zip(pages, lacking, strict=True))
        assert sum(pages) <= 21 * count  # 1 + 2 + … + count, were there a page for each
        found[count] = made["folders"]
    assert math.log(found[200] / found[50]) / math.log(4) < 1.1


BASE = """
[student]
model = "embedded:student"
[teacher]
model = "embedded:teacher"
[data]
source = "embedded:dial"
train_examples = 8
[optim]
learning_rate = 1e-3
[eval]
task = "embedded:dial"
"""


def test_rows_are_not_looked_through_again_and_again_for_garbage(tmp_path):
    """Neither where all goes well, nor after an error, does the collector stay off."""
    path = tmp_path / "rows.jsonl"
    lines = [
        json.dumps(
            {"prompt": f"{i}?", "reasoning": "<think>" if i % 9 == 0 else "r", "answer": "a"}
        )
        for i in range(600)
    ]
    path.write_text("\n".join(lines))
    (tmp_path / "base.toml").write_text(BASE)
    settings = (f"data.source={path}", "data.train_examples=0")
    recipe, tokenizer = load_recipe(tmp_path / "base.toml", settings), build_tokenizer()
    collections: list[int] = []

    def count(phase: str, info: dict) -> None:
        if phase == "start":
            collections.append(info["generation"])

    gc.callbacks.append(count)
    try:
        chosen = choose(recipe, tokenizer)
        prepared = learnable(chosen, recipe)
    finally:
        gc.callbacks.remove(count)
    assert len(collections) <= 2 and gc.isenabled()  # one after each of both
    assert len(prepared.train_whole) + len(prepared.validation) == 533
    assert prepared.skipped == {"literal <think> in its reasoning": 67}
    with pytest.raises(DataError):
        choose(with_values(recipe, data={"validation_examples": 600}), tokenizer)
    assert gc.isenabled()


# the bench


@pytest.fixture
def bench(monkeypatch) -> Iterator:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    if sys.platform == "linux":
        from benchmarks import bench_growth

        yield bench_growth
        gc.unfreeze()
    else:
        pytest.skip("reads /proc")


def test_the_bench_of_growth_runs_with_tiny_sizes(bench, tmp_path, monkeypatch):
    """Every part, and a line of the table for each thing that it measures."""
    monkeypatch.setattr(bench.machines, "blas_name", lambda: "some BLAS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    rows = []
    for name, part in bench.PARTS.items():
        scratch = tmp_path / name
        scratch.mkdir()
        gc.freeze()  # it collects garbage before each measurement: not that of other tests
        rows += bench.measure_here(name, part.backends[-1], scratch)
    table = bench.rendered([{key: str(value) for key, value in row.items()} for row in rows])
    lines = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    assert lines[1:] == [
        "| KD loss, torch",
        "| KD loss, torch",
        "| trunk, torch",
        "| trunk, checkpointing, torch",
        *(f"| rows: {thing}" for thing in ("first start", "second start", "an epoch's steps")),
        *(f"| teacher cache: {thing}, hidden" for thing in ("write", "read")),
        *(f"| checkpoint: {thing}, torch" for thing in ("write", "read")),
        "| sweep: page",
    ]
    said = [line for line in table.splitlines() if line.startswith("- ")]
    assert len(said) == 2 and "at 64 tokens" in said[1]
    by_size = {(row["part"], row["thing"], row["size"]) for row in rows}
    assert len(by_size) == len(rows) == 2 * (len(lines) - 1)
    assert all(row["cpu_seconds"] > 0 for row in rows)


def test_exponents_are_those_of_the_numbers(bench):
    sizes = np.array([250, 500, 1000, 2000, 4000])
    exact = bench.fitted(sizes, 3e-6 * sizes**1.5)
    assert exact.exponent == pytest.approx(1.5) == pytest.approx(exact.last)
    assert exact.half == pytest.approx(0, abs=1e-6)
    seconds = 2e-4 * sizes ** np.array([1.0, 1.02, 0.99, 1.01, 1.04])
    found = bench.fitted(sizes, seconds)
    slope, covariance = np.polyfit(np.log(sizes), np.log(seconds), 1, cov=True)
    assert found.exponent == pytest.approx(slope[0])
    assert found.half == pytest.approx(3.1824 * math.sqrt(covariance[0, 0]), rel=1e-4)
    assert math.isnan(bench.fitted([1, 2], [0.0, 1.0]).exponent)
    assert bench.square_share(sizes, 1e-3 * sizes + 1e-6 * sizes**2) == pytest.approx(0.8)
    assert bench.square_share(sizes, 5 + 1e-3 * sizes) == pytest.approx(0, abs=1e-9)
