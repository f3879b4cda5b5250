"""The checkpoints of a run: whole or not there, known by their digests, and which of them stay.

    checkpoints/step-000100/  weights.safetensors  optimizer.safetensors  state.json  SHA256SUMS

In: a training state and a function that writes arrays into a folder. Out: that folder under its
step's name, and later the newest state that can be trusted. Decided here: every file has the
SHA-256 that it was saved with, and the state's step is the folder's; a checkpoint for which that
does not hold is damaged, is told, and is never a reason to remove another one. Older versions wrote
no digests: of theirs only the length of the files is checked.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mlx_distill.errors import DistillError, NotFound, RunError
from mlx_distill.files import left_overs, made_whole
from mlx_distill.readers import read_json, read_text
from mlx_distill.runs import own_files
from mlx_distill.runs.digests import all_files, changed, digests
from mlx_distill.runs.small_files import Say, quiet

SUMS = "SHA256SUMS"
SUM_LINE = re.compile(r"([0-9a-f]{64})  ([^/].*)")
STEP_FOLDER = re.compile(r"step-([0-9]{6,})")
UNWRITTEN = (OSError, RuntimeError, SafetensorError)  # what the backends' writers raise


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Where training stands after `step` optimizer steps. The position in the data is the step
    number itself.
    """

    step: int = 0
    tokens_seen: int = 0
    loss_tokens_seen: int = 0
    elapsed_seconds: float = 0.0
    best_step: int = -1
    best_loss: float = inf
    recipe_digest: str = ""
    inputs_digest: str = ""  # of models and data; "" in checkpoints of older versions
    flops: dict[str, float] | None = None  # by part, since the first step; None in those


NUMBER = (int, float)
KINDS: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "tokens_seen": int,
    "loss_tokens_seen": int,
    "elapsed_seconds": NUMBER,
    "best_step": int,
    "best_loss": NUMBER,
    "recipe_digest": str,
    "inputs_digest": str,
    "flops": (dict, type(None)),
}


class Checkpoints:
    """The folder of a run's checkpoints. What was found to be damaged is remembered."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._damage: dict[int, str] = {}

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, damaged or not, ascending."""
        return sorted(step for step, path in self._folders() if _holds_own(path))

    def _folders(self) -> list[tuple[int, Path]]:
        try:
            entries = sorted(self.folder.iterdir())
        except OSError:
            return []
        named = ((STEP_FOLDER.fullmatch(path.name), path) for path in entries)
        found = [(int(match[1]), path) for match, path in named if match and path.is_dir()]
        return [(step, path) for step, path in found if path == self.path(step)]

    # reading

    def newest(self, needs_best: bool = False, say: Say = quiet) -> TrainState:
        """The newest state that is whole, with the best one's if `needs_best`; the first one if
        there is no checkpoint.

        Says which were passed over. Raises `RunError` where all are damaged.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            reason = self.damage(step)
            if not reason:
                state = self.state(step)
                best = state.best_step if needs_best and state.best_step > 0 else step
                reason = self.damage(best)
            if not reason:
                if damaged:
                    say(f"note: {damaged[0]}: going on from step {step}, the newest that is whole")
                return state
            damaged.append(reason)
        if damaged:
            raise RunError(
                f"{damaged[0]}; no checkpoint before it is whole: put a copy in its place, "
                "or start over with --fresh"
            )
        return TrainState()

    def state(self, step: int) -> TrainState:
        """The state of a step whose checkpoint is whole."""
        return _read_state(self.path(step))

    def damage(self, step: int) -> str:
        """What is wrong with a step's checkpoint, "" if nothing is. It is read once."""
        if step not in self._damage:
            self._damage[step] = _damage(self.path(step), step)
        return self._damage[step]

    def what_is_saved(self) -> str:
        """For an error's text."""
        whole = [step for step in self.steps() if not self._damage.get(step)]
        return f"the checkpoint of step {whole[-1]} is intact" if whole else ""

    # writing

    def save(self, state: TrainState, write: Callable[[Path], None]) -> None:
        """A checkpoint appears by one rename, in the place of a damaged one if there is one. Raises
        as `write` does.
        """
        folder = self.path(state.step)
        if folder.exists():
            own_files.remove(folder, own_files.is_checkpoint_file)
        with made_whole(folder) as half:
            write(half)
            (half / "state.json").write_text(
                json.dumps(dataclasses.asdict(state)), encoding="utf-8"
            )
            (half / SUMS).write_text(_sums_text(digests(half, all_files(half))), encoding="utf-8")
        self._damage[state.step] = ""

    def prune(self, state: TrainState, keep: str) -> None:
        """Remove the checkpoints up to `state` that `keep` does not name."""
        if keep == "all":
            return
        wanted = {state.step} | ({state.best_step} if keep == "last_and_best" else set())
        for step in self.steps():
            if step < state.step and step not in wanted:
                self._remove(self.path(step))

    def tidy(self) -> None:
        """Remove what a kill left half written."""
        for path in left_overs(self.folder, STEP_FOLDER):
            own_files.remove(path, own_files.is_checkpoint_file)

    def remove_all(self) -> None:
        """Remove every checkpoint, and nothing else."""
        self.tidy()
        for _, path in self._folders():
            own_files.remove(path, own_files.is_checkpoint_file)
        self._damage.clear()

    def _remove(self, folder: Path) -> None:
        """The folder is renamed first, so that a kill leaves no half of a checkpoint that looks
        like a damaged one.
        """
        renamed = folder.with_name(f".{folder.name}.tmp")
        own_files.remove(renamed, own_files.is_checkpoint_file)
        if not folder.is_symlink() and not own_files.foreign(folder, own_files.is_checkpoint_file):
            with suppress(OSError):  # a disk is mounted there: it goes file by file
                folder = folder.rename(renamed)
        own_files.remove(folder, own_files.is_checkpoint_file)

    def foreign_after(self, step: int) -> list[Path]:
        """Files that no run made, in folders that a run needs for its checkpoints after `step`."""
        found = []
        for number, path in self._folders():
            if number > step:
                found += (
                    [path]
                    if path.is_symlink()
                    else own_files.foreign(path, own_files.is_checkpoint_file)
                )
        return found


