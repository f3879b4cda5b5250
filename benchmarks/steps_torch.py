"""Whole training steps on torch: teacher forward, student forward, loss, backward, clipping and
AdamW.

Every contender trains the same weights on the same batch with the same optimizer (torch's fused
AdamW, gradients clipped at norm 1); they differ in what lies between the trunks' hidden states and
the gradients, and in which positions they take there:

- paper, trl-gkd: `model(input_ids).logits` of both, [B, T, V] with the prompt's positions, then the
  contender's loss.
- trl: the trunks through `DistillationTrainer._get_last_hidden_state`, completion positions alone,
  then its loss.
- liger: the trunks, completion positions alone, then `LigerFusedLinearJSDLoss`.
- ours: `TorchBackend`, through the verbs that the training loop uses.

Student weights are float32; `dtype` is what it computes in (autocast), and the teacher's weights.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from benchmarks import contenders_torch as losses
from benchmarks.models_torch import labels_of
from mlx_distill.data.batches import Step

if TYPE_CHECKING:
    import torch

LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 1e-5, 0.0, 1.0


@dataclass(frozen=True)
class Setting:
    """What all contenders of one comparison share."""

    kd_weight: float
    chunk_tokens: int
    device: str
    dtype: str
    gradient_checkpointing: bool


def load(
    contender: str, student: Path, teacher: Path, step: Step, setting: Setting
) -> "Ours | Peer":
    return (Ours if contender == "ours" else Peer)(contender, student, teacher, step, setting)


class Ours:
    """The torch backend."""

    def __init__(self, contender: str, student: Path, teacher: Path, step: Step, setting: Setting):
        from mlx_distill.backends.torch.backend import TorchBackend
        from mlx_distill.objective import Objective

        backend = TorchBackend()
        self.teacher = backend.load_teacher(teacher, "teacher")
        self.student = backend.load_student(student, "student", _recipe(setting))
        self.step, self.objective = step, Objective(kd_weight=setting.kd_weight)

    def accumulate(self) -> float:
        """The loss, whose gradients are then held by the student."""
        (batch,) = self.step.batches
        sums = self.student.accumulate(
            batch, self.teacher.targets(batch), self.objective, self.step.loss_tokens
        )
        return float(self.objective.total(sums.terms).sum()) / self.step.loss_tokens

    def apply(self) -> float:
        """The gradients' norm before clipping; the weights have moved and the gradients are gone."""
        return self.student.apply(LEARNING_RATE)

    def gradients(self) -> dict[str, "torch.Tensor"]:
        return {name: parameter.grad for name, parameter in self.student.weights.items()}


class Peer:
    """A transformers model trained as the peers' trainers do, with a contender's loss."""

    def __init__(self, contender: str, student: Path, teacher: Path, step: Step, setting: Setting):
        import torch
        from transformers import AutoModelForCausalLM

        def load(folder: Path, dtype: str):
            options = {
                "dtype": getattr(torch, dtype),
                "attn_implementation": "sdpa",
                "local_files_only": True,
            }
            return AutoModelForCausalLM.from_pretrained(folder, **options).to(setting.device)

        self.contender, self.setting, self.step = contender, setting, step
        self.student, self.teacher = (
            load(student, "float32").train(),
            load(teacher, setting.dtype).eval().requires_grad_(False),
        )
        if setting.gradient_checkpointing:
            self.student.gradient_checkpointing_enable({"use_reentrant": False})
        self.parameters = list(self.student.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )
        (batch,) = step.batches
        self.tokens = torch.from_numpy(batch.tokens).long().to(setting.device)
        self.labels = torch.from_numpy(labels_of(batch, losses.IGNORED)).to(setting.device)

    def accumulate(self) -> float:
        import torch

        half = self.setting.dtype != "float32"
        with torch.autocast(self.setting.device, getattr(torch, self.setting.dtype), enabled=half):
            loss = self._dense() if self.contender in losses.DENSE else self._from_hidden()
        loss.backward()
        return loss.item()

    def apply(self) -> float:
        import torch

        norm = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def gradients(self) -> dict[str, "torch.Tensor"]:
        return {name: parameter.grad for name, parameter in self.student.named_parameters()}

    def _dense(self) -> "torch.Tensor":
        import torch

        with torch.no_grad():
            teacher = self.teacher(self.tokens, use_cache=False).logits
        student = self.student(self.tokens, use_cache=False).logits
        return losses.dense_loss(
            self.contender, student, teacher, self.labels, self.setting.kd_weight
        )

    def _from_hidden(self) -> "torch.Tensor":
        import torch

        carries = (self.labels != losses.IGNORED).any(dim=0)  # every row has the same completion
        completion = int(carries.sum())
        student = self._last_hidden(self.student, completion)
        with torch.no_grad():
            teacher = self._last_hidden(self.teacher, completion)
        inputs = losses.Inputs(
            student.reshape(-1, student.shape[-1]),
            self.student.get_output_embeddings().weight,
            teacher.reshape(-1, teacher.shape[-1]),
            self.teacher.get_output_embeddings().weight,
            self.labels[:, carries].flatten(),
        )
        return losses.head_and_loss(
            self.contender, inputs, self.setting.kd_weight, self.setting.chunk_tokens
        )

    def _last_hidden(self, model, completion: int) -> "torch.Tensor":
        """[B, completion, D]: what predicts the last `completion` tokens, final norm included."""
        if self.contender != "trl":
            hidden = model.base_model(self.tokens, use_cache=False).last_hidden_state
            return hidden[:, :-1][:, -completion:]
        import torch
        from trl import DistillationTrainer

        trainer = SimpleNamespace(
            model_kwarg_keys=(), _is_vlm=False
        )  # what the method reads of its trainer
        mask = torch.ones_like(self.tokens)
        return DistillationTrainer._get_last_hidden_state(
            trainer, model, self.tokens, mask, completion
        )


def _recipe(setting: Setting):
    from mlx_distill.recipe.recipe import Recipe
    from mlx_distill.recipe.tables import DataTable, StudentTable, TeacherTable
    from mlx_distill.recipe.training_tables import ObjectiveTable, OptimTable

    return Recipe(
        teacher=TeacherTable(model="teacher"),
        data=DataTable(source="rows.jsonl"),
        student=StudentTable(
            model="student",
            tuning="full",
            compute_dtype=setting.dtype,
            gradient_checkpointing=setting.gradient_checkpointing,
        ),
        objective=ObjectiveTable(kd_weight=setting.kd_weight, chunk_tokens=setting.chunk_tokens),
        optim=OptimTable(
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_NORM,
        ),
    )
