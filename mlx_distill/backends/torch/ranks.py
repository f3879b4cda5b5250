"""Several processes that train one student: who this one is, sums over all, and FSDP2's shards.

In: the environment that `torchrun` sets. Each rank reads other micro-batches; parameters and
optimizer state are sharded by `fully_shard`, adapters are replicated and their gradients summed.
With one process everything here does nothing.
"""

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from mlx_distill.backends.protocol import Ranks
from mlx_distill.backends.torch.nf4 import is_packed
from mlx_distill.errors import RankLost
from mlx_distill.files import all_lines

if TYPE_CHECKING:
    from mlx_distill.backends.torch.model import SplitModel

LOST = (
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "Socket",
    "Timed out",
    "remote process exited",
)
PATIENCE = timedelta(
    hours=2
)  # the first rank may be writing, or waiting for another run's teacher cache


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def join(device: torch.device) -> Ranks:
    """Join the group that `torchrun` started this process for; alone where none did."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Ranks()
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", timeout=PATIENCE, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=PATIENCE)
    return Ranks(dist.get_rank(), dist.get_world_size())


def part() -> None:
    """Leave the group: what is loaded from now on is loaded whole."""
    if dist.is_initialized():
        dist.destroy_process_group()


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(values: np.ndarray, device: torch.device) -> np.ndarray:
    """The sum of float64 `values` over all ranks, on each."""
    if size() == 1:
        return values
    total = torch.from_numpy(np.array(values, np.float64)).to(device)
    try:
        dist.all_reduce(total)
    except RuntimeError as error:
        raise lost("a sum over all ranks", error) from None
    return total.cpu().numpy()


def shard(split: "SplitModel", trains: bool = False, dtype: torch.dtype = torch.float32) -> None:
    """Spread a split model's frozen and fully trained parameters over the ranks, a block at a time;
    adapters stay whole on each.

    Blocks of float32 are gathered in `dtype`, which autocast would cast each of them to and keep
    until the backward pass. What bitsandbytes packed stays whole: it keeps the scales on the
    parameter, which sharding replaces.
    """
    if size() == 1:
        return
    gathered = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    policy = {} if dtype == torch.float32 else {"mp_policy": gathered}
    stay = {
        parameter
        for name, parameter in split.model.named_parameters()
        if "lora_" in name or is_packed(parameter)
    }
    head, embedding = split.model.get_output_embeddings(), split.model.get_input_embeddings()
    tied = head.weight is embedding.weight
    for layer in split.layers:
        fully_shard(layer, ignored_params=stay, **policy)
    for module in (split.trunk, *(() if tied or not trains else (head,))):
        fully_shard(module, ignored_params=stay)
    if tied:
        head.weight = embedding.weight  # now its shards; the head lies outside of the trunk
    for module in split.model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(
                1.0
            )  # sums: the loss was divided by the tokens of all ranks
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, gathered from its shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_with_gradient(tensor: Tensor) -> Tensor:
    """The same, and every rank's gradient of it is summed into the shards."""
    return (
        tensor.full_tensor(grad_placements=[Partial()]) if isinstance(tensor, DTensor) else tensor
    )


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def sum_replicated(parameters: list[Tensor]) -> None:
    """Sum the gradients of what every rank holds whole."""
    if size() > 1:
        for parameter in parameters:
            if not isinstance(parameter, DTensor):
                dist.all_reduce(parameter.grad)


def is_loss_of_a_rank(error: Exception) -> bool:
    return any(sign in str(error) for sign in LOST)


def lost(what: str, error: Exception) -> RankLost:
    return RankLost(
        f"{what} failed because another rank is gone ({all_lines(error, 160)}); the last checkpoint is intact: "
        "start all ranks again"
    )
