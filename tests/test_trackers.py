"""Trackers follow a run's logs: each step once, whatever stopped in between, and none can stop a
run.
"""

import time

import pytest

from mlx_distill.errors import RecipeError
from mlx_distill.runs import logs, trackers
from mlx_distill.runs.rows import MetricsRow, ValidationRow

CONFIG = {"created": "2026-01-02 03:04:05", "digest": "d", "recipe": ""}


def log(folder, *steps):
    for step in steps:
        logs.append(folder / MetricsRow.FILE, MetricsRow(step=step, loss=1.0 / step))
        logs.append(folder / ValidationRow.FILE, ValidationRow(step=step, loss=2.0 / step))


@pytest.fixture
def sent(monkeypatch):
    rows = []
    opened = (lambda numbers, step: rows.append((step, numbers))), lambda: rows.append("closed")
    monkeypatch.setitem(trackers.OPEN, "trackio", lambda *_: opened)
    return rows


def test_each_step_is_sent_once_also_after_a_kill(tmp_path, sent):
    said = []
    with trackers.followed(tmp_path, "run", ["trackio"], CONFIG, said.append):
        log(tmp_path, 1, 2, 3)
    logs.cut(tmp_path / MetricsRow.FILE, MetricsRow, 2)  # continued from a checkpoint
    logs.cut(tmp_path / ValidationRow.FILE, ValidationRow, 2)
    with trackers.followed(tmp_path, "run", ["trackio"], CONFIG, said.append):
        log(tmp_path, 3, 4)
    trained = [row[0] for row in sent if row != "closed" and "train/loss" in row[1]]
    validated = [row[0] for row in sent if row != "closed" and "validation/loss" in row[1]]
    assert trained == validated == [1, 2, 3, 4] and sent.count("closed") == 2 and not said


def test_rows_are_sent_while_the_run_goes_on(tmp_path, sent, monkeypatch):
    monkeypatch.setattr(trackers, "POLL_SECONDS", 0.01)
    with trackers.followed(tmp_path, "run", ["trackio"], CONFIG, print):
        log(tmp_path, 1)
        for _ in range(1000):
            if len(sent) == 2:
                break
            time.sleep(0.01)
        assert [row[0] for row in sent] == [1, 1]


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("no disk")

    said = []
    monkeypatch.setitem(trackers.OPEN, "wandb", broken)
    with trackers.followed(tmp_path, "run", ["wandb"], CONFIG, said.append):
        log(tmp_path, 1)
    assert said == ["note: wandb is left alone from here on: no disk"]


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"wandb, which is not installed: pip install .*wandb"):
        trackers.refuse_absent(["wandb"])


def test_tensorboard_reads_what_was_sent(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    for steps in ((1, 2), (3,)):
        with trackers.followed(tmp_path, "run", ["tensorboard"], CONFIG, pytest.fail):
            log(tmp_path, *steps)
    files = sorted((tmp_path / "tensorboard").rglob("events*"))
    events = [Event.FromString(raw) for one in files for raw in RawEventFileLoader(str(one)).Load()]
    values = [(event.step, value) for event in events for value in event.summary.value]
    found = {step: value.simple_value for step, value in values if value.tag == "train/loss"}
    assert found == pytest.approx({1: 1.0, 2: 0.5, 3: 1 / 3})
    assert sum(value.tag == "train/loss" for _, value in values) == 3
