"""Trackers: a run's logs, followed line by line, to trackio, TensorBoard and Weights & Biases.

In: the log files of a run, as they grow. Out: each row once, at its step. Decided here: training
knows no tracker; what was sent is kept in `tracked.json` before it goes out, so that a run that is
continued sends no step twice (a kill may cost the rows of the last second); a tracker that fails is
said once and left alone, and none needs the network.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_distill.errors import RecipeError
from mlx_distill.files import first_line, write_text
from mlx_distill.runs import logs
from mlx_distill.runs.rows import LOGS, MetricsRow

FILE = "tracked.json"
POLL_SECONDS = 1.0
Send = Callable[[dict[str, float], int], None]
Opened = tuple[Send, Callable[[], None]]


def _trackio(folder: Path, name: str, config: dict[str, Any]) -> Opened:
    import trackio

    trackio.init(
        project="mlx-distill",
        name=f"{name} {config['created']}",  # one that was started over is another
        config=config,
        resume="allow",
        embed=False,
        auto_log_cpu=False,
    )
    return (lambda numbers, step: trackio.log(numbers, step=step)), trackio.finish


def _tensorboard(folder: Path, name: str, config: dict[str, Any]) -> Opened:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder / "tensorboard" / config["created"].replace(":", "-")))

    def send(numbers: dict[str, float], step: int) -> None:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()]
        writer.add_event(Event(step=step, summary=Summary(value=values)))

    return send, writer.close


def _wandb(folder: Path, name: str, config: dict[str, Any]) -> Opened:
    import wandb

    os.environ.setdefault("WANDB_MODE", "offline")  # `wandb sync` sends it later
    run = wandb.init(
        project="mlx-distill",
        id=sha256(f"{name} {config['digest']} {config['created']}".encode()).hexdigest()[:16],
        name=name,
        config=config,
        resume="allow",
        dir=folder,
    )
    return (lambda numbers, step: run.log(numbers, step=step)), run.finish


OPEN: dict[str, Callable[[Path, str, dict[str, Any]], Opened]] = {
    "trackio": _trackio,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}


def refuse_absent(names: Sequence[str]) -> None:
    """Raise `RecipeError` for a tracker that is not installed, before anything is computed."""
    for name in names:
        if find_spec(name) is None:
            raise RecipeError(
                f"run.track asks for {name}, which is not installed: pip install "
                f"'mlx-distill[{name}]', or leave it out"
            )


@contextmanager
def followed(
    folder: Path,
    name: str,
    names: Sequence[str],
    config: dict[str, Any],
    say: Callable[[str], None],
) -> Iterator[None]:
    """While this is open, what the logs in `folder` hold goes to the trackers of these names; at its
    end, the rest.
    """
    followers = [Follower(folder, name, tracker, config, say) for tracker in names]
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(POLL_SECONDS):
            for one in followers:
                one.send()

    thread = threading.Thread(target=follow, daemon=True)
    if followers:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if followers:
            thread.join()
        for one in followers:
            one.close()


class Follower:
    """Sends each row of a run's logs to one tracker, once."""

    def __init__(
        self,
        folder: Path,
        name: str,
        tracker: str,
        config: dict[str, Any],
        say: Callable[[str], None],
    ):
        self.folder, self.tracker, self.say = folder, tracker, say
        self._opened: Opened | None = None
        self._open = lambda: OPEN[tracker](folder, name, config)
        self._failed = False

    def send(self) -> None:
        """What was logged since the last time; a tracker that fails is said, and asked no more."""
        try:
            self._send()
        except Exception as error:
            self._fail(error)

    def _send(self) -> None:
        if self._failed:
            return
        sent = self._sent()
        for kind in LOGS:
            last = sent.get(kind.FILE, -1)
            rows = [row for row in logs.read(self.folder / kind.FILE, kind).rows if row.step > last]
            if not rows:
                continue
            self._keep(sent | {kind.FILE: rows[-1].step})
            sent = self._sent()
            part = "train" if kind is MetricsRow else "validation"
            self._opened = self._opened or self._open()
            for row in rows:
                numbers = {f"{part}/{key}": value for key, value in row.numbers.items()}
                numbers.pop(f"{part}/step")
                self._opened[0](numbers, row.step)

    def _sent(self) -> dict[str, int]:
        return self._all().get(self.tracker, {})

    def _all(self) -> dict[str, dict[str, int]]:
        try:
            return json.loads((self.folder / FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def _keep(self, sent: dict[str, int]) -> None:
        write_text(self.folder / FILE, json.dumps(self._all() | {self.tracker: sent}))

    def _fail(self, error: Exception) -> None:
        self._failed = True
        self.say(f"note: {self.tracker} is left alone from here on: {first_line(error)}")

    def close(self) -> None:
        """Send the rest."""
        self.send()
        if self._opened and not self._failed:
            try:
                self._opened[1]()
            except Exception as error:
                self._fail(error)
