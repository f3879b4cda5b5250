"""What a run is made from, for whoever reads it later: models, data, packages, machine, commit.

In: a recipe and what was prepared for it. Out: the `Manifest` that a run begins with. Everything is
asked of the machine or computed from the data; nothing is typed in.
"""

import hashlib
import json
import platform
import time
from pathlib import Path

from mlx_distill.backends.pair import Pair
from mlx_distill.backends.protocol import DeviceInfo
from mlx_distill.data.counts import count_tokens
from mlx_distill.data.prepare import Prepared
from mlx_distill.data.sequences import Segment
from mlx_distill.machine import git_commit, processor_name, versions
from mlx_distill.models.hub import model_fingerprint
from mlx_distill.models.reading import reading_of
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.runs.manifest import DataAccount, KnownModel, Manifest, SegmentTokens, Start


def make_manifest(pair: Pair, device: DeviceInfo, prepared: Prepared, steps: int) -> Manifest:
    """The manifest of a run that begins."""
    recipe = pair.recipe
    return Manifest(
        name=recipe.run.name,
        recipe_digest=recipe.digest(),
        created=time.strftime("%Y-%m-%d %H:%M:%S"),
        backend=device.backend,
        device=device.device,
        dtype=device.dtype,
        backend_reason=device.reason,
        versions=versions(),
        machine={
            "system": platform.platform(),
            "processor": processor_name(),
            "python": platform.python_version(),
        },
        git_commit=git_commit(),
        seed=recipe.run.seed,
        models={
            role: KnownModel(name=name, **identity(folder)) for role, name, folder in pair.models()
        },
        data=data_account(prepared, recipe),
        data_digest=data_digest(prepared),
        prompt_date=prepared.day,
        steps=steps,
    )


def identity(folder: Path) -> dict[str, str]:
    """What tells two models' numbers apart: fingerprint and, where mlx-lm alone computes other
    numbers than we do, whose they are.
    """
    arithmetic = reading_of(folder)
    return {"fingerprint": model_fingerprint(folder)} | (
        {"arithmetic": arithmetic} if arithmetic else {}
    )


def make_start(device: DeviceInfo, step: int) -> Start:
    """A start or continuation after `step` steps."""
    return Start(
        at_step=step,
        time=time.strftime("%Y-%m-%d %H:%M:%S"),
        backend=device.backend,
        device=device.device,
        dtype=device.dtype,
        versions=versions(),
        git_commit=git_commit(),
    )


def inputs_digest(manifest: Manifest) -> str:
    """16 hex digits over the models and the data of a manifest."""
    models = {role: model.content() for role, model in manifest.models.items()}
    content = json.dumps([models, manifest.data_digest], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def data_account(prepared: Prepared, recipe: Recipe) -> DataAccount:
    """What became of the examples, and of the training tokens."""
    whole = count_tokens(prepared.train_whole, recipe.objective.segments)
    cut = count_tokens(prepared.train, recipe.objective.segments)
    lost_to_the_cut = whole.examples - cut.examples
    return DataAccount(
        read=len(prepared.examples) + sum(prepared.skipped.values()) - lost_to_the_cut,
        kept=len(prepared.train) + len(prepared.validation),
        train=len(prepared.train),
        validation=len(prepared.validation),
        dropped=prepared.skipped,
        not_used=prepared.unused,
        segments={
            segment.name.lower(): SegmentTokens(
                before=int(whole.tokens[segment]),
                after=int(cut.tokens[segment]),
                supervised=int(cut.supervised[segment]),
            )
            for segment in Segment
        },
        whole=prepared.stay_whole,
        ended=sum(sequence.ending > 0 for sequence in prepared.train),
        ending_tokens=cut.ending,
    )


def data_digest(prepared: Prepared) -> str:
    """16 hex digits over every token, segment end, loss mask and ending of training and validation,
    in order.
    """
    digest = hashlib.sha256()
    for sequence in (*prepared.train, *prepared.validation):
        weight = "" if sequence.weight == 1 else f" {sequence.weight!r}"
        digest.update(f"{sequence.id} {sequence.prompt_end} {sequence.cot_end}{weight}".encode())
        digest.update(sequence.tokens.tobytes() + sequence.allowed.tobytes())
        if sequence.ending:
            digest.update(f"ending {sequence.ending}".encode())
    return digest.hexdigest()[:16]
