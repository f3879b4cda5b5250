"""A run's inputs, its models and its data, and whether they are what the run began with.

In: a run folder, and models as they lie there now. Out: the manifest, written or completed, or a
`RunError`: numbers of a run whose inputs changed on the way would be nobody's.
"""

from pathlib import Path
from typing import Any

from mlx_distill.backends.pair import Pair
from mlx_distill.backends.protocol import DeviceInfo
from mlx_distill.data.prepare import Prepared
from mlx_distill.errors import RunError
from mlx_distill.models.hub import model_fingerprint
from mlx_distill.models.reading import reading_of
from mlx_distill.runs.manifest import Manifest
from mlx_distill.runs.provenance import inputs_digest, make_manifest, make_start
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.runs.small_files import Say


def begin(
    folder: RunFolder,
    pair: Pair,
    prepared: Prepared,
    steps: int,
    device: DeviceInfo,
    teacher_cache: str,
    say: Say,
) -> str:
    """Write or complete the manifest; returns the digest of models and data, which checkpoints keep
    too.

    Raises `RunError` where these are not what the run began with.
    """
    kept = folder.readable(Manifest, say, "it is written again")
    last = folder.last_state(pair.recipe.run.export == "best")
    manifest = make_manifest(pair, device, prepared, steps)
    inputs = inputs_digest(manifest)
    if kept.models and kept.models != manifest.models:
        raise _changed(folder, "a model's files")
    if kept.data_digest not in ("", manifest.data_digest):
        raise _changed(folder, "the data")
    if last.inputs_digest not in ("", inputs):
        raise _changed(folder, "a model's files or the data")
    known: dict[str, Any] = {"teacher_cache": teacher_cache} if teacher_cache else {}
    known |= {name: getattr(kept, name) for name in kept.model_fields_set}
    known["starts"] = [*kept.starts, make_start(device, last.step)]
    folder.write(manifest.model_copy(update=known))
    return inputs


def refuse_older_arithmetic(folder: RunFolder, pair: Pair) -> None:
    """Raises `RunError` for a run of a version that read a model's config.json as mlx-lm alone
    does, and so computed other numbers.
    """
    began = folder.readable(Manifest).models
    for role, name, path in pair.models():
        if role in began and began[role].arithmetic != reading_of(path):
            raise RunError(
                f"{folder.path}: this run was begun by a version that read the {role}'s "
                f"config.json ({name}) otherwise, so its numbers "
                "are not those of this version; start over with --fresh"
            )


def refuse_changed_model(folder: RunFolder, role: str, path: Path, scored_as: str) -> None:
    """Raises `RunError` if the model that is to be scored is not the one that the run began with."""
    known = folder.read(Manifest).models.get(role)
    if known and known.fingerprint != model_fingerprint(path):
        raise _changed(folder, f"a model's files (the {scored_as}'s)")


def _changed(folder: RunFolder, what: str) -> RunError:
    return RunError(
        f"{folder.path}: {what} changed since this run began; restore the old ones or start over "
        "with --fresh"
    )
