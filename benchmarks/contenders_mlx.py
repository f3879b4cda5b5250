"""The distillation loss and its gradient on MLX: dense, a chunk loop left to autodiff, and ours."""

import time
from collections.abc import Callable

from benchmarks.workers import Numbers

CONTENDERS = ("dense", "autodiff", "ours")
DENSE_TENSORS = 9  # float32 [N, V] tensors at the dense formula's peak on a CPU


def bytes_needed(contender: str, positions: int, vocab: int) -> int:
    """What a contender will surely hold at once, to skip what does not fit; ours fits always."""
    return 0 if contender == "ours" else DENSE_TENSORS * positions * vocab * 4


def repetition(
    contender: str,
    positions: int,
    vocab: int,
    widths: tuple[int, int],
    trained: bool,
    chunk_tokens: int,
) -> Callable[[], Numbers]:
    """Hold the inputs; a repetition is the loss and its gradient, evaluated, and MLX's peak over
    what was active before.
    """
    from mlx_distill.blas import load_blas

    load_blas()
    return timed(build(contender, trained, chunk_tokens), positions, vocab, widths)


def timed(
    step: Callable, positions: int, vocab: int, widths: tuple[int, int]
) -> Callable[[], Numbers]:
    """Hold the inputs; a repetition is `step` of them, evaluated."""
    import mlx.core as mx

    mx.eval(
        step(*inputs(8, vocab, widths))
    )  # kernels are compiled here, not in the first repetition
    arrays = inputs(positions, vocab, widths)

    def repeat() -> Numbers:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        start, cpu_start = time.perf_counter(), time.process_time()
        value, gradients = step(*arrays)
        mx.eval(value, gradients)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        peak = mx.get_peak_memory() - before
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "peak_bytes": peak,
            "loss": value.item(),
        }

    return repeat


def inputs(positions: int, vocab: int, widths: tuple[int, int]) -> tuple:
    """hidden [N, D], matrix [V, D], teacher_hidden [N, Dt], teacher_matrix [V, Dt], targets [N]."""
    import mlx.core as mx

    mx.random.seed(0)
    width, teacher_width = widths
    shapes = (positions, width), (vocab, width), (positions, teacher_width), (vocab, teacher_width)
    hidden, matrix, teacher_hidden, teacher_matrix = (mx.random.normal(shape) for shape in shapes)
    arrays = (
        hidden,
        0.1 * matrix,
        teacher_hidden,
        0.1 * teacher_matrix,
        mx.random.randint(0, vocab, (positions,)),
    )
    mx.eval(arrays)
    return arrays


def build(contender: str, trained: bool, chunk_tokens: int):
    """`inputs` → (loss, gradients with respect to the hidden states and, if trained, the student's
    matrix).
    """
    import mlx.core as mx

    from mlx_distill.backends.mlx.heads import MatrixHead
    from mlx_distill.backends.mlx.loss import kd_loss
    from mlx_distill.objective import Objective

    def log_softmax(logits: mx.array) -> mx.array:
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    def dense_sum(hidden, matrix, teacher_hidden, teacher_matrix, targets):
        student, teacher = (
            log_softmax(hidden @ matrix.T),
            log_softmax(teacher_hidden @ teacher_matrix.T),
        )
        kd = (mx.exp(teacher) * (teacher - student)).sum(axis=-1)
        ce = -mx.take_along_axis(student, targets[:, None], axis=1)[:, 0]
        return (0.5 * kd + 0.5 * ce).sum()

    def dense(hidden, *rest):
        return dense_sum(hidden, *rest) / hidden.shape[0]

    def autodiff(hidden, matrix, teacher_hidden, teacher_matrix, targets):
        total = mx.array(0.0)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            total = total + dense_sum(
                hidden[rows], matrix, teacher_hidden[rows], teacher_matrix, targets[rows]
            )
        return total / hidden.shape[0]

    def ours(hidden, matrix, teacher_hidden, teacher_matrix, targets):
        weight, rows = mx.ones(targets.shape), hidden.shape[0]
        head = MatrixHead(teacher_matrix)
        return kd_loss(
            hidden,
            matrix,
            teacher_hidden,
            head,
            targets,
            weight,
            Objective(),
            float(rows),
            chunk_tokens,
            trained,
        ).loss

    step = mx.value_and_grad(
        {"dense": dense, "autodiff": autodiff, "ours": ours}[contender], (0, 1) if trained else 0
    )
    return mx.compile(step) if contender == "dense" else step
