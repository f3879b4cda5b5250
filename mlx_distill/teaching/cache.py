"""A teacher's answers on disk: asked once for whole sequences, read by any number of runs.

In: whole sequences and a loaded teacher. Out: a folder that can be killed, read and copied at any
moment, and `CachedTeacher`, which answers batches from it without the teacher's weights. A causal
model's answers to the start of a text are the start of its answers, so one pass over whole
sequences serves every cut that keeps what comes before, every segment set and every epoch.

    CACHE_FOLDER/KIND-KEY/  manifest.json   write.lock   head/ (hidden)
                            part-000000/ {index.json, tokens.npy, …}   part-000001/ …

Decided here: what is kept for a token (`KINDS`), and when a cache is refused. KEY digests the
manifest's fields, which are also compared one by one. A part appears by one rename and holds the
SHA-256 of each of its files, checked before a file is first used. Answers are found by an example's
id and its tokens: a batch's row must be the start of a kept sequence of that id, so another
template, other data or another order of examples can do no harm. The answer at token t is to
tokens[: t + 1]; temperature is 1. Axes: `B` sequences, `T` tokens, `N` loss positions or tokens,
`K` kept answers, `S` draws, `V` vocabulary, `D` width.
"""

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_distill.backends.protocol import Backend, SparseTargets, Targets, Teacher, check_indices
from mlx_distill.data.batches import Batch
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.errors import CacheError, DistillError, NotFound
from mlx_distill.files import (
    left_overs,
    locked,
    made_whole,
    one_line,
    remedy,
    sha256_of,
    write_json,
)
from mlx_distill.readers import read_json
from mlx_distill.recipe.tables import BatchTable, TeacherTable

FORMAT = 1
PART_TOKENS = 2**17  # what a kill can lose
PART_BYTES = 2**28  # held in memory until a part is written
DRAW_SEED = 0
ADDED = {"date": "", "arithmetic": ""}  # fields that older caches lack, and what their lack means
# off by at most 2^-11 of the log-probability: see test_half_precision_moves_the_loss_by_less_than
LOG_PROB_DTYPE = "float16"
PART = re.compile(r"part-([0-9]{6,})")
ROUND_K = 8  # drawn answers are padded to a multiple, to keep shapes few


@dataclass(frozen=True)
class CacheFields:
    """What two caches can differ in. A field that does not matter to a kind is 0 or ""."""

    kind: str
    teacher_fingerprint: str
    quantize_bits: int
    tokenizer_digest: str  # of the vocabulary; the chat template's work is compared token by token
    vocabulary_rows: int  # ids that the teacher's softmax is over (hidden: rows of its head)
    top_k: int = 0
    samples: int = 0
    seed: int = 0
    dtype: str = ""  # of log-probabilities
    date: str = ""  # what prompts say, where their template reads the clock
    arithmetic: str = (
        ""  # `models.config.reading_of` the teacher: older versions computed it otherwise
    )
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
    ) -> "CacheFields":
        """What a recipe asks for; `rows` as for `vocabulary_rows`."""
        digest = hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()[:16]
        fields = cls(
            table.cache,
            fingerprint[:16],
            table.quantize_bits,
            digest,
            rows,
            date=date,
            arithmetic=arithmetic,
        )
        if table.cache == "top_k":
            return dataclasses.replace(
                fields, top_k=min(table.cache_top_k, rows), dtype=LOG_PROB_DTYPE
            )
        return (
            dataclasses.replace(fields, samples=table.cache_samples, seed=DRAW_SEED)
            if table.cache == "sampled"
            else fields
        )

    @property
    def name(self) -> str:
        """KIND-KEY: the cache's folder."""
        return f"{self.kind}-{hashlib.sha256(json.dumps(self.content()).encode()).hexdigest()[:12]}"

    def content(self) -> dict[str, Any]:
        """The fields as the manifest has them; without those that were added later where they say
        nothing, as caches had it.
        """
        return {
            key: value for key, value in dataclasses.asdict(self).items() if ADDED.get(key) != value
        }


class Record(NamedTuple):
    """Where the answers to one sequence lie: tokens `start:stop` of a part, drawn answers from
    `first` on.
    """

    part: "Part"
    start: int
    stop: int
    first: int


