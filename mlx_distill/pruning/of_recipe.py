"""The pruned base that a recipe's student begins as: a folder that any number of runs may share.

    FOLDER/NAME-KEY/   config.json   model.safetensors   …   pruned.json

In: a pair, the recipe's sequences, a way to load the base. Out: the folder, made where it is not
there. Decided here: KEY digests all that the folder depends on: the base's numbers and documents
(its tokenizer's among them), `[prune]` and, where activations decide, the texts. `pruned.json` says
which parts stayed.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_distill.backends.pair import Pair
from mlx_distill.backends.protocol import Backend, LiveTeacher
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.errors import RunError
from mlx_distill.files import locked, sha256_of, told_as
from mlx_distill.models.config import Meaning
from mlx_distill.models.prune import ACCOUNT, Kept, Sizes, documents, prune
from mlx_distill.pruning.choice import chosen, refuse_larger
from mlx_distill.runs.provenance import identity
from mlx_distill.view import View

FORMAT = 1


class PrunedBase:
    """What `[prune]` leaves of the student's base."""

    def __init__(self, pair: Pair, sequences: Sequence[TokenSequence]):
        self.recipe, self.base, self.table = pair.recipe, pair.student, pair.recipe.prune.before
        self.name = self.recipe.student.model
        self.sizes = Sizes.of_meaning(Meaning(self.base, self.name))
        refuse_larger(self.table, self.sizes, self.name)
        measured = self.table.measures
        self.texts = [one.tokens for one in sequences[: self.table.examples]] if measured else []

    @cached_property
    def folder(self) -> Path:
        """Where it lies, or will."""
        key = hashlib.sha256(json.dumps(self._fields, sort_keys=True).encode()).hexdigest()[:12]
        return Path(self.table.folder) / f"{self.base.name}-{key}"

    def existing(self) -> Path:
        """The folder, where it was made already. Raises `RunError`."""
        if (self.folder / ACCOUNT).is_file():
            return self.folder
        raise RunError(
            f"{self.recipe.run.name}: the pruned model is not made yet: run `mlx-distill prune` on "
            "the recipe first"
        )

    @cached_property
    def _fields(self) -> dict[str, Any]:
        """What the folder depends on; the base's files are read through for it, so once."""
        fields = self.table.model_dump(
            exclude={"folder", "examples", "layers_by", "rounds", "until"}
        )
        by = self.table.layers_by if self.table.layers else "position"
        fields |= {"layers_by": by, "base": identity(self.base), "format_version": FORMAT}
        fields["documents"] = hashlib.sha256(
            "".join(f"{file.name} {sha256_of(file)}\n" for file in documents(self.base)).encode()
        ).hexdigest()
        if self.texts:
            texts = json.dumps([text.tolist() for text in self.texts])
            fields["texts"] = hashlib.sha256(texts.encode()).hexdigest()
        return fields

    def made(self, load: Callable[[], LiveTeacher], backend: Backend, view: View) -> Path:
        """The folder, made where it is not there; `load` gives the base where activations decide.

        Raises `RunError` where several ranks would have to make it, `ModelError` where the base
        cannot be pruned.
        """
        if (self.folder / ACCOUNT).is_file():
            view.say(f"student: pruned base {self.folder}")
            return self.folder
        if backend.ranks.size > 1:
            raise RunError(
                f"{self.recipe.run.name}: a base is pruned by one process, here are "
                f"{backend.ranks.size}: run `mlx-distill prune` on the recipe first, without a "
                "launcher"
            )
        root = Path(self.table.folder)
        with told_as(RunError, root):
            root.mkdir(parents=True, exist_ok=True)
            lock = root / f".{self.folder.name}.lock"
            with locked(lock, lambda: view.say(f"waiting for another process: {self.folder}")):
                if not (self.folder / ACCOUNT).is_file():
                    self._make(load, view)
        return self.folder

    def _make(self, load: Callable[[], LiveTeacher], view: View) -> None:
        activations = None
        if self.texts:
            view.say(f"pruning: {self.name} reads {len(self.texts)} examples")
            activations = load().activations(self.texts, self.sizes.head_dim)
        kept = chosen(self.table, self.sizes, activations)
        prune(self.base, self.folder, kept, self.name, self._account(kept))
        view.say(f"pruned base: {self.folder} ({described(kept, self.sizes)})")

    def _account(self, kept: Kept) -> dict[str, Any]:
        parts = {"channels": kept.channels, "kv_heads": kept.kv_heads}
        return self._fields | {
            "kept_layers": list(kept.layers),
            **{
                f"kept_{name}": {str(layer): places.tolist() for layer, places in part.items()}
                for name, part in parts.items()
                if part
            },
        }


def described(kept: Kept, sizes: Sizes) -> str:
    """For a person: how much of each kind stays."""
    parts = [f"{len(kept.layers)} of {sizes.layers} layers"]
    for places, there, what in (
        (kept.channels, sizes.channels, "MLP channels"),
        (kept.kv_heads, sizes.kv_heads, "key-value heads"),
    ):
        if places:
            parts.append(f"{len(next(iter(places.values())))} of {there} {what}")
    return ", ".join(parts)
