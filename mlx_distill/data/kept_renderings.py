"""Sequences that examples were rendered to, kept on disk for the next start.

In: a tokenizer, and all else that a rendering depends on. Out: sequences by example, read from
files that are mapped into memory, so that rows of any number cost little of it. Decided here: an
example is known by the digest of its content, a kept rendering by the digest of tokenizer,
templates, day, versions and the code of this room; a part that is not as it was written is not
read. A start that renders few examples keeps nothing: reading them again would not be faster.

    FOLDER/KEY/part-ID/   tokens.npy   int32, of all sequences one after another
                          rows.json    [[id, tokens, prompt_end, cot_end, closing, unused], …] and
                                       what could not be rendered, with its reason; both digests
"""

import hashlib
import json
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlx_distill.caches import forget_unused, kept_for_later, mark_used
from mlx_distill.data.examples import Skip
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.errors import DistillError
from mlx_distill.files import made_whole, sha256_of, write_json
from mlx_distill.machine import versions
from mlx_distill.readers import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORTH_KEEPING = 2_000  # examples: some seconds of rendering
TOKENS, ROWS = "tokens.npy", "rows.json"


class Rendered(NamedTuple):
    """What became of an example: its sequence, or why there is none; what its template has no use
    for, with how often.
    """

    found: TokenSequence | Skip
    unused: Counter[str]


@dataclass(frozen=True)
class _Place:
    """Where a kept sequence lies: from `begin` on in `tokens`, and its ends."""

    tokens: np.ndarray
    begin: int
    length: int
    ends: tuple[int, int, int]
    unused: dict[str, int]


class KeptRenderings:
    """The renderings of one key; new ones are held until `keep`."""

    def __init__(self, key: str):
        self.folder = kept_for_later("renderings") / key
        self._places: dict[str, _Place] = {}
        self._skipped: dict[str, tuple[str, dict[str, int]]] = {}
        self._new: dict[str, Rendered] = {}
        mark_used(self.folder)
        self._broken = [part for part in sorted(self.folder.glob("part-*")) if not self._read(part)]

    def find(self, name: str) -> Rendered | None:
        """The rendering of the example of this id, if it is kept."""
        if name in self._skipped:
            reason, unused = self._skipped[name]
            return Rendered(Skip(reason), Counter(unused))
        place = self._places.get(name)
        if place is None:
            return None
        tokens = place.tokens[place.begin : place.begin + place.length]
        prompt_end, cot_end, closing = place.ends
        allowed = np.ones(place.length, bool)
        sequence = TokenSequence(name, tokens, prompt_end, cot_end, allowed, closing)
        return Rendered(sequence, Counter(place.unused))

    def add(self, made: dict[str, Rendered]) -> None:
        """Remember what was rendered now."""
        self._new |= made

    def keep(self) -> None:
        """Write what is new, where that is worth it; a folder that cannot be written costs no more
        than another rendering.
        """
        if len(self._new) < WORTH_KEEPING:
            return
        texts: list[np.ndarray] = []
        rows: list[list[Any]] = []
        skipped: dict[str, list[Any]] = {}
        for name, (found, unused) in self._new.items():
            if isinstance(found, Skip):
                skipped[name] = [str(found), unused]
            else:
                texts.append(found.tokens)
                ends = found.prompt_end, found.cot_end, found.closing
                rows.append([name, len(found), *ends, unused])
        digest = hashlib.sha256("".join(self._new).encode()).hexdigest()[:16]
        with suppress(OSError, DistillError):
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self._broken:
                shutil.rmtree(part)
            with made_whole(self.folder / f"part-{digest}") as part:
                np.save(part / TOKENS, np.concatenate([*texts, np.zeros(0, np.int32)]))
                said: dict[str, Any] = {
                    "tokens": sha256_of(part / TOKENS),
                    "rows": rows,
                    "skipped": skipped,
                }
                write_json(part / ROWS, {"sha256": _digest(said), **said})
        self._new = {}
        forget_unused(self.folder.parent)

    def _read(self, part: Path) -> bool:
        """A part that is whole; nothing of another, which is False."""
        try:
            said = read_json(part / ROWS, ROWS)
            whole = said.pop("sha256") == _digest(said)
            if not whole or sha256_of(part / TOKENS) != said["tokens"]:
                return False
            tokens = np.asarray(np.load(part / TOKENS, mmap_mode="r"))
        except (DistillError, OSError, ValueError, KeyError, AttributeError, TypeError):
            return False
        begin = 0
        for name, length, *ends, unused in said["rows"]:
            self._places[name] = _Place(tokens, begin, length, (ends[0], ends[1], ends[2]), unused)
            begin += length
        self._skipped |= {
            name: (reason, unused) for name, (reason, unused) in said["skipped"].items()
        }
        return True


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def rendering_key(tokenizer: "PreTrainedTokenizerFast", *settings: object) -> str:
    """Digits of everything that renderings depend on beside the examples."""
    here = Path(__file__).parent
    code = [sha256_of(file) for file in sorted(here.glob("*.py"))]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = [
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        special,
        versions(),
        code,
        settings,
    ]
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:32]
