"""What a run was made from, for whoever reads it later: models, data, packages, machine, commit.

In: a recipe and what was prepared for it. Out: the dictionaries of `manifest.json` and
`sample.json`. Everything is asked of the machine or computed from the data; nothing is typed in.
"""

import hashlib
import json
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_distill.backends.protocol import DeviceInfo
from mlx_distill.data.prepare import Prepared, count_tokens, token_runs
from mlx_distill.data.sequences import Segment
from mlx_distill.machine import git_commit, processor_name, versions
from mlx_distill.models.config import reading_of
from mlx_distill.models.hub import model_fingerprint
from mlx_distill.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def make_manifest(
    recipe: Recipe,
    device: DeviceInfo,
    models: dict[str, tuple[str, Path]],
    prepared: Prepared,
    steps: int,
) -> dict:
    """The manifest of a run that begins; `models` maps teacher and student to (name in the recipe,
    folder).
    """
    return {
        "name": recipe.run.name,
        "recipe_digest": recipe.digest(),
        "created": time.strftime("%Y-%m-%d %H:%M:%S"),
        "backend": device.backend,
        "device": device.device,
        "dtype": device.dtype,
        "backend_reason": device.reason,
        "versions": versions(),
        "machine": {
            "system": platform.platform(),
            "processor": processor_name(),
            "python": platform.python_version(),
        },
        "git_commit": git_commit(),
        "seed": recipe.run.seed,
        "models": {
            part: {"name": name} | identity(folder) for part, (name, folder) in models.items()
        },
        "data": data_account(prepared, recipe),
        "data_digest": data_digest(prepared),
        "prompt_date": prepared.day,
        "steps": steps,
    }


def identity(folder: Path) -> dict[str, str]:
    """What tells two models' numbers apart: fingerprint and, where mlx-lm alone computes other
    numbers than we do, whose they are.
    """
    arithmetic = reading_of(folder)
    return {"fingerprint": model_fingerprint(folder)} | (
        {"arithmetic": arithmetic} if arithmetic else {}
    )


def make_start(device: DeviceInfo, step: int) -> dict:
    """One start or continuation of a run, after `step` steps: a run may move to another backend,
    machine or version.
    """
    return {
        "at_step": step,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "backend": device.backend,
        "device": device.device,
        "dtype": device.dtype,
        "versions": versions(),
        "git_commit": git_commit(),
    }


def inputs_digest(manifest: dict) -> str:
    """16 hex digits over the models and the data of a manifest."""
    content = json.dumps([manifest["models"], manifest["data_digest"]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def data_account(prepared: Prepared, recipe: Recipe) -> dict:
    """Examples read, kept and dropped (by reason), and training tokens by segment: whole, after the
    cut, with loss.
    """
    whole = count_tokens(prepared.train_whole, recipe.objective.segments)
    cut = count_tokens(prepared.train, recipe.objective.segments)
    kept = len(prepared.train) + len(prepared.validation)
    return {
        "read": len(prepared.train_whole)
        + len(prepared.validation)
        + sum(prepared.skipped.values())
        - (whole.examples - cut.examples),
        "kept": kept,
        "train": len(prepared.train),
        "validation": len(prepared.validation),
        "dropped": prepared.skipped,
        "not_used": prepared.unused,
        "segments": {
            s.name.lower(): {
                "before": int(whole.tokens[s]),
                "after": int(cut.tokens[s]),
                "supervised": int(cut.supervised[s]),
            }
            for s in Segment
        },
    }


def data_digest(prepared: Prepared) -> str:
    """16 hex digits over every token, segment end and loss mask of training and validation, in
    order.
    """
    digest = hashlib.sha256()
    for sequence in (*prepared.train, *prepared.validation):
        digest.update(f"{sequence.id} {sequence.prompt_end} {sequence.cot_end}".encode())
        digest.update(sequence.tokens.tobytes() + sequence.allowed.tobytes())
    return digest.hexdigest()[:16]


def sample_pieces(
    prepared: Prepared, recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", example: int = 0
) -> list[dict]:
    """One training example, token by token: its text, segment, whether the cut keeps it and whether
    it carries loss.
    """
    return [
        {
            "text": tokenizer.decode([int(token)], skip_special_tokens=False),
            "segment": run.segment.name.lower(),
            "kept": run.kept,
            "supervised": bool(learned),
        }
        for run in token_runs(prepared.train_whole[example], recipe)
        for token, learned in zip(run.tokens, run.learned, strict=True)
    ]
