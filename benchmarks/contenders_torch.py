"""The distillation loss on torch: ours, the peers' own functions and the paper's formulation, on
one objective.

The objective is `kd_weight · KL(teacher‖student) + (1 - kd_weight) · cross-entropy` at temperature
1, a mean over the positions that have a label. Contenders, named as in the tables:

- paper: dense logits, softmax and then its logarithm, KL and cross-entropy left to autograd.
- trl-gkd: `GKDTrainer.generalized_jsd_loss(beta=0)` of TRL (trl.experimental.gkd; GOLD's is the
  same): dense log-softmax and `F.kl_div`; the cross-entropy of the same logits is added.
- trl: `_chunked_divergence_loss(beta=0)` of TRL's `DistillationTrainer`: tiles of 4,096 × 32,768
  logits, the backward projects again. It has no cross-entropy; the one added is TRL's own chunked
  one, `ChunkedLogProbFunction`, which the `SFTTrainer` uses: it projects twice more. At `kd_weight`
  1 TRL pays nothing that it would not pay itself.
- liger, liger-eager: `liger_kernel.chunked_loss.LigerFusedLinearJSDLoss(beta=0)` as it ships
  (`torch.compile`d) and with `compiled=False`: chunks of 1,024 positions (up to 2,047) with all of
  the vocabulary, soft and hard loss in one call. Always computes the gradient of the head.
- liger-triton (CUDA alone): `LigerFusedLinearJSD(jsd_beta=0)` and
  `LigerFusedLinearCrossEntropyLoss`.
- ours: `mlx_distill.backends.torch.loss.kd_loss`.
- matmuls: no contender, the four products (three with a frozen head) that any of them needs, and
  nothing else.
"""

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.machines import PeakMemory
from benchmarks.workers import Numbers

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label of a position without loss
CONTENDERS = ("paper", "trl-gkd", "trl", "liger-eager", "liger", "ours")
ON_CUDA_ALONE = ("liger-triton",)
DENSE = ("paper", "trl-gkd")
MATMUL_ROWS = 1024
DENSE_TENSORS, LIGER_TENSORS = (
    8,
    8,
)  # float32 [rows, V] tensors at a contender's peak, for what to skip


class Inputs(NamedTuple):
    """What a head and loss are given: hidden [N, D], weight [V, D], teacher_hidden [N, Dt],
    teacher_weight [V, Dt], labels [N].
    """

    hidden: "torch.Tensor"
    weight: "torch.Tensor"
    teacher_hidden: "torch.Tensor"
    teacher_weight: "torch.Tensor"
    labels: "torch.Tensor"


def bytes_needed(contender: str, positions: int, vocab: int) -> int:
    """What a contender will surely hold at once, to skip what does not fit; ours fits always."""
    if contender in DENSE:
        return DENSE_TENSORS * positions * vocab * 4
    return LIGER_TENSORS * min(positions, 2047) * vocab * 4 if contender.startswith("liger") else 0


def random_inputs(
    positions: int,
    vocab: int,
    widths: tuple[int, int],
    trained: bool,
    device: str = "cpu",
    dtype: str = "float32",
) -> Inputs:
    """Seeded numbers: hidden states and the teacher's head in `dtype`, the student's head in
    float32 as it trains.
    """
    import torch

    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, width: int, scale: float, kind: str) -> torch.Tensor:
        return (scale * torch.randn(rows, width, generator=generator, device=device)).to(
            getattr(torch, kind)
        )

    width, teacher_width = widths
    return Inputs(
        normal(positions, width, 1.0, dtype).requires_grad_(),
        normal(vocab, width, 2.0 / width**0.5, "float32").requires_grad_(trained),
        normal(positions, teacher_width, 1.0, dtype),
        normal(vocab, teacher_width, 2.0 / teacher_width**0.5, dtype),
        torch.randint(0, vocab, (positions,), generator=generator, device=device),
    )


