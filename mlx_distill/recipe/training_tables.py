"""The tables of a recipe that say how a student learns, how it is scored, and what a run keeps.

As in `tables`, where the models and the data stand: a field is added here and nowhere else.
"""

from typing import Annotated, Literal

from mlx_distill.recipe.tables import Table
from mlx_distill.recipe.values import (
    Cadence,
    CameLater,
    Divergence,
    FormerDefault,
    Fraction,
    Layers,
    Momentum,
    Names,
    OutsideDigest,
    Rows,
    Seed,
    Segments,
    Tokens,
    Trackers,
    Weight,
    within,
)


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
    segments: Segments = ("cot",)
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

    sort_window: Annotated[int, within(1, 65_536), CameLater(1)] = 8
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

    track: Annotated[Trackers, OutsideDigest()] = ()
    """Trackers that follow the run's logs; each is an extra of the package."""
