"""`mlx-distill export`: a finished student in the format of another program.

In: the name of a run and of a format. Out: a folder with the files of that format, a model card and
`export.json`; with `push`, the same on the hub. Decided here: the order, so that nothing is written
for a student that is not the run's own, and nothing is pushed that is not whole.
"""

import shutil
from pathlib import Path
from typing import Any

from mlx_distill.backends import choose_backend
from mlx_distill.backends.export import not_for_mlx_lm
from mlx_distill.errors import DistillError, RecipeError
from mlx_distill.exporting.card import model_card
from mlx_distill.exporting.fidelity import measured
from mlx_distill.exporting.folder import made_export, refuse_others
from mlx_distill.exporting.layouts import ADAPTERS, LAYOUTS, QUANTISED
from mlx_distill.exporting.push import Hub
from mlx_distill.files import first_line, remedy
from mlx_distill.runs.checkpoints import UNWRITTEN
from mlx_distill.runs.named import run_at, weights_of
from mlx_distill.runs.own_files import CARD
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.view import View
from mlx_distill.words import amount


def export(
    name: str,
    to: str,
    view: View,
    out: Path | None = None,
    push: str = "",
    measure: bool = True,
    backend_name: str = "auto",
) -> Path:
    """Export the student of the run `name`; returns the folder, `exports/TO` in the run's unless
    `out` says another.

    With `push` it is uploaded to that repository of the hub. Raises `DistillError`.
    """
    if to not in LAYOUTS:
        raise RecipeError(f"--to should be one of {', '.join(LAYOUTS)}, found {to!r}")
    run = _finished(name)
    target = out or run.path / "exports" / to
    refuse_others(target)
    hub = Hub(push) if push else None  # an id that cannot be is refused before anything is written
    about: dict[str, Any] = {"run": run.path.name, "to": to}
    try:
        with made_export(target, about) as half:
            _fill(run, to, half, about, view, measure, backend_name)
    except DistillError:
        raise
    except UNWRITTEN as error:
        raise DistillError(
            f"{target}: the export could not be written ({first_line(error)}); {remedy(error)}"
        ) from error
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    view.say(f"{to} written to {target} ({amount(size, 'B')})")
    if hub:
        view.say(hub.upload(target, f"{run.path.name} as {to}, by mlx-distill"))
    return target


def _finished(name: str) -> RunFolder:
    """The run of this name, whose student is there as the run wrote it."""
    run = run_at(name)
    if run is None:
        raise DistillError(f"{name} is no run: name a folder that `mlx-distill run` wrote")
    weights_of(name)
    return run


def _fill(
    run: RunFolder,
    to: str,
    half: Path,
    about: dict[str, Any],
    view: View,
    measure: bool,
    backend_name: str,
) -> None:
    """The files of the format, what they lost, and the card."""
    if to.startswith("mlx") and (reason := not_for_mlx_lm(run.student)):
        raise DistillError(f"{run.path}: mlx-lm cannot open this student: {reason}")
    notes = LAYOUTS[to](run.student, half, run.path.name)
    if to in ADAPTERS and (bits := run.recipe().student.quantize_bits):
        notes.append(_of_rounded_base(bits))
    said = [f"note: {note}" for note in notes]
    for note in said:
        view.say(note)
    if to in QUANTISED and measure:
        backend = choose_backend("mlx" if to.startswith("mlx") else backend_name)
        lost = measured(run, half, backend, view)
        about["fidelity"] = lost.numbers()
        for sentence in lost.sentences():
            view.say(sentence)
            said.append(sentence)
    about["notes"] = said
    for scratch in half.glob(".measured-*"):
        shutil.rmtree(scratch, ignore_errors=True)
    (half / CARD).write_text(model_card(run.path, to, said), encoding="utf-8")


def _of_rounded_base(bits: int | str) -> str:
    if bits == "nf4":
        return (
            "the adapter was trained on its base in bitsandbytes' NF4, and belongs on that (peft, on "
            'a base loaded with `BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")`): '
            "on the unquantised base it does not do quite what the student does"
        )
    return (
        f"the adapter was trained on its base in {bits} bits, and belongs on that (`mlx_lm.convert -q "
        f"--q-bits {bits}`): on the unquantised base it does not do quite what the student does"
    )