class Part:
    """One part's files, each checked against its SHA-256 and memory-mapped when it is first asked
    for.
    """

    def __init__(self, path: Path):
        self.path, self._checked = path, set()
        file = path / "index.json"
        try:
            index = read_json(file, error=CacheError)
        except (CacheError, NotFound) as error:
            raise CacheError(f"{error}: {_ADVICE}") from None
        wrong = _trouble(index)
        if wrong:
            raise CacheError(f"{file} is damaged ({wrong}): {_ADVICE}")
        self.sha256: dict[str, str] = index["sha256"]
        self.examples: list[tuple[str, int, int, int]] = index["examples"]
        self._check_drawn(file)

    def _check_drawn(self, file: Path) -> None:
        """Where an example's drawn answers begin follows from how many each token before it has."""
        if "distinct" in self.sha256:
            drawn = np.cumsum(self.array("distinct").astype(np.int64))
            begins = (
                [0, *(int(drawn[stop - 1]) for _, _, stop, _ in self.examples)]
                if self.examples
                else []
            )
            if any(
                first != begin for (*_, first), begin in zip(self.examples, begins, strict=False)
            ):
                raise CacheError(
                    f"{file} is damaged (an example's drawn answers begin elsewhere): {_ADVICE}"
                )

    def array(self, name: str) -> np.ndarray:
        """Memory-mapped; for each token of the part, or each drawn answer."""
        if name not in self.sha256:
            raise CacheError(f"{self.path / 'index.json'} is damaged (it has no {name}): {_ADVICE}")
        file, expected = self.path / f"{name}.npy", self.sha256[name]
        try:
            if name not in self._checked:
                found = sha256_of(file)
                if found != expected:
                    raise CacheError(
                        f"{file}: SHA-256 {expected[:12]}… expected, {found[:12]}… found: {_ADVICE}"
                    )
                self._checked.add(name)
            return _mapped(file, expected)
        except OSError as error:
            raise CacheError(f"{file} cannot be read ({one_line(error)}): {_ADVICE}") from None

    def records(self) -> Iterator[tuple[str, Record]]:
        for example, start, stop, first in self.examples:
            yield example, Record(self, start, stop, first)


@lru_cache(maxsize=64)  # each holds a file descriptor, of which macOS gives a process 256
def _mapped(file: Path, sha256: str) -> np.ndarray:
    return np.load(file, mmap_mode="r")


_ADVICE = "delete this part's folder and run `mlx-distill teach` again, which makes what is missing"


def _trouble(index: Any) -> str:
    """What is wrong with a part's index, "" if nothing is."""
    if not isinstance(index, dict) or not isinstance(index.get("sha256"), dict):
        return "it holds no digests"
    if not all(isinstance(digest, str) for digest in index["sha256"].values()):
        return "a digest is no text"
    if not isinstance(index.get("examples"), list):
        return "it holds no examples"
    end = 0
    for row in index["examples"]:
        if not isinstance(row, list) or [type(value) for value in row] != [str, int, int, int]:
            return "an example is not an id and three numbers"
        _, start, stop, first = row
        if start != end or stop <= start or first < 0:
            return f"example {row[0]!r} does not begin where the one before it ends"
        end = stop
    return ""


def _read_manifest(path: Path) -> dict[str, Any]:
    """The fields of the cache in a folder."""
    file, advice = (
        path / "manifest.json",
        f"delete the folder {path}, or put a copy of the file in its place",
    )
    try:
        content = read_json(file, error=CacheError)
    except CacheError as error:
        raise CacheError(f"{error}: {advice}") from None
    if not isinstance(content, dict) or not isinstance(content.get("fields"), dict):
        raise CacheError(f"{file} is damaged (it holds no fields): {advice}")
    return content["fields"]


