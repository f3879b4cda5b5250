"""What the parts of a model on torch do on some texts: see `backends/activations.py`."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlx_distill.backends.activations import HEADS_INPUT, MLP_INPUT, Activations, Sums, averaged
from mlx_distill.backends.torch.model import SplitModel

Found = dict[str, Tensor]


@torch.no_grad()
def activations(split: SplitModel, texts: Sequence[np.ndarray], head_dim: int) -> Activations:
    """Means over the tokens of `texts`, each int[T] and read by itself."""
    with ExitStack() as stack:
        found = [stack.enter_context(_watched(block, head_dim)) for block in split.layers]
        return averaged(_sums(split, text, found) for text in texts)


def _sums(split: SplitModel, text: np.ndarray, found: list[Found]) -> Sums:
    split.hidden(torch.from_numpy(np.asarray(text, np.int64))[None].to(split.device))
    blocks = [
        (each["change"].item(), _numpy(each.get(MLP_INPUT)), _numpy(each.get(HEADS_INPUT)))
        for each in found
    ]
    return Sums(len(text), blocks)


def _numpy(sums: Tensor | None) -> np.ndarray | None:
    return None if sums is None else sums.cpu().numpy()


@contextmanager
def _watched(block: nn.Module, head_dim: int) -> Iterator[Found]:
    """A dictionary that each forward pass of the block fills anew with sums over tokens."""
    found: Found = {}

    def change(module: nn.Module, inputs: tuple, keywords: dict, output: Any) -> None:
        before = inputs[0] if inputs else keywords["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        found["change"] = (1 - cosine).sum()

    def channels(module: nn.Module, inputs: tuple) -> None:
        found[MLP_INPUT] = inputs[0].float().abs().flatten(0, -2).sum(dim=0)

    def heads(module: nn.Module, inputs: tuple) -> None:
        by_head = inputs[0].float().unflatten(-1, (-1, head_dim))
        found[HEADS_INPUT] = by_head.norm(dim=-1).flatten(0, -2).sum(dim=0)

    with ExitStack() as stack:
        hooks = [block.register_forward_hook(change, with_kwargs=True)]
        for name, watch in ((MLP_INPUT, channels), (HEADS_INPUT, heads)):
            if part := dict(block.named_modules()).get(name):
                hooks.append(part.register_forward_pre_hook(watch))
        for hook in hooks:
            stack.callback(hook.remove)
        yield found