def _holds_own(folder: Path) -> bool:
    return any((folder / name).is_file() for name in own_files.CHECKPOINT)


# state.json


def _damage(folder: Path, step: int) -> str:
    """What is wrong with a checkpoint, as a sentence; "" if nothing is."""
    try:
        kept = _read_sums(folder / SUMS)
        wrong = _wrong_lengths(folder) if kept is None else changed(folder, kept)
        if wrong:
            return wrong
        state = _read_state(folder)
    except DistillError as error:
        return str(error)
    return (
        ""
        if state.step == step
        else f"{folder / 'state.json'} is damaged: it says step {state.step}"
    )


def _sums_text(kept: dict[str, str]) -> str:
    """What `sha256sum` writes, so that `sha256sum -c SHA256SUMS` checks a checkpoint too."""
    return "".join(f"{digest}  {name}\n" for name, digest in kept.items())


def _read_sums(path: Path) -> dict[str, str] | None:
    """Name → SHA-256, None where an older version wrote none."""
    try:
        lines = read_text(path, error=RunError).splitlines()
    except NotFound:
        return None
    matches = [SUM_LINE.fullmatch(line) for line in lines]
    kept = {match[2]: match[1] for match in matches if match}
    if len(kept) < len(lines) or "state.json" not in kept:
        raise RunError(f"{path} is damaged")
    return kept


def _read_state(folder: Path) -> TrainState:
    path = folder / "state.json"
    try:
        content = read_json(path, error=RunError)
    except NotFound:
        raise RunError(f"{path} is missing") from None
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged: it holds no state")
    return _state(content, path)


def _state(content: dict[str, Any], path: Path) -> TrainState:
    if content.get("best_loss", 0) is None:
        content["best_loss"] = inf
    for name, value in content.items():
        if name not in KINDS:
            raise RunError(
                f"{path} is damaged, or of another version of mlx-distill: it has {name!r}"
            )
        if isinstance(value, bool) or not isinstance(value, KINDS[name]):
            raise RunError(f"{path} is damaged: its {name} is {value!r}")
    return TrainState(**content)


def _wrong_lengths(folder: Path) -> str:
    """The first array file without the length that its own header says, as a sentence; "" if none."""
    for name in ("weights.safetensors", "optimizer.safetensors"):
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if not _has_its_length(path):
            return f"{path} is damaged: it does not have the length that its header says"
    return ""


def _has_its_length(path: Path) -> bool:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            arrays = json.loads(file.read(header)) if 8 + header <= size else {}
        ends = [
            array["data_offsets"][1] for name, array in arrays.items() if name != "__metadata__"
        ]
        return 8 + header + max(ends, default=0) == size
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
    ):  # it is no such file
        return False
