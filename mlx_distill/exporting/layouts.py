"""What a student is exported as: from its folder to the files of each format.

In: the student's folder, which transformers and mlx-lm open. Out: the files of one format in a new
folder, and what a person should know of them, as sentences. Decided here: which files belong to
which format.
"""

import contextlib
import io
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mlx_distill.backends.stops import stops_of
from mlx_distill.errors import ModelError, RunError
from mlx_distill.exporting.modelfile import write_modelfile
from mlx_distill.files import all_lines
from mlx_distill.models.gguf.writer import AS_STORED, write_gguf
from mlx_distill.models.shards import INDEX, WEIGHT_FILES
from mlx_distill.models.tokenizer import OTHER_TEMPLATES, load_tokenizer
from mlx_distill.runs.digests import all_files
from mlx_distill.runs.own_files import CARD

GROUP_SIZE = 64  # numbers that share a scale, as mlx-lm has it by default
ADAPTERS = {"peft": "adapters-peft", "mlx-adapters": "adapters"}

Layout = Callable[[Path, Path, str], list[str]]


def _hugging_face(student: Path, folder: Path, name: str) -> list[str]:
    """The student's own folder without its adapters."""
    for file in all_files(student):
        if "/" not in file or file.startswith(f"{OTHER_TEMPLATES}/"):
            _copy(student, folder, file)
    return []


def _mlx(student: Path, folder: Path, name: str, bits: int = 0) -> list[str]:
    """As mlx-lm stores it, quantised to `bits` where they are not 0."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    try:
        model, config = load_model(student, lazy=True)
    except Exception as error:  # a family's code fails in any way
        reason = all_lines(error)
        raise ModelError(
            f"{name}: mlx-lm cannot open this student ({reason}); export --to hf instead"
        ) from None
    left = []
    if bits:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how many bits there are
            model, config = quantize_model(model, config, GROUP_SIZE, bits)
        parts = sorted(model.named_modules(), key=lambda each: each[0])
        left = [path for path, part in parts if hasattr(part, "to_quantized")]
        if not any("Quantized" in type(part).__name__ for _, part in parts):
            raise ModelError(
                f"{name}: no matrix has rows of a multiple of {GROUP_SIZE} numbers, so none can be "
                "quantised; export --to mlx instead"
            )
    save_model(folder, model, donate_model=True)
    save_config(config, folder / "config.json")
    weights = {file.name for file in student.glob(WEIGHT_FILES)} | {INDEX, "config.json", CARD}
    for file in all_files(student):
        if file not in weights and not file.startswith("adapters"):
            _copy(student, folder, file)
    return not_divided(left, GROUP_SIZE, "group")


def _gguf(student: Path, folder: Path, name: str, kind: str = AS_STORED) -> list[str]:
    """A file for llama.cpp and LM Studio, and a Modelfile for Ollama."""
    tokenizer = load_tokenizer(student)
    ends = stops_of(student, tokenizer)
    suffix = "" if kind == AS_STORED else f"-{kind}"
    written = write_gguf(student, folder / f"{name}{suffix}.gguf", name, ends, kind)
    notes = write_modelfile(folder, written.path.name, tokenizer, sorted(ends))
    return [*not_divided(written.not_divided, 32, "block"), *written.notes, *notes]


def _adapters(student: Path, folder: Path, name: str, part: str) -> list[str]:
    """What LoRA or DoRA learned, without the base model."""
    if not (student / part).is_dir():
        raise RunError(
            f"{name}: the run trained all weights and has no adapters; export --to hf or --to mlx, "
            'or train with student.tuning = "lora"'
        )
    for file in all_files(student / part):
        _copy(student / part, folder, file)
    return []


LAYOUTS: dict[str, Layout] = {
    "hf": _hugging_face,
    "mlx": _mlx,
    "mlx-4bit": partial(_mlx, bits=4),
    "mlx-8bit": partial(_mlx, bits=8),
    "gguf": _gguf,
    "gguf-q8_0": partial(_gguf, kind="q8_0"),
    "gguf-q4_0": partial(_gguf, kind="q4_0"),
    **{name: partial(_adapters, part=part) for name, part in ADAPTERS.items()},
}
QUANTISED = ("mlx-4bit", "mlx-8bit", "gguf-q8_0", "gguf-q4_0")


def not_divided(names: list[str], size: int, what: str) -> list[str]:
    """A sentence about the matrices that stay unquantised; none where all are quantised."""
    if not names:
        return []
    shown = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    if len(names) == 1:
        return [
            f"a matrix stays unquantised, for a {what} of {size} does not divide its rows: {shown}"
        ]
    return [
        f"{len(names)} matrices stay unquantised, for a {what} of {size} does not divide their "
        f"rows: {shown}"
    ]


def _copy(source: Path, folder: Path, file: str) -> None:
    if file == CARD:
        return
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / file, folder / file)
