"""Every table of a recipe: its fields, each with its type, its default and a sentence about it.

A field is added here and nowhere else: its range and its choices are in its type, the sentence
under it is its line in `recipes/reference.toml` (`python -m mlx_distill.recipe.reference` writes
that file), and a mark says whether it belongs to the digest. A field that only some settings read
also has a line in `read_when`. No default is None: 0 or "" stands for "none", and the sentence says
so.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict

from mlx_distill.recipe.values import (
    Cadence,
    CameLater,
    Condition,
    Day,
    FormerDefault,
    Fraction,
    Names,
    OutsideDigest,
    Tokens,
    Weight,
    within,
)


class Table(BaseModel):
    """A strict, frozen TOML table: unknown fields and lossy conversions are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        strict=True,
        use_attribute_docstrings=True,
    )


class TeacherTable(Table):
    model: str = ""
    """Hub id, folder, .gguf file or embedded:teacher; "" = none, for objective.kd_weight = 0."""

    revision: str = "main"
    """Of a hub id: branch, tag or commit."""

    quantize_bits: Literal[0, 4, 6, 8, "nf4"] = 0
    """Quantise the teacher on load to so many bits, in MLX's affine format on both backends, or to
    bitsandbytes' NF4 on torch; 0 = as stored."""

    compute_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], CameLater("auto")
    ] = "auto"
    """In which the teacher computes; auto = float32 on a CPU, elsewhere as stored. M1 and M2 are
    faster in float16, and a model whose numbers fit it is more exact there than in bfloat16."""

    keep_answers: Annotated[Literal["auto", "off"], CameLater("auto")] = "auto"
    """Keep its hidden states in memory and ask it about each sequence once; auto = of what is asked
    about again, where they take a twentieth of the machine's memory at most."""

    cache: Literal["off", "top_k", "sampled", "hidden"] = "off"
    """Keep its answers on disk: K a token, drawn ones, or hidden states (exact, large)."""

    cache_folder: Annotated[str, OutsideDigest()] = "teacher-cache"
    """Where they are kept; one folder may serve any number of runs, at once too."""

    cache_top_k: Annotated[int, within(1, 2**20)] = 64
    """Answers kept a token."""

    cache_samples: Annotated[int, within(1, 65_535)] = 50
    """Draws a token."""


class StudentTable(Table):
    model: str = ""
    """To be named, as teacher.model; a family that mlx-lm loads unchanged: Llama, Qwen2, Qwen3."""

    revision: str = "main"
    """Of a hub id: branch, tag or commit."""

    from_teacher: Annotated[bool, CameLater(False)] = False
    """The student begins as the teacher, cut as [prune] says."""

    tuning: Literal["full", "lora", "dora"] = "full"
    """Train every weight, or adapters beside them."""

    rank: Annotated[int, within(1, 16_384), FormerDefault(8)] = 32
    """Rank of the adapters' two matrices (LoRA Without Regret and tinker: 32 to 128)."""

    alpha: Annotated[float, within(1e-3, 1e6), FormerDefault(16.0)] = 64.0
    """Adapters are scaled by alpha / rank."""

    lora_layers: Annotated[int, within(0, 10_000)] = 0
    """Adapt the last n blocks; 0 = all, which adapters need (LoRA Without Regret)."""

    lora_targets: Names = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Layers of a block that get adapters."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""

    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """In which the student learns and is scored; auto = float32 on a CPU, bfloat16 on a GPU."""

    quantize_bits: Annotated[Literal[0, 4, 6, 8, "nf4"], CameLater(0)] = 0
    """Quantise the frozen base of adapters on load (QLoRA) to so many bits, in MLX's affine format, or
    to bitsandbytes' NF4 on torch; a folder that either quantised is such a base as it is; 0 = as
    stored."""

    quantize_aware_bits: Annotated[Literal[0, 4, 8], CameLater(0)] = 0
    """Learn with weights rounded as `mlx-distill export --to mlx-4bit` (or 8) will; 0 = as they
    are."""

    save_dtype: Literal["base", "float32", "bfloat16"] = "base"
    """Of the exported student; base = as its base model's."""


class PruneTable(Table):
    layers: Annotated[int, within(0, 10_000), CameLater(0)] = 0
    """Blocks of the student's base that stay; 0 = all."""

    layers_by: Annotated[Literal["position", "change"], CameLater("position")] = "position"
    """Which stay: at even distances, or those that change the hidden state most (2403.03853)."""

    channels: Annotated[int, within(0, 10**6), CameLater(0)] = 0
    """Channels of each MLP that stay: the most active ones (arXiv 2407.14679); 0 = all."""

    kv_heads: Annotated[int, within(0, 10_000), CameLater(0)] = 0
    """Key-value heads that stay, with the query heads that share them; 0 = all."""

    rounds: Annotated[int, within(0, 1000), CameLater(0)] = 0
    """In how many cuts channels and heads go while the student trains; 0 = all before it does."""

    until: Annotated[Fraction, CameLater(0.5)] = 0.5
    """Share of the steps by which the last cut is made."""

    examples: Annotated[int, within(1, 65_536), CameLater(32)] = 32
    """Training examples whose activations are looked at."""

    folder: Annotated[str, OutsideDigest()] = "pruned"
    """Where pruned models are kept; one folder may serve any number of runs."""

    @property
    def before(self) -> "PruneTable":
        """What is cut before training."""
        if not self.rounds:
            return self
        return self.model_copy(update={"channels": 0, "kv_heads": 0, "rounds": 0})

    @property
    def cuts(self) -> bool:
        """Whether anything goes before training."""
        return bool(self.layers or self.before.channels or self.before.kv_heads)

    @property
    def thins(self) -> bool:
        """Whether anything goes while the student trains."""
        return bool(self.rounds and (self.channels or self.kv_heads))

    @property
    def measures(self) -> bool:
        """Whether activations decide what goes."""
        return bool(self.channels or self.kv_heads or (self.layers and self.layers_by == "change"))


