"""Asking the teacher once: what a cache lacks of some sequences is computed and written.

In: a cache, whole sequences, and a way to load the teacher. Out: parts on disk. A causal model's
outputs for the start of a text are the start of its outputs, so one pass over whole sequences
serves every cut that keeps what comes before, every segment set and every epoch. Decided here: one
process writes at a time; a part is written whenever there is enough for one, so a kill loses at
most that.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import numpy as np

from mlx_distill.backends.protocol import Backend, LiveTeacher
from mlx_distill.data.batches import Batch
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.errors import CacheError
from mlx_distill.files import left_overs, locked, told_as, write_json
from mlx_distill.recipe.training_tables import BatchTable
from mlx_distill.teaching.fields import CacheFields
from mlx_distill.teaching.folder import HEAD, MANIFEST, PART, TeacherCache
from mlx_distill.teaching.kinds import KINDS
from mlx_distill.teaching.parts import Example, write_part

PART_TOKENS = 2**17  # what a kill can lose
PART_BYTES = 2**28  # held in memory until a part is written


def fill(
    cache: TeacherCache,
    sequences: Sequence[TokenSequence],
    load: Callable[[], LiveTeacher],
    backend: Backend,
    table: BatchTable,
    made: dict,
    say: Callable[[str], None],
    count: Callable[[str, int], Callable[[int], None]],
) -> None:
    """Ask a teacher for what the cache lacks of `sequences`. `load` is called only if something is;
    `made` goes to the manifest.

    Every rank computes, the first one writes. A process that finds another one writing waits for
    it. After a kill the same call goes on at the last complete part, with the same batches.
    """

    def wait_for_all_ranks(lacking: int = 0) -> float:
        """How many sequences all of them lack together."""
        return backend.all_sum(np.array([float(lacking)]))[0]

    if not wait_for_all_ranks(len(cache.missing(sequences))):
        return
    with _only_writer(cache.path, say) if backend.ranks.first else nullcontext():
        wait_for_all_ranks()  # the first one has the lock now
        cache.refresh()  # another process may have written while we waited
        lacking = cache.missing(sequences)
        wait_for_all_ranks()  # nobody writes before all have looked
        if lacking:
            _say_what_lies_beside(cache, say)
            writer = _Writer(cache, made) if backend.ranks.first else None
            teacher = load()
            progress = count("asking the teacher", len(lacking))
            _teach(cache.fields, lacking, teacher, table, writer, progress)
        wait_for_all_ranks()  # all is written
    cache.refresh()


def _say_what_lies_beside(cache: TeacherCache, say: Callable[[str], None]) -> None:
    for name in cache.foreign():
        say(f"note: {cache.path / name} is no part of the cache and is left alone")
    if not cache.size()[0]:
        for line in cache.near():
            say(f"note: {line}")


def _teach(
    fields: CacheFields,
    sequences: list[TokenSequence],
    teacher: LiveTeacher,
    table: BatchTable,
    writer: "_Writer | None",
    progress: Callable[[int], None],
) -> None:
    if teacher.vocabulary_rows < fields.vocabulary_rows:
        raise CacheError(
            f"the teacher's head has {teacher.vocabulary_rows} rows, its config.json says "
            f"{fields.vocabulary_rows}"
        )
    if fields.kind == "hidden":
        head = _head_of(teacher)
        if writer:
            writer.write_head(head)
    kind, size = KINDS[fields.kind], table.micro_batch_size
    for start in range(0, len(sequences), size):
        group = sequences[start : start + size]
        outputs = kind.ask(teacher, whole_batch(group, table.pad_multiple), fields)
        if writer:
            writer.add(group, outputs)
        progress(len(group))
    if writer:
        writer.write_part()


def _head_of(teacher: LiveTeacher) -> np.ndarray:
    head = teacher.head_matrix()
    if head is None:
        raise CacheError(
            '[teacher] cache = "hidden" keeps the head as one matrix, and this teacher\'s is '
            'biased, capped or scaled: set cache = "top_k"'
        )
    return head


def whole_batch(sequences: Sequence[TokenSequence], pad_multiple: int) -> Batch:
    """A batch that asks for the outputs at each token; its own targets mean nothing."""
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    width = -(-int(lengths.max()) // pad_multiple) * pad_multiple
    tokens = np.zeros((len(sequences), width), np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : lengths[row]] = sequence.tokens
    positions = np.flatnonzero(np.arange(width) < lengths[:, None]).astype(np.int32)
    return Batch(
        tokens=tokens,
        positions=positions,
        targets=np.zeros(len(positions), np.int32),
        segment=np.zeros(len(positions), np.int8),
        weight=np.ones(len(positions), np.float32),
        lengths=lengths,
        ids=tuple(sequence.id for sequence in sequences),
    )


class _Writer:
    """Gathers outputs and writes a part whenever there are enough. The caller holds the lock."""

    def __init__(self, cache: TeacherCache, made: dict):
        self.cache = cache
        self._begin_part()
        manifest = cache.path / MANIFEST
        with _told(cache.path):
            for half_made in left_overs(cache.path, re.compile(f"{PART.pattern}|{HEAD}")):
                shutil.rmtree(half_made)
            if not manifest.exists():
                write_json(manifest, {"fields": cache.fields.content(), "made": made})

    def _begin_part(self) -> None:
        self._sequences: list[TokenSequence] = []
        self._outputs: list[dict[str, np.ndarray]] = []
        self._tokens = self._bytes = 0

    def write_head(self, matrix: np.ndarray) -> None:
        if not (self.cache.path / HEAD).exists():
            self._write(self.cache.path / HEAD, {"head": matrix}, [])

    def add(self, sequences: Sequence[TokenSequence], outputs: dict[str, np.ndarray]) -> None:
        tokens = np.concatenate([sequence.tokens for sequence in sequences]).astype(np.int32)
        self._sequences += sequences
        self._outputs.append({"tokens": tokens} | outputs)
        self._tokens += len(tokens)
        self._bytes += sum(array.nbytes for array in self._outputs[-1].values())
        if self._tokens >= PART_TOKENS or self._bytes >= PART_BYTES:
            self.write_part()

    def write_part(self) -> None:
        """What was gathered since the last one, if anything was."""
        if self._sequences:
            columns = {
                name: np.concatenate([outputs[name] for outputs in self._outputs])
                for name in self._outputs[0]
            }
            self._write(self.cache.next_part(), columns, self._examples(columns))
        self._begin_part()

    def _examples(self, columns: dict[str, np.ndarray]) -> list[Example]:
        """Where each sequence begins and ends among the tokens of the part, and where its draws
        begin (0 for a kind that does not draw).
        """
        draws = columns.get("distinct", np.zeros(self._tokens, np.uint16))
        draws_before = np.append(0, np.cumsum(draws, dtype=np.int64))
        examples, start = [], 0
        for sequence in self._sequences:
            stop = start + len(sequence)
            examples.append((sequence.id, start, stop, int(draws_before[start])))
            start = stop
        return examples

    def _write(self, path: Path, columns: dict[str, np.ndarray], examples: list[Example]) -> None:
        if not self.cache.path.is_dir():
            raise CacheError(
                f"{self.cache.path} was deleted while the teacher was asked: the same command makes "
                "it anew"
            )
        with _told(path):
            write_part(path, columns, examples)


@contextmanager
def _only_writer(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One writer at a time; the next one waits."""
    waiting = f"another process is writing {path}: waiting for it"
    with ExitStack() as stack:
        with _told(path):
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path / "write.lock", lambda: say(waiting)))
        yield


def _told(path: Path) -> AbstractContextManager[None]:
    """A failure to write as a `CacheError`."""
    elsewhere = "set teacher.cache_folder to another one"
    return told_as(CacheError, path, "complete parts are intact", elsewhere)
