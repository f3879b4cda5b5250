"""Every table of a recipe: its fields, each with its type, its default and a sentence about it.

A field is added here and nowhere else: its range and its choices are in its type, the sentence
under it is its line in `recipes/reference.toml` (`python -m mlx_distill.recipe.reference` writes
that file), and a mark says whether it belongs to the digest. A field that only some settings read
also has a line in `read_when`. No default is None: 0 or "" stands for "none", and the sentence says
so.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mlx_distill.recipe.values import (
    Cadence,
    CameLater,
    Condition,
    Day,
    Divergence,
    FormerDefault,
    Fraction,
    Layers,
    Momentum,
    Names,
    OutsideDigest,
    Rows,
    Seed,
    Segment,
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

    quantize_bits: Literal[0, 4, 6, 8] = 0
    """Quantise the teacher to so many bits on load; 0 = as stored."""

    compute_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], CameLater("auto")
    ] = "auto"
    """In which the teacher computes; auto = float32 on a CPU, elsewhere as stored. M1 and M2 are
    faster in float16, and a model whose numbers fit it is more exact there than in bfloat16."""

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

    examples: Annotated[int, within(1, 65_536), CameLater(32)] = 32
    """Training examples whose activations are looked at."""

    folder: Annotated[str, OutsideDigest()] = "pruned"
    """Where pruned models are kept; one folder may serve any number of runs."""

    @property
    def cuts(self) -> bool:
        """Whether anything goes."""
        return bool(self.layers or self.channels or self.kv_heads)

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


class SelectionTable(Table):
    share: Annotated[Fraction, CameLater(1.0)] = 1.0
    """Share of each sequence's supervised tokens that carries loss, rounded up; 1.0 = all."""

    by: Annotated[
        Literal["random", "position", "student_entropy", "teacher_entropy", "divergence"],
        CameLater("random"),
    ] = "random"
    """Which ones; the last three ask the models in each step and take the highest."""

    redraw: Annotated[Literal["epoch", "once"], CameLater("epoch")] = "epoch"
    """How often a random choice is made."""

    position_weight: Annotated[Literal["flat", "rising", "falling"], CameLater("flat")] = "flat"
    """Weight of a token's loss by its place among those of its sequence; 1 on average."""


class ObjectiveTable(Table):
    segments: Annotated[tuple[Segment, ...], Field(min_length=1, strict=False)] = ("cot",)
    """Which segments are learned."""

    divergence: Divergence = "forward_kl"
    """How far the student is from the teacher; forward is KL(teacher‖student)."""

    jsd_beta: Annotated[float, within(1e-3, 0.999)] = 0.5
    """Weight of the teacher in the mixture."""

    skew_alpha: Annotated[float, within(1e-3, 0.999), CameLater(0.1)] = 0.1
    """Share that one of the two is lent of the other."""

    mixed_weight: Annotated[float, within(1e-3, 0.999), CameLater(0.5)] = 0.5
    """Weight of forward KL; 1 - mixed_weight weighs reverse KL."""

    entropy_half: Annotated[float, within(1e-3, 100.0), CameLater(1.0)] = 1.0
    """Teacher's entropy in nats at which forward and reverse KL count the same; more is forward."""

    tvd_scale: Annotated[Literal["linear", "log"], CameLater("linear")] = "linear"
    """Compares probabilities, or their logarithms, where no id counts more than another."""

    dkd_target: Annotated[float, within(1e-6, 1000.0, or_zero=True), CameLater(1.0)] = 1.0
    """Weight of the text's own id against all others (α of Zhao et al. 2022)."""

    dkd_rest: Annotated[float, within(1e-6, 1000.0, or_zero=True), CameLater(1.0)] = 1.0
    """Weight of the other ids among themselves (their β; they take up to 8)."""

    hidden_weight: Annotated[float, within(1e-6, 1000.0, or_zero=True), CameLater(0.0)] = 0.0
    """Weight of the distance of hidden states; 0 = they are not compared."""

    hidden_layers: Annotated[Layers, CameLater(())] = ()
    """Student's layers, from 1, which meet the teacher's at the same depth; [] = the last."""

    hidden_distance: Annotated[Literal["mse", "cosine"], CameLater("mse")] = "mse"
    """Mean squared difference, or 1 - cosine, through a trained projection where widths differ."""

    kd_weight: Weight = 0.5
    """Weight of the divergence; 1 - kd_weight weighs cross-entropy with the text."""

    temperature: Annotated[float, within(0.01, 100.0)] = 1.0
    """Of both models inside the divergence."""

    temperature_scaling: Literal["none", "hinton"] = "hinton"
    """Hinton multiplies the divergence by temperature squared."""

    chunk_tokens: Annotated[int, within(0, 2**20)] = 0
    """Positions whose logits exist at once: less = less memory; 0 = what suits the device."""

    @property
    def matched_layers(self) -> int:
        """How many layers are compared with the teacher's."""
        return max(1, len(self.hidden_layers)) if self.hidden_weight else 0


