"""A model of transformers, split where the loss needs it split: a trunk (tokens → hidden states) and a
head (→ logits).

In: a loaded model. Out: a `SplitModel` whose head was checked against the whole model, or a
`ModelError`. Decided here: how the split is made, and whether the head is a matrix that the loss
may multiply with by itself.
"""

import copy
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import ModelOutput

from mlx_distill.backends import refusals
from mlx_distill.backends.torch.affine import AffineLinear, TiedHead
from mlx_distill.backends.torch.heads import AffineHead, CallableHead, Finish, Head, MatrixHead
from mlx_distill.backends.torch.rounding import rounded_parameters
from mlx_distill.files import all_lines

PROBE = [[1, 5, 2, 7, 3, 1, 4]]
PROBE_LOGIT = 100.0  # the largest one when a head is probed: far into any cap
PROBE_TOLERANCE = 1e-3  # relative to the largest logit; a wrong split is off by orders of magnitude
HALF_TOLERANCE = 2e-2  # the same in bfloat16 or float16: a few units in the last place


class SplitModel:
    """A transformers model as trunk and head.

    `hidden(tokens [B, T]) -> [B, T, D]`: the last hidden states, final norm included.
    `head(hidden [..., D]) -> [..., V]`: logits, by the family's own code (tied or not, soft-capped
    or scaled): the model is called with its trunk replaced by one that answers `hidden`.
    """

    def __init__(self, model: transformers.PreTrainedModel, name: str):
        # no dropout: a student moves toward its teacher, not toward noise
        self.model = model.eval()
        self.name = name
        self.trunk_name = model.base_model_prefix
        if not isinstance(getattr(model, self.trunk_name, None), nn.Module):
            raise refusals.no_trunk(name, type(model))
        self.stored_dtype: torch.dtype | None = None  # of the weights on disk, where that matters
        self.rounded_to = 0  # bits that the trunk computes with; 0 = as it is
        self._check_split()

    @property
    def trunk(self) -> nn.Module:
        return getattr(self.model, self.trunk_name)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks of the decoder."""
        lists = [module for module in self.trunk.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=len)

    @property
    def device(self) -> torch.device:
        return self._head_weight.device

    def hidden(self, tokens: Tensor) -> Tensor:
        return self._run_trunk(tokens).last_hidden_state

    def _run_trunk(self, tokens: Tensor) -> ModelOutput:
        asked = {"input_ids": tokens, "use_cache": False, "return_dict": True}
        if not self.rounded_to:
            return self.trunk(**asked)
        parameters = rounded_parameters(self.trunk, self.rounded_to)
        return torch.func.functional_call(self.trunk, parameters, (), asked)

    def head(self, hidden: Tensor) -> Tensor:
        return self._after_trunk()(hidden)

    def head_matrix(self) -> Tensor | None:
        """`[V, D]`, if the head is that matrix and nothing else, unpacked where it is quantised; None
        for biased, capped or scaled heads.
        """
        if not self._head_is_matrix:
            return None
        return self.packed_head.matrix() if self.packed_head else self._head_weight

    @property
    def packed_head(self) -> AffineLinear | TiedHead | None:
        """The head's module, where its matrix is packed."""
        module = self.model.get_output_embeddings()
        return module if isinstance(module, AffineLinear | TiedHead) else None

    @property
    def width(self) -> int:
        """D"""
        return self._probe_width

    def head_rows(self) -> int:
        return self._probe_logits.shape[-1]

    def loss_head(self) -> Head:
        """The head as the loss walks it: a matrix and what an element needs after it (bias, cap,
        scale), or the family's own code.
        """
        for finish in (None, self._after_trunk(skip_head=True)):
            head = self._matrix_head(finish)
            if head is not None and self._equals_head(head):
                return head
        return CallableHead(self.head)

    @cached_property
    def head_path(self) -> str:
        """The name of the head's matrix among the parameters (of a tied one: the embedding's)."""
        return next(
            name
            for name, parameter in self.model.named_parameters()
            if parameter is self._head_weight
        )

    @property
    def _head_weight(self) -> Tensor:
        return self.model.get_output_embeddings().weight

    @cached_property
    def _head_is_matrix(self) -> bool:
        head = self._matrix_head(None)
        return head is not None and head.bias is None and self._equals_head(head)

    def _matrix_head(self, finish: Finish | None) -> MatrixHead | AffineHead | None:
        if packed := self.packed_head:
            return AffineHead(packed, getattr(packed, "bias", None), finish)
        module = self.model.get_output_embeddings()
        return MatrixHead(module.weight, module.bias, finish) if type(module) is nn.Linear else None

    def _after_trunk(self, skip_head: bool = False) -> "_AfterTrunk":
        return _AfterTrunk(self.model, self.trunk_name, self._trunk_answer, skip_head)

    @torch.no_grad()
    def _equals_head(self, head: Head) -> bool:
        """Whether `head` gives the family's logits, all of them or the first third, for large
        random hidden states.
        """
        rows = self.head_rows()
        probe = np.random.default_rng(0).normal(size=(3, self._probe_width)).astype(np.float32)
        probe = torch.from_numpy(probe).to(self.device)
        plain = self._matrix_head(None)
        if plain is None:
            return False
        try:
            probe = probe * (PROBE_LOGIT / plain.logits(probe, rows).abs().max())
            logits = self.head(probe.to(self._head_weight.dtype))
            return all(
                _close(head.logits(probe, some), logits[:, :some]) for some in (rows, rows // 3)
            )
        # a family's code run on parts it was not written for: any failure says that it is not this
        # head
        except Exception:
            return False

    @torch.no_grad()
    def _check_split(self) -> None:
        probe = torch.tensor(PROBE, device=self.device)
        try:
            output, self._probe_logits = (
                self._run_trunk(probe),
                self.model(probe, use_cache=False).logits,
            )
        except Exception as error:  # a family's code, run on a config it was not written for
            raise refusals.not_computed(self.name, error) from None
        if not self._probe_logits.isfinite().all():
            raise refusals.not_finite(self.name)
        hidden, self._trunk_answer = (
            output.last_hidden_state,
            type(output),
        )  # which has a field for all that the family asks of it
        self._probe_width = hidden.shape[-1]
        try:
            equal, how = _close(self.head(hidden), self._probe_logits), "differs from"
        except Exception as error:  # as above
            equal, how = False, f"fails ({all_lines(error, 100)}) instead of giving"
        if not equal:
            raise refusals.not_split(self.name, type(self.model), how)


def checkpoint_layers(split: SplitModel) -> None:
    """Recompute each block in the backward pass; nothing in a forward pass is random, so no random
    state is kept for it.
    """
    for layer in split.layers:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


class _AfterTrunk:
    """What a family's own code does after its trunk, as a function of the trunk's output [..., D].

    With `skip_head` the projection returns what it is given: the function of logits [..., any
    number] that remains.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        trunk_name: str,
        answer: type[ModelOutput],
        skip_head: bool,
    ):
        self._trunk = _StandIn(answer)
        head = next(
            name
            for name, module in model.named_children()
            if module is model.get_output_embeddings()
        )
        self._view = copy.copy(model)  # shares every part but those replaced
        self._view._modules = (
            model._modules
            | {trunk_name: self._trunk}
            | ({head: nn.Identity()} if skip_head else {})
        )

    def __call__(self, output: Tensor) -> Tensor:
        self._trunk.output = given = output.reshape(1, -1, output.shape[-1])
        # that nobody reads
        tokens = torch.zeros(given.shape[:2], dtype=torch.long, device=output.device)
        logits = self._view(tokens, use_cache=False).logits
        self._trunk.output = None
        return logits.reshape(*output.shape[:-1], -1)


class _StandIn(nn.Module):
    """Answers `output` in the place of a trunk."""

    def __init__(self, answer: type[ModelOutput]):
        super().__init__()
        self.answer = answer
        self.output: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        return self.answer(last_hidden_state=self.output)


def _close(left: Tensor, right: Tensor) -> bool:
    tolerance = PROBE_TOLERANCE if left.dtype == right.dtype == torch.float32 else HALF_TOLERANCE
    left, right = left.float(), right.float()
    return (
        left.shape == right.shape
        and ((left - right).abs().max() / right.abs().max().clamp(min=1e-6)).item() <= tolerance
    )