def repetition(
    contender: str,
    positions: int,
    vocab: int,
    widths: tuple[int, int],
    trained: bool,
    chunk_tokens: int,
    kd_weight: float = 0.5,
    device: str = "cpu",
    dtype: str = "float32",
) -> Callable[[], Numbers]:
    """Hold the inputs; a repetition is the loss and its gradient. One was run before, unmeasured:
    it compiles and warms.
    """
    x = random_inputs(positions, vocab, widths, trained, device, dtype)
    if contender == "matmuls":
        step, norm = matmuls(x), 0.0
        step()
    else:
        norm = norm_of(value_and_gradients(contender, x, kd_weight, chunk_tokens)[1:])
        step = lambda: value_and_gradients(contender, x, kd_weight, chunk_tokens)[0]  # noqa: E731
    return lambda: {**measured(step, device, dtype), "grad_norm": norm}


def norm_of(gradients: Iterable["torch.Tensor"]) -> float:
    return sum(float(gradient.float().square().sum(dim=-1).sum()) for gradient in gradients) ** 0.5


def measured(step: Callable[[], "torch.Tensor"], device: str, dtype: str) -> Numbers:
    """Seconds, CPU seconds and peak memory of one call, the loss it returned, and what a square
    product in `dtype` reaches just after.
    """
    memory = PeakMemory(device == "cuda")
    memory.start()
    start, cpu_start = time.perf_counter(), time.process_time()
    loss = step()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    found = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        **memory.stop(),
    }
    return {
        **found,
        "loss": float(loss),
        "matmul_flops": matmul_rate(device, dtype),
        **named_device(device),
    }


def named_device(device: str) -> dict[str, str]:
    import torch

    return {
        "device_name": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


def matmul_rate(device: str, dtype: str, repeats: int = 3) -> float:
    """The best of a few square products' operations a second: the peak that shares are of."""
    import torch

    size = 8192 if device == "cuda" else 1024
    left = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        left @ left
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def value_and_gradients(
    contender: str, x: Inputs, kd_weight: float, chunk_tokens: int
) -> tuple["torch.Tensor", ...]:
    """The loss, d loss / d hidden and, if it trains, d loss / d weight."""
    import torch

    with autocast(x.hidden, contender):
        loss = head_and_loss(contender, x, kd_weight, chunk_tokens)
    wanted = [tensor for tensor in (x.hidden, x.weight) if tensor.requires_grad]
    return loss.detach(), *torch.autograd.grad(loss, wanted)


def autocast(hidden: "torch.Tensor", contender: str) -> contextlib.AbstractContextManager:
    """As the peers' trainers do for half precision; ours casts itself."""
    import torch

    if hidden.dtype == torch.float32 or contender == "ours":
        return contextlib.nullcontext()
    return torch.autocast(hidden.device.type, hidden.dtype)


def head_and_loss(contender: str, x: Inputs, kd_weight: float, chunk_tokens: int) -> "torch.Tensor":
    """From hidden states [N, D] to the scalar, by a contender's own function."""
    if contender in DENSE:
        import torch

        student = torch.nn.functional.linear(x.hidden, x.weight)
        with torch.no_grad():
            teacher = torch.nn.functional.linear(x.teacher_hidden, x.teacher_weight)
        return dense_loss(contender, student[None], teacher[None], x.labels[None], kd_weight)
    functions = {
        "trl": trl,
        "liger": liger,
        "liger-eager": liger_eager,
        "liger-triton": liger_triton,
    }
    return (
        ours(x, kd_weight, chunk_tokens)
        if contender == "ours"
        else functions[contender](x, kd_weight)
    )


def dense_loss(
    contender: str,
    student: "torch.Tensor",
    teacher: "torch.Tensor",
    labels: "torch.Tensor",
    kd_weight: float,
) -> "torch.Tensor":
    """From logits [B, T, V] of all positions and labels [B, T] (shifted, IGNORED where there is no
    loss) to the scalar.
    """
    import torch.nn.functional as F

    kd = {"paper": paper, "trl-gkd": trl_gkd}[contender](student, teacher, labels)
    if kd_weight == 1:
        return kd
    hard = F.cross_entropy(student.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED)
    return kd_weight * kd + (1 - kd_weight) * hard


def paper(
    student: "torch.Tensor", teacher: "torch.Tensor", labels: "torch.Tensor"
) -> "torch.Tensor":
    p, q = teacher.float().softmax(-1), student.float().softmax(-1)
    rows = (p * (p.log() - q.log())).sum(-1)
    return rows[labels != IGNORED].mean()


def trl_gkd(
    student: "torch.Tensor", teacher: "torch.Tensor", labels: "torch.Tensor"
) -> "torch.Tensor":
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(
        student, teacher, labels, beta=0.0, num_items_in_batch=(labels != IGNORED).sum()
    )


def trl(x: Inputs, kd_weight: float) -> "torch.Tensor":
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    count = (x.labels != IGNORED).sum()
    mask = (x.labels != IGNORED)[None]
    kd, _, _ = _chunked_divergence_loss(
        x.hidden[None],
        x.teacher_hidden[None],
        x.weight,
        x.teacher_weight,
        mask,
        beta=0.0,
        num_items_in_batch=count,
    )
    if kd_weight == 1:
        return kd
    vocab_chunk, softcap, scale, outputs = (
        32_768,
        None,
        1.0,
        (),
    )  # as TRL's SFT loss calls it, without its metrics
    log_probability = ChunkedLogProbFunction.apply(
        x.hidden, x.weight, None, x.labels.clamp(min=0), 1.0, vocab_chunk, softcap, scale, outputs
    )[0]
    return kd_weight * kd - (1 - kd_weight) * log_probability.masked_fill(~mask[0], 0).sum() / count


def liger(x: Inputs, kd_weight: float, compiled: bool = True) -> "torch.Tensor":
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        1 - kd_weight, kd_weight, beta=0.0, ignore_index=IGNORED, temperature=1.0, compiled=compiled
    )
    return loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, x.labels)