class DataTable(Table):
    source: str = ""
    """To be named: .jsonl, .json, .csv, .tsv or .parquet (.gz too), hub dataset, embedded:dial, or
    a name that `mlx-distill datasets` lists."""

    config: str = ""
    """Of a hub dataset."""

    split: str = "train"
    """Of a hub or embedded dataset."""

    format: Literal[
        "auto",
        "columns",
        "response",
        "alpaca",
        "messages",
        "conversations",
        "gsm8k",
        "prompts",
    ] = "auto"
    """What a row holds; auto = found from the first rows, with its columns, and said (docs/data.md)."""

    prompt_column: str = ""
    """Text, or a list of messages; "" = the format's usual name, here and below."""

    cot_column: str = ""
    """The chain of thought."""

    answer_column: str = ""
    """The answer."""

    response_column: str = ""
    """Reasoning and answer in one text: <think>reasoning</think>answer."""

    messages_column: str = ""
    """The whole conversation."""

    where: dict[str, Condition] = {}
    """Keep rows whose columns hold these, for example { domain = ["math", "code"], score = ">= 0.5" }."""

    stream_rows: Annotated[int, within(0, 10**9), CameLater(0)] = 0
    """Rows that are taken of a hub dataset as it comes, drawn with run.seed; 0 = all, stored."""

    compat: Annotated[Literal["none", "paper"], CameLater("none")] = "none"
    """paper = as the paper's public code renders, cuts and averages, mistakes included."""

    train_examples: Annotated[int, within(0, 10**9)] = 0
    """Rows to train on; 0 = all."""

    validation_examples: Annotated[int, within(0, 10**9)] = 0
    """Held out before training rows are taken; 0 = a tenth of the rows, and no more than 64."""

    longest_tokens: Tokens = 4096
    """Longer rendered examples are dropped and counted."""

    date: Annotated[Day, CameLater("")] = ""
    """The day ("2026-11-26") that a template says which reads the clock; "" = the run's first."""


class RolloutsTable(Table):
    by: Annotated[Literal["data", "teacher", "student"], CameLater("data")] = "data"
    """Who wrote what is learned: the data has it, or a model answers the data's prompts."""

    share: Annotated[Fraction, CameLater(1.0)] = 1.0
    """Share of the training examples whose prompts are answered; the others stay the data's."""

    samples: Annotated[int, within(1, 65_536), CameLater(1)] = 1
    """Texts a prompt."""

    temperature: Annotated[float, within(0.01, 100.0, or_zero=True), CameLater(1.0)] = 1.0
    """At which texts are drawn; 0 = greedy."""

    top_p: Annotated[Fraction, CameLater(1.0)] = 1.0
    """Draw from the likeliest tokens that have this probability together."""

    max_new_tokens: Annotated[Tokens, CameLater(512)] = 512
    """A text that is longer ends there and is learned as a prefix."""

    batch_size: Annotated[int, within(1, 65_536), CameLater(64)] = 64
    """Texts written at once."""

    keep: Annotated[Literal["all", "right"], CameLater("all")] = "all"
    """Which texts are learned: right = those that state the data's answer."""

    weigh: Annotated[Literal["none", "pass_rate"], CameLater("none")] = "none"
    """Weight of a text's loss; pass_rate = p(1 - p) of its prompt's share p of right texts."""

    refresh_every: Annotated[Cadence, CameLater(0)] = 0
    """Steps after which the student, as it then is, writes again; 0 = it writes once."""

    folder: Annotated[str, OutsideDigest()] = "rollouts"
    """Where texts are kept; one folder may serve any number of runs, at once too."""


class TruncationTable(Table):
    keep: Literal["prefix", "suffix", "middle", "cot"] = "prefix"
    """Which part of the span stays; cot = everything up to </think>."""

    span: Literal["sequence", "cot"] = "sequence"
    """What fraction is a fraction of; with cot the prompt is always kept."""

    fraction: Fraction = 1.0
    """Share of the span's tokens that is kept: the paper's Lead-Span Proportion."""

    spread: Annotated[Weight, CameLater(0.0)] = 0.0
    """Each training example's own fraction is drawn, seeded, from fraction × (1 ± spread)."""

    max_tokens: Annotated[int, within(0, 2**24)] = 0
    """Cap on the window; prompt or context that is only read comes on top; 0 = none."""

    context: Literal["drop", "keep"] = "drop"
    """Tokens before what is kept: removed, or read without loss."""

    token_share: Fraction = 1.0
    """A seeded random share of the supervised tokens left carries loss."""

    whole_share: Annotated[Weight, CameLater(0.0)] = 0.0
    """A seeded share of the training examples is not cut at all."""

    ending: Annotated[Literal["none", "answer"], CameLater("none")] = "none"
    """After a cut: nothing, or </think>, answer and end of turn, learned from the text alone."""

    @property
    def cuts(self) -> bool:
        """Whether any text may lose tokens."""
        return self.keep == "cot" or self.fraction < 1 or self.max_tokens > 0