class TeacherCache:
    """The cache of these fields under `root`; made if there is none. Reading needs no lock: what is
    there is complete.
    """

    def __init__(self, root: Path, fields: CacheFields):
        self.root, self.fields, self.path = root, fields, root / fields.name
        self._parts: dict[str, Part] = {}
        self._records: dict[str, list[Record]] = {}
        self.refresh()

    @classmethod
    def at(cls, path: Path) -> "TeacherCache":
        """The cache that lies in a folder; raises `CacheError` where none does."""
        try:
            return cls(path.parent, CacheFields(**_read_manifest(path)))
        except (NotFound, TypeError) as error:
            raise CacheError(f"{path} holds no teacher cache of this version ({error})") from None

    def refresh(self) -> None:
        """See what other processes have written since. Raises `CacheError` if the manifest is not
        of these fields.
        """
        manifest = self.path / "manifest.json"
        if not manifest.exists():
            return
        found = ADDED | _read_manifest(self.path)
        for field, asked in dataclasses.asdict(self.fields).items():
            if found.get(field) != asked:
                raise CacheError(
                    f"{manifest}: {field} {asked!r} asked, {found.get(field, 'nothing')!r} found: "
                    "set teacher.cache_folder to another folder or delete this cache"
                )
        for path in self.part_folders():
            if path.name not in self._parts:
                self._parts[path.name] = part = Part(path)
                for example, record in part.records():
                    self._records.setdefault(example, []).append(record)

    def part_folders(self) -> list[Path]:
        """The folders of the parts, in order; what has another name is somebody else's."""
        found = (
            path for path in self.path.glob("part-*") if PART.fullmatch(path.name) and path.is_dir()
        )
        return sorted(found, key=lambda path: int(path.name.removeprefix("part-")))

    def foreign(self) -> list[str]:
        """Names in the folder that look like parts and are not."""
        ours = {path.name for path in self.part_folders()}
        return sorted(path.name for path in self.path.glob("part-*") if path.name not in ours)

    def near(self) -> list[str]:
        """For each other cache under the root: its name and in which fields it differs."""
        found = []
        for manifest in sorted(self.root.glob(f"{self.fields.kind}-*/manifest.json")):
            try:
                fields = _read_manifest(manifest.parent)
            except (CacheError, NotFound):
                continue  # not ours to mend
            fields = ADDED | fields
            differing = [
                f"{key} {fields.get(key)!r} (asked: {value!r})"
                for key, value in dataclasses.asdict(self.fields).items()
                if fields.get(key) != value
            ]
            if differing:
                found.append(f"{manifest.parent.name} has {', '.join(differing)}")
        return found

    def find(self, example: str, tokens: np.ndarray) -> Record | None:
        """The record of which `tokens` [T] are the start."""
        for record in self._records.get(example, ()):
            if record.stop - record.start >= len(tokens):
                kept = record.part.array("tokens")[record.start : record.start + len(tokens)]
                if np.array_equal(kept, tokens):
                    return record
        return None

    def missing(self, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
        """Those without answers, each once, in the order in which they are asked: the same after a
        kill.
        """
        wanted = {(sequence.id, sequence.tokens.tobytes()): sequence for sequence in sequences}
        lacking = (
            sequence
            for sequence in wanted.values()
            if self.find(sequence.id, sequence.tokens) is None
        )
        return sorted(lacking, key=lambda sequence: (len(sequence), sequence.id))

    @cached_property
    def head(self) -> np.ndarray:
        """The teacher's head [V, D] (hidden)."""
        return Part(self.path / "head").array("head")

    def size(self) -> tuple[int, int, int]:
        """Examples, tokens and bytes."""
        kept = [record for records in self._records.values() for record in records]
        files = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        return len(kept), sum(record.stop - record.start for record in kept), files


def dates_of(root: Path, fields: CacheFields) -> list[str]:
    """The dates of the caches under a folder that are of these fields but for the date, the newest
    first.
    """
    dates = []
    for manifest in root.glob(f"{fields.kind}-*/manifest.json"):
        try:
            found = read_json(manifest)["fields"]
            same = ADDED | found | {"date": ""} == dataclasses.asdict(fields) | {"date": ""}
        except (DistillError, KeyError, TypeError):
            continue  # not ours to mend
        if same and isinstance(found.get("date"), str):
            dates.append(found["date"])
    return sorted(filter(None, dates), reverse=True)


class CachedTeacher:
    """A `Teacher` that answers from a cache: it can be asked for targets, and for nothing else."""

    def __init__(self, cache: TeacherCache, backend: Backend):
        self.cache, self.backend, self.vocabulary_rows = (
            cache,
            backend,
            cache.fields.vocabulary_rows,
        )
        self._read = KINDS[cache.fields.kind].read

    def targets(self, batch: Batch) -> Targets:
        """Raises `CacheError`, which names the example, where a row is not the start of a kept
        sequence.
        """
        check_indices("loss positions", batch.positions, batch.tokens.size)
        rows, places = np.divmod(batch.positions.astype(np.int64), batch.tokens.shape[1])
        asked = [(row, self._record(batch, row)) for row in np.unique(rows)]
        return self._read(
            self, [(record, rows == row, places[rows == row]) for row, record in asked], len(rows)
        )

    def _record(self, batch: Batch, row: int) -> Record:
        tokens = batch.tokens[row, : batch.lengths[row]]
        record = self.cache.find(batch.ids[row], tokens)
        if record is None:
            raise CacheError(
                f"{self.cache.path}: example {batch.ids[row]!r}: its {len(tokens)} tokens are not "
                "the start of a sequence that is kept under this id: run `mlx-distill teach` with "
                "this recipe"
            )
        return record

    @cached_property
    def head(self) -> Any:
        return self.backend.cached_head(np.array(self.cache.head))


# What is kept for each token: a kind asks the teacher for named arrays [N, …] and reads targets
# back.

Asked = list[
    tuple[Record, np.ndarray, np.ndarray]
]  # (record, which of the N positions, their tokens t in the sequence)


class TopK:
    """`ids` uint32 [N, K], the likeliest first, `log_probs` float16 [N, K], `tail` float32 [N]: the
    log of all others' mass.
    """

    @staticmethod
    def ask(teacher: Teacher, batch: Batch, fields: CacheFields) -> dict[str, np.ndarray]:
        ids, log_probs, tail = teacher.top_k(batch, fields.top_k, fields.vocabulary_rows)
        return {
            "ids": ids.astype(np.uint32),
            "log_probs": log_probs.astype(fields.dtype),
            "tail": tail,
        }

    @staticmethod
    def read(teacher: CachedTeacher, asked: Asked, count: int) -> SparseTargets:
        k = teacher.cache.fields.top_k
        ids, log_probs, tail = (
            np.empty((count, k), np.int32),
            np.empty((count, k), np.float32),
            np.empty(count, np.float32),
        )
        for record, chosen, places in asked:
            for out, name in ((ids, "ids"), (log_probs, "log_probs"), (tail, "tail")):
                out[chosen] = record.part.array(name)[record.start + places]
        return SparseTargets(ids, log_probs, tail, np.zeros(count, np.float32), ids[:, 0].copy())


class Sampled:
    """Draws with replacement from the teacher's distribution: Sparse Logit Sampling (arXiv
    2503.16870) at proposal temperature 1.

    `distinct` uint16 [N]: different ids of each token's draws; `ids` uint32 and `counts` uint16 of
    all of them in one row; `entropy` float32 [N] of the teacher, `top` uint32 [N]. counts / S is an
    unbiased estimate of the teacher's distribution, so loss (with the exact entropy) and gradient
    of forward KL are unbiased. The S draws are stratified, one from each S-th of the cumulated
    distribution: as unbiased as independent ones, with less variance.
    """

    @staticmethod
    def ask(teacher: Teacher, batch: Batch, fields: CacheFields) -> dict[str, np.ndarray]:
        uniform = np.concatenate(
            [
                _uniform(example, length, fields)
                for example, length in zip(batch.ids, batch.lengths, strict=True)
            ]
        )
        drawn, entropy, top = teacher.draw(batch, uniform, fields.vocabulary_rows)
        drawn = np.sort(drawn, axis=1)
        first = np.ones(drawn.shape, bool)
        first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        counts = np.diff(np.append(np.flatnonzero(first), drawn.size))
        return {
            "distinct": first.sum(1).astype(np.uint16),
            "ids": drawn[first].astype(np.uint32),
            "counts": counts.astype(np.uint16),
            "entropy": entropy,
            "top": top.astype(np.uint32),
        }

    @staticmethod
    def read(teacher: CachedTeacher, asked: Asked, count: int) -> SparseTargets:
        parts = [Sampled._rows(record, places) for record, _, places in asked]
        width = -(-max(ids.shape[1] for ids, *_ in parts) // ROUND_K) * ROUND_K
        ids, counts = np.full((count, width), -1, np.int32), np.zeros((count, width), np.float32)
        entropy, top = np.empty(count, np.float32), np.empty(count, np.int32)
        for (_, chosen, _), (part_ids, part_counts, part_entropy, part_top) in zip(
            asked, parts, strict=True
        ):
            ids[chosen, : part_ids.shape[1]], counts[chosen, : part_ids.shape[1]] = (
                part_ids,
                part_counts,
            )
            entropy[chosen], top[chosen] = part_entropy, part_top
        share = counts / teacher.cache.fields.samples
        with np.errstate(divide="ignore"):
            log_probs = np.log(share)
        offset = -(share * np.where(share > 0, log_probs, 0)).sum(1) - entropy
        return SparseTargets(
            ids, log_probs, np.full(count, -np.inf, np.float32), offset.astype(np.float32), top
        )

    @staticmethod
    def _rows(record: Record, places: np.ndarray) -> tuple[np.ndarray, ...]:
        """Ids [n, K] (-1 pads), counts [n, K], entropy [n] and top [n] at some tokens of a
        sequence.
        """
        part, here = record.part, record.start + places
        distinct = part.array("distinct")[record.start : record.stop].astype(np.int64)
        begins = record.first + np.cumsum(distinct) - distinct
        columns = np.arange(distinct[places].max())
        known = columns < distinct[places, None]
        where = np.where(known, begins[places, None] + columns, record.first)
        ids = np.where(known, part.array("ids")[where].astype(np.int64), -1)
        return (
            ids,
            np.where(known, part.array("counts")[where], 0),
            part.array("entropy")[here],
            part.array("top")[here],
        )


class Hidden:
    """`states` [N, D] as the backend computes them: float32, or bfloat16 as uint16 bits. The head
    is kept once.
    """

    @staticmethod
    def ask(teacher: Teacher, batch: Batch, fields: CacheFields) -> dict[str, np.ndarray]:
        return {"states": teacher.states(batch)}

    @staticmethod
    def read(teacher: CachedTeacher, asked: Asked, count: int) -> Targets:
        found = [record.part.array("states")[record.start + places] for record, _, places in asked]
        if len({rows.dtype for rows in found}) > 1:  # parts of two backends
            found = [_from_bits(rows) if rows.dtype == np.uint16 else rows for rows in found]
        states = np.empty((count, found[0].shape[1]), found[0].dtype)
        for (_, chosen, _), rows in zip(asked, found, strict=True):
            states[chosen] = rows
        return teacher.backend.cached_targets(states, teacher.head)


KINDS = {"top_k": TopK, "sampled": Sampled, "hidden": Hidden}


def _uniform(example: str, length: int, fields: CacheFields) -> np.ndarray:
    """float32 [T, S] in [0, 1), one in each S-th; a longer sequence of the same id has the same
    ones at the start.
    """
    digest = int.from_bytes(hashlib.sha256(example.encode()).digest()[:8], "little")
    random = np.random.default_rng([fields.seed, digest]).random((length, fields.samples))
    below_one = np.nextafter(np.float32(1), np.float32(0))
    return np.minimum(
        ((np.arange(fields.samples) + random) / fields.samples).astype(np.float32), below_one
    )


def _from_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


# Writing


def fill(
    cache: TeacherCache,
    sequences: Sequence[TokenSequence],
    load: Callable[[], Teacher],
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
    if not backend.all_sum(np.array([float(len(cache.missing(sequences)))]))[0]:
        return
    with _lock(cache.path, say) if backend.ranks.first else nullcontext():
        backend.all_sum(np.zeros(1))
        cache.refresh()
        lacking = cache.missing(sequences)
        backend.all_sum(np.zeros(1))  # nobody writes before all have looked
        if lacking:
            for name in cache.foreign():
                say(f"note: {cache.path / name} is no part of the cache and is left alone")
            for line in cache.near() if not cache.size()[0] else ():
                say(f"note: {line}")
            writer = _Writer(cache, made) if backend.ranks.first else None
            _teach(
                cache.fields,
                lacking,
                load(),
                table,
                writer,
                count("asking the teacher", len(lacking)),
            )
        backend.all_sum(np.zeros(1))
    cache.refresh()


def _teach(
    fields: CacheFields,
    sequences: list[TokenSequence],
    teacher: Teacher,
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
        head = teacher.head_matrix()
        if head is None:
            raise CacheError(
                '[teacher] cache = "hidden" keeps the head as one matrix, and this teacher\'s is '
                "biased, capped or scaled: "
                'set cache = "top_k"'
            )
        if writer:
            writer.head(head)
    kind, size = KINDS[fields.kind], table.micro_batch_size
    for group in (sequences[start : start + size] for start in range(0, len(sequences), size)):
        answers = kind.ask(teacher, whole_batch(group, table.pad_multiple), fields)
        if writer:
            writer.add(group, answers)
        progress(len(group))
    if writer:
        writer.flush()


def whole_batch(sequences: Sequence[TokenSequence], pad_multiple: int) -> Batch:
    """A batch that asks for the answer at each token of whole sequences; its targets mean nothing."""
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    width = -(-int(lengths.max()) // pad_multiple) * pad_multiple
    tokens = np.zeros((len(sequences), width), np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : lengths[row]] = sequence.tokens
    positions = np.flatnonzero(np.arange(width) < lengths[:, None]).astype(np.int32)
    zeros = np.zeros(len(positions), np.int32)
    ids = tuple(sequence.id for sequence in sequences)
    return Batch(
        tokens,
        positions,
        zeros,
        zeros.astype(np.int8),
        np.ones(len(positions), np.float32),
        lengths,
        ids,
    )


class _Writer:
    """Gathers answers and writes a part whenever there are enough. The caller holds the lock."""

    def __init__(self, cache: TeacherCache, made: dict):
        self.path = cache.path
        with _explained(self.path):
            for left in left_overs(self.path, re.compile(f"{PART.pattern}|head")):
                shutil.rmtree(left)
            if not (self.path / "manifest.json").exists():
                write_json(
                    self.path / "manifest.json", {"fields": cache.fields.content(), "made": made}
                )
        self._begin()

    def _begin(self) -> None:
        self._columns: dict[str, list[np.ndarray]] = {}
        self._examples: list[tuple[str, int, int, int]] = []
        self._tokens = self._drawn = self._bytes = 0

    def head(self, matrix: np.ndarray) -> None:
        if not (self.path / "head").exists():
            self._write("head", {"head": matrix}, [])

    def add(self, sequences: Sequence[TokenSequence], answers: dict[str, np.ndarray]) -> None:
        answers = {
            "tokens": np.concatenate([sequence.tokens for sequence in sequences]).astype(np.int32)
        } | answers
        distinct = answers.get("distinct", np.zeros(len(answers["tokens"]), np.uint16))
        before = 0
        for sequence in sequences:
            stop = before + len(sequence)
            self._examples.append(
                (sequence.id, self._tokens, self._tokens + len(sequence), self._drawn)
            )
            self._tokens, self._drawn, before = (
                self._tokens + len(sequence),
                self._drawn + int(distinct[before:stop].sum()),
                stop,
            )
        for name, array in answers.items():
            self._columns.setdefault(name, []).append(array)
            self._bytes += array.nbytes
        if self._tokens >= PART_TOKENS or self._bytes >= PART_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._examples:
            numbers = [
                int(match[1])
                for path in self.path.iterdir()
                if (match := PART.fullmatch(path.name))
            ]
            columns = {name: np.concatenate(arrays) for name, arrays in self._columns.items()}
            self._write(f"part-{max(numbers, default=-1) + 1:06d}", columns, self._examples)
        self._begin()

    def _write(self, name: str, columns: dict[str, np.ndarray], examples: list) -> None:
        """A folder of arrays and their index, whole or not at all."""
        with _explained(self.path / name), made_whole(self.path / name) as half:
            for column, array in columns.items():
                np.save(half / f"{column}.npy", array)
            digests = {column: sha256_of(half / f"{column}.npy") for column in columns}
            (half / "index.json").write_text(
                json.dumps({"sha256": digests, "examples": examples}), encoding="utf-8"
            )


@contextmanager
def _lock(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One writer at a time; the next one waits."""
    with ExitStack() as stack:
        with _explained(path):
            path.mkdir(parents=True, exist_ok=True)
            waiting = f"another process is writing {path}: waiting for it"
            stack.enter_context(locked(path / "write.lock", lambda: say(waiting)))
        yield


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn a failure to write into a `CacheError`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, DistillError):
            raise
        raise CacheError(
            f"{path}: cannot be written ({one_line(error)}); complete parts are intact: "
            f"{remedy(error)}, or set teacher.cache_folder to another one"
        ) from error
