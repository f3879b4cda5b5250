"""What takes work in the number of runs takes no more than that, counted in calls of functions: the
page of a sweep, its charts, and the pages that are written while it runs.
"""

import cProfile
import math
import pstats
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

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
