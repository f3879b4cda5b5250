"""What a training step costs, counted from two configs before any weight is loaded.

A multiply-add is two operations. Forward: 2 per weight of every matrix a token passes, plus attention's 2 · 2 · T²/2 · heads ·
head_dim a layer (causal). Backward: twice the forward; once for frozen matrices (LoRA), where only the gradient that passes
through is computed. Attention has no weights: both of its factors pass gradients on, frozen or not.
The head is counted at the loss positions only. Norms, activations and the optimizer are left
out (below 1 %), and so is what gradient checkpointing computes again.
"""

from dataclasses import dataclass

from mlx_distill.data.batches import Step


@dataclass(frozen=True)
class Shape:
    """The sizes of a dense decoder that decide its cost."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int

    @classmethod
    def of(cls, config: dict) -> "Shape | None":
        """From a Hugging Face config of the Llama or Qwen kind; None where it is not a dense decoder described that way."""
        needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        if any(key not in config for key in needed) or config.get("num_experts") or config.get("num_local_experts"):
            return None
        width, heads = config["hidden_size"], config["num_attention_heads"]
        return cls(
            width, config["num_hidden_layers"], heads, config.get("num_key_value_heads") or heads,
            config.get("head_dim") or width // heads, config["intermediate_size"], config["vocab_size"],
        )

    def trunk(self, lengths: list[int], matrix_passes: int = 1, attention_passes: int = 1) -> float:
        """Operations of the trunk over sequences of these lengths; a pass is worth one forward (the default)."""
        projections = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        matrices = self.layers * (projections + 3 * self.width * self.ffn)
        attention = self.layers * 2 * self.heads * self.head_dim
        return sum(matrix_passes * 2 * matrices * t + attention_passes * attention * t * t for t in lengths)

    def head(self, positions: float) -> float:
        """Forward operations of the head at so many positions."""
        return 2.0 * self.width * self.vocabulary * positions


def step_flops(step: Step, teacher: Shape | None, student: Shape, full: bool) -> dict[str, float]:
    """Operations of one optimizer step by part (teacher's trunk, student's trunk, both heads); padding is not counted."""
    lengths = [int(t) for batch in step.batches for t in batch.lengths]
    positions = sum(float(batch.weight.sum()) for batch in step.batches)
    passes = 3 if full else 2  # the gradient of frozen matrices is not computed
    parts = {"student": student.trunk(lengths, passes, 3), "head": passes * student.head(positions)}
    if teacher:
        parts = {"teacher": teacher.trunk(lengths), "student": parts["student"], "head": parts["head"] + teacher.head(positions)}
    return parts


def total_flops(rows: list[dict]) -> dict[str, float]:
    """Sums over metrics rows by part, and `total`; {} where they were not counted."""
    totals: dict[str, float] = {}
    for row in rows:
        for part, value in row.get("flops", {}).items():
            totals[part] = totals.get(part, 0.0) + value
    return totals | {"total": sum(totals.values())} if totals else {}
