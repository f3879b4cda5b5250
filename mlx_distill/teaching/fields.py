"""What a teacher cache is of: the fields that are digested into its folder's name.

In: a recipe's `[teacher]` table, the teacher's fingerprint and vocabulary. Out: `CacheFields`, the
name of the folder they belong to, and in which of them a manifest differs. Decided here: two caches
are the same where all fields are, and a field that was added later is missing where it says
nothing, so that older caches keep their names.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from mlx_distill.recipe.tables import TeacherTable

FORMAT = 1
ADDED_LATER = {"date": "", "arithmetic": "", "compute_dtype": ""}  # and what their absence means
# off by at most 2^-11 of the log-probability: see test_half_precision_moves_the_loss_by_less_than
LOG_PROB_DTYPE = "float16"


@dataclass(frozen=True)
class CacheFields:
    """What two caches can differ in. A field that does not matter to a kind is 0 or ""."""

    kind: str
    teacher_fingerprint: str
    quantize_bits: int | str
    tokenizer_digest: str  # of the vocabulary; the chat template's work is compared token by token
    vocabulary_rows: int  # ids that the teacher's softmax is over (hidden: rows of its head)
    top_k: int = 0
    samples: int = 0
    seed: int = 0  # of the draws
    dtype: str = ""  # of log-probabilities
    date: str = ""  # what prompts say, where their template reads the clock
    arithmetic: str = ""  # `reading_of` the teacher: older versions computed it otherwise
    compute_dtype: str = ""  # the teacher's, where a recipe asks for one
    format_version: int = FORMAT

    @classmethod
    def of(
        cls,
        table: TeacherTable,
        fingerprint: str,
        vocabulary: dict[str, int],
        rows: int,
        date: str = "",
        arithmetic: str = "",
        compute_dtype: str = "",
    ) -> "CacheFields":
        """What a recipe asks for; `rows` as for `vocabulary_rows`."""
        kind = table.cache
        return cls(
            kind=kind,
            teacher_fingerprint=fingerprint[:16],
            quantize_bits=table.quantize_bits,
            tokenizer_digest=_digest(sorted(vocabulary.items()))[:16],
            vocabulary_rows=rows,
            top_k=min(table.cache_top_k, rows) if kind == "top_k" else 0,
            samples=table.cache_samples if kind == "sampled" else 0,
            dtype=LOG_PROB_DTYPE if kind == "top_k" else "",
            date=date,
            arithmetic=arithmetic,
            compute_dtype=compute_dtype,
        )

    @property
    def name(self) -> str:
        """KIND-KEY: the cache's folder."""
        return f"{self.kind}-{_digest(self.content())[:12]}"

    def content(self) -> dict[str, Any]:
        """The fields as the manifest has them."""
        return {key: value for key, value in asdict(self).items() if ADDED_LATER.get(key) != value}

    def differing(self, found: dict[str, Any]) -> dict[str, Any]:
        """The fields in which a manifest's differ from these, with what the manifest has."""
        found = ADDED_LATER | found
        return {
            key: found.get(key, "nothing")
            for key, asked in asdict(self).items()
            if key not in found or found[key] != asked
        }


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
