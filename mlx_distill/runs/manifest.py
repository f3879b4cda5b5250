"""A run's `manifest.json`: what it was made from, where it ran, and what came out.

Every field has a default, since the file grows: `runs/provenance.py` makes what a run begins with,
each start adds itself, and the export and the end of a run add what they know.
"""

from typing import ClassVar

from pydantic import Field

from mlx_distill.runs.record import Count, Number, Record


class KnownModel(Record):
    """name: in the recipe. arithmetic: whose numbers they are, where mlx-lm alone computes others."""

    name: str = ""
    fingerprint: str = ""
    arithmetic: str = ""


class SegmentTokens(Record):
    """A segment's tokens in all training examples: whole, after the cut, and with loss."""

    before: Count
    after: Count
    supervised: Count


class DataAccount(Record):
    """Examples that were read, kept and dropped (by reason), what of the rows nothing read (by
    name), and training tokens by segment. whole: training examples that `truncation.whole_share`
    leaves uncut; ended: those that have an ending after their cut, of so many tokens in all.
    """

    read: Count = 0
    kept: Count = 0
    train: Count = 0
    validation: Count = 0
    dropped: dict[str, Count] = Field(default_factory=dict)
    not_used: dict[str, Count] = Field(default_factory=dict)
    segments: dict[str, SegmentTokens] = Field(default_factory=dict)
    whole: Count = 0
    ended: Count = 0
    ending_tokens: Count = 0


class Written(Record):
    """What a model wrote to be learned from: texts, those that ended by themselves, those held
    against an answer and those right among them, new tokens, the operations and the seconds that
    it took. flops is 0 where they were not counted.
    """

    by: str = ""
    texts: Count = 0
    finished: Count = 0
    judged: Count = 0
    right: Count = 0
    tokens: Count = 0
    flops: Number = 0.0
    seconds: Number = 0.0


class Start(Record):
    """One start or continuation: a run may move to another backend, machine or version."""

    at_step: Count = 0
    time: str = ""
    backend: str = ""
    device: str = ""
    dtype: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    git_commit: str = ""


class Manifest(Record):
    """exported_step: whose weights became the student, None before that. trained_steps: after how
    many of the planned `steps` training ended, None in manifests of versions that had no
    `optim.patience`. elapsed_seconds,
    tokens_read, loss_tokens and flops (by part, and `total`) are of the whole training. written:
    texts of a model that the run learned. logs, student_files: the SHA-256 of both logs and of each
    file of the student. card: of its README.md, which a person may change. prompt_date, tokens_read, loss_tokens
    and student_files are None in manifests of versions that did not keep them.
    """

    FILE: ClassVar[str] = "manifest.json"
    SEALED: ClassVar[bool] = True

    name: str = ""
    recipe_digest: str = ""
    created: str = ""
    backend: str = ""
    device: str = ""
    dtype: str = ""
    backend_reason: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, str] = Field(default_factory=dict)
    git_commit: str = ""
    seed: int | None = None
    models: dict[str, KnownModel] = Field(default_factory=dict)
    data: DataAccount | None = None
    data_digest: str = ""
    prompt_date: str | None = None
    steps: Count | None = None
    teacher_cache: str = ""
    written: Written | None = None
    starts: list[Start] = Field(default_factory=list)
    exported_step: Count | None = None
    trained_steps: Count | None = None
    elapsed_seconds: Number | None = None
    tokens_read: Count | None = None
    loss_tokens: Count | None = None
    flops: dict[str, Number] = Field(default_factory=dict)
    logs: dict[str, str] = Field(default_factory=dict)
    student_files: dict[str, str] | None = None
    card: str = ""
    finished: bool = False

    @property
    def day(self) -> str:
        """What prompts said; older versions rendered them on the day on which the run was made."""
        return self.created[:10] if self.prompt_date is None else self.prompt_date

    @property
    def total_flops(self) -> float:
        """0 where they were not counted."""
        return self.flops.get("total", 0.0)