def liger_eager(x: Inputs, kd_weight: float) -> "torch.Tensor":
    return liger(x, kd_weight, compiled=False)


def liger_triton(x: Inputs, kd_weight: float) -> "torch.Tensor":
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    divergence = LigerFusedLinearJSD(jsd_beta=0.0, ignore_index=IGNORED, temperature=1.0)
    kd = divergence(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, x.labels)
    if kd_weight == 1:
        return kd
    hard = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED)(x.weight, x.hidden, x.labels)
    return kd_weight * kd + (1 - kd_weight) * hard


def ours(x: Inputs, kd_weight: float, chunk_tokens: int) -> "torch.Tensor":
    import torch

    from mlx_distill.backends.torch.heads import MatrixHead
    from mlx_distill.backends.torch.loss import kd_loss
    from mlx_distill.objective import Objective

    rows = len(x.labels)
    weight = torch.ones(rows, device=x.labels.device)
    return kd_loss(
        x.hidden,
        x.weight,
        x.teacher_hidden,
        MatrixHead(x.teacher_weight),
        x.labels,
        weight,
        Objective(kd_weight=kd_weight),
        float(rows),
        chunk_tokens,
        x.weight.requires_grad,
        dtype=x.hidden.dtype,
    ).loss


def matmuls(x: Inputs) -> Callable[[], "torch.Tensor"]:
    """Both heads' products and the two of the gradient, `MATMUL_ROWS` positions at a time, float32
    out where half goes in on CUDA.
    """
    import torch

    low = x.hidden.dtype
    out = {"out_dtype": torch.float32} if x.hidden.is_cuda and low != torch.float32 else {}
    hidden, weight = x.hidden.detach(), x.weight.detach().to(low)
    slope = torch.randn(min(MATMUL_ROWS, len(hidden)), len(weight), device=hidden.device).to(low)
    head_gradient = torch.zeros(weight.shape, device=hidden.device)

    def step() -> torch.Tensor:
        for start in range(0, len(hidden), MATMUL_ROWS):
            rows = slice(start, start + MATMUL_ROWS)
            count = len(hidden[rows])
            torch.mm(hidden[rows], weight.T, **out)
            torch.mm(x.teacher_hidden[rows], x.teacher_weight.T, **out)
            torch.mm(slope[:count], weight, **out)
            if x.weight.requires_grad:
                torch.addmm(head_gradient, slope[:count].T, hidden[rows], **out, out=head_gradient)
        return torch.zeros(())

    return step
