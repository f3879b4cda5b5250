"""The teacher: a frozen model and its answers, live or for a cache on disk.

In: batches. Out: hidden states at the loss positions beside the head, which the student's loss
takes; for a cache what is left of the distributions over the vocabulary, made of a few positions at
a time: [N, V] is never made.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlx_distill.backends.torch import ranks as together
from mlx_distill.backends.torch.failures import explained
from mlx_distill.backends.torch.generate import TorchModel
from mlx_distill.backends.torch.heads import FLOOR, AffineHead, Head, MatrixHead
from mlx_distill.backends.torch.matching import Watched
from mlx_distill.backends.torch.model import SplitModel
from mlx_distill.data.batches import Batch

TEACHER_CHUNK = 128  # positions whose logits exist at once while a cache is written


class LiveTargets(NamedTuple):
    """Hidden states [N, D], the head that makes logits of them, and what watched layers gave."""

    hidden: Tensor
    head: Head
    states: tuple[Tensor, ...] = ()


class TorchTeacher(TorchModel):
    """A frozen model. Its targets are hidden states [N, D] and its head: [N, V] is never made."""

    def __init__(self, split: SplitModel):
        super().__init__(split)
        self.loss_head = split.loss_head()
        self._watched: Watched | None = None
        together.shard(split)

    def watch(self, layers: Sequence[int]) -> None:
        """From now on targets hold what these layers give, counted from 1."""
        self._watched = Watched(self.split, layers)

    @torch.no_grad()
    def targets(self, batch: Batch) -> LiveTargets:
        positions = batch.positions[: batch.taught]
        with explained("the teacher's forward pass"):
            hidden = self.gather(batch.tokens, positions)
            states = self._watched.taken(self.tensor(positions)) if self._watched else ()
            return LiveTargets(hidden, self.loss_head, states)

    @torch.no_grad()
    def top_k(self, batch: Batch, k: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids, log_probs, tail = self._by_chunk(batch, rows, partial(_top_k, k=k))
        return ids, log_probs, tail

    @torch.no_grad()
    def draw(
        self, batch: Batch, uniform: np.ndarray, rows: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids, entropy, top = self._by_chunk(batch, rows, _draw, self.tensor(uniform))
        return ids, entropy, top

    @torch.no_grad()
    def states(self, batch: Batch) -> np.ndarray:
        hidden = self.targets(batch).hidden
        return to_bits(hidden)

    def head_matrix(self) -> np.ndarray | None:
        head = self.loss_head
        if not isinstance(head, MatrixHead | AffineHead):
            return None
        if head.bias is not None or head.finish is not None:
            return None
        return to_bits(head.weight)

    def _by_chunk(
        self, batch: Batch, rows: int, answer: Callable, *inputs: Tensor
    ) -> tuple[np.ndarray, ...]:
        """`answer(log-probabilities [C, rows], inputs [C, …])` of all N positions, by chunks of
        them.
        """
        hidden, head, _ = self.targets(batch)
        columns = []
        for start in range(0, len(hidden), TEACHER_CHUNK):
            place = slice(start, start + TEACHER_CHUNK)
            part = hidden[place] if hidden.is_cuda else hidden[place].float()
            found = answer(
                head.logits(part, rows).log_softmax(1), *(array[place] for array in inputs)
            )
            columns.append([column.cpu().numpy() for column in found])
        return tuple(np.concatenate(column) for column in zip(*columns, strict=True))


def _top_k(log_probs: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and log-probabilities [C, k], the likeliest first, and the log of what is left [C]."""
    values, ids = log_probs.topk(k, dim=1)
    # `topk` may leave any of equally likely ids in front, and the first one out
    top = log_probs.argmax(1, keepdim=True)
    ids = torch.where(
        torch.arange(k, device=ids.device) == 0, top, torch.where(ids == top, ids[:, :1], ids)
    )
    return ids.int(), values, log_probs.scatter(1, ids, -torch.inf).logsumexp(1)


def _draw(log_probs: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [C, S] whose cumulated probability first exceeds `uniform` [C, S], entropy [C] in nats,
    most likely id [C].
    """
    cumulated = log_probs.double().exp().cumsum(1)
    drawn = torch.searchsorted(cumulated, uniform.double() * cumulated[:, -1:], right=True)
    entropy = -(log_probs.exp() * log_probs.clamp(min=FLOOR)).sum(1)
    return drawn.clamp(max=log_probs.shape[1] - 1).int(), entropy, log_probs.argmax(1).int()


def to_bits(tensor: Tensor) -> np.ndarray:
    """On the CPU as numpy: bfloat16 as uint16 bits, anything else as float32."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).cpu().numpy().view(np.uint16)
    return tensor.float().cpu().numpy()


def from_bits(array: np.ndarray, device: torch.device) -> Tensor:
    """float32 as it is; uint16 holds the bits of bfloat16."""
    if array.dtype != np.uint16:
        return torch.from_numpy(array).to(device)
    return torch.from_numpy(array.view(np.int16)).to(device).view(torch.bfloat16)