class BatchTable(Table):
    micro_batch_size: Annotated[int, within(1, 65_536)] = 4
    """Sequences in one forward pass."""

    global_batch_size: Annotated[int, within(1, 2**20)] = 8
    """Sequences in one optimizer step."""

    shuffle: Annotated[bool, CameLater(True)] = True
    """Each epoch has an order of its own; false = the one in which the rows were drawn."""

    pad_multiple: Annotated[int, within(1, 65_536)] = 32
    """Sequences are padded to a multiple of this, to keep shapes few."""

    sort_window: Annotated[int, within(1, 65_536), CameLater(1)] = 1
    """Steps whose examples are sorted by length together: less padding. Each step still takes one
    micro-batch of each range of lengths, so that it has several; 1 = each step by itself."""


class OptimTable(Table):
    optimizer: Literal["adamw", "adafactor", "lion", "schedule_free_adamw"] = "adamw"
    """Lion is MLX's alone; schedule-free AdamW trains beside a running mean, which is the student."""

    learning_rate: Annotated[float, within(1e-10, 1000.0)] = 2e-5
    """The schedule's peak (2e-5 as TRL; adapters want ten times that: LoRA Without Regret)."""

    schedule: Literal["one_cycle", "cosine", "linear", "constant"] = "one_cycle"
    """How the rate falls after its warmup."""

    warmup_fraction: Annotated[float, within(1e-6, 0.999999, or_zero=True)] = 0.1
    """Share of the steps in which the rate rises."""

    weight_decay: Annotated[float, within(1e-8, 1000.0, or_zero=True)] = 0.0
    """Decoupled, as the optimizer has it."""

    decayed: Annotated[Literal["matrices", "all"], CameLater("all")] = "matrices"
    """Which weights decay; matrices = all but norms, biases and other vectors."""

    beta1: Momentum = 0.9
    """Decay of the gradient's running mean."""

    beta2: Annotated[Momentum, FormerDefault(0.999)] = 0.999
    """Decay of its square's running mean; of Lion's momentum (arXiv 2302.06675 has 0.99)."""

    eps: Annotated[float, within(1e-20, 1.0)] = 1e-8
    """Added to AdamW's denominator, schedule-free or not."""

    max_grad_norm: Annotated[float, within(1e-6, 1e9, or_zero=True)] = 1.0
    """Gradients are clipped to this norm; 0 = never."""

    epochs: Annotated[int, within(1, 10_000)] = 1
    """Times that each training example is seen."""

    steps: Annotated[int, within(0, 10**6)] = 0
    """Optimizer steps, instead of epochs; 0 = as many as epochs ask for."""

    patience: Annotated[int, within(0, 10_000), CameLater(0)] = 0
    """Validations in a row without a lower loss after which training ends; 0 = never."""

    @property
    def schedule_free(self) -> bool:
        """Whether the student is a running mean of what trains."""
        return self.optimizer == "schedule_free_adamw"


class EvalTable(Table):
    task: str = ""
    """gsm8k, math500, aime24, aime25, aime26, amc23 or olympiadbench (of the hub, or NAME:FILE),
    embedded:NAME, math:FILE or jsonl:FILE; "" = no scoring."""

    also: Annotated[Names, OutsideDigest()] = ()
    """More tasks, scored under the same settings; their scores lie in evals/ of the run."""

    prompt: Annotated[str, CameLater("")] = ""
    """How a problem is put, for example "{problem} Answer in a box."; "" = as the task does."""

    answer: Annotated[Literal["after_think", "anywhere"], CameLater("after_think")] = "after_think"
    """Where the answer is looked for; anywhere = in all of the text, as lighteval does."""

    examples: Rows = 500
    """Problems that are asked."""

    max_new_tokens: Tokens = 512
    """An answer that is longer counts as wrong."""

    batch_size: Annotated[int, within(1, 65_536)] = 64
    """Answers generated at once."""

    temperature: Annotated[float, within(0.01, 100.0, or_zero=True)] = 0.0
    """At which answers are drawn; 0 = greedy."""

    top_p: Fraction = 1.0
    """Draw from the likeliest tokens that have this probability together."""

    seed: Seed = 42
    """Draws the problems and the samples, whatever run.seed is."""

    samples: Annotated[int, within(1, 65_536)] = 1
    """Answers to each problem; accuracy is their mean."""

    score_teacher: Annotated[bool, OutsideDigest()] = True
    """Score the teacher too."""

    score_base: Annotated[bool, OutsideDigest()] = True
    """Score the student as it was before, too."""

    compare: Annotated[Names, OutsideDigest()] = ()
    """Run folders that the report sets beside this run."""


class RunTable(Table):
    name: Annotated[str, OutsideDigest()] = ""
    """What the run is called; "" = as the recipe's file."""

    folder: Annotated[str, OutsideDigest()] = "runs"
    """Where run folders lie."""

    seed: Seed = 42
    """Of everything random in training."""

    checkpoint_every: Cadence = 100
    """Steps from one checkpoint to the next; 0 = only at the end."""

    validate_every: Cadence = 100
    """Steps from one validation to the next; 0 = only at the end."""

    keep_checkpoints: Literal["last_and_best", "last", "all"] = "last_and_best"
    """Which checkpoints stay."""

    export: Literal["best", "last"] = "best"
    """Which checkpoint becomes the student; best = lowest validation loss."""

    track: Annotated[
        tuple[Literal["trackio", "tensorboard", "wandb"], ...],
        Field(strict=False),
        OutsideDigest(),
    ] = ()
    """Trackers that follow the run's logs; each is an extra of the package."""
