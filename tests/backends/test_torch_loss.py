"""What only torch's chunked loss has: two buffers used again and again, gradients that are handed
out once, fused kernels.
"""

import re
import shutil
import sys
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from frameworks import FRAMEWORKS
from near import near
from test_loss import answer, exact, make_case
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlx_distill.backends.chunks import torch_rows
from mlx_distill.backends.torch import loss as subject
from mlx_distill.backends.torch import products
from mlx_distill.backends.torch.heads import CallableHead, MatrixHead
from mlx_distill.backends.torch.loss import kd_loss, score_rows
from mlx_distill.divergences import DIVERGENCES
from mlx_distill.objective import Objective

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # torch's compiler
TORCH = FRAMEWORKS["torch"]
VOCABULARY = 4001
CHUNK = 4 * torch_rows(VOCABULARY, 1)
BUFFER = 4 * CHUNK * VOCABULARY  # bytes of the logits of a chunk


class Ledger(TorchDispatchMode):
    """Every storage that is made under it: the largest, the most bytes alive at once, and how many
    held a chunk's logits or more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.largest = self.peak = self.buffers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage()._cdata not in given | self.live.keys()
            ):
                self._made(tensor.untyped_storage())
        return result

    def _made(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.live[key] = size
        weakref.finalize(storage, self.live.pop, key, None)
        self.largest, self.peak = max(self.largest, size), max(self.peak, sum(self.live.values()))
        self.buffers += size >= BUFFER


def ledger(
    rows: int,
    objective: Objective,
    function: Callable = kd_loss,
    train_head: bool = False,
    chunk: int = CHUNK,
) -> Ledger:
    """Of one loss and its backward pass over `rows` positions."""
    case = make_case(0, rows=rows, vocab=VOCABULARY, masked=False)
    hidden, matrix, teacher_hidden, teacher_matrix, targets, weight = map(
        TORCH.array, case.__dict__.values()
    )
    hidden.requires_grad_(), matrix.requires_grad_(train_head)
    arguments = (
        hidden,
        matrix,
        teacher_hidden,
        MatrixHead(teacher_matrix),
        targets,
        weight,
        objective,
    )
    with Ledger() as found:
        if function is score_rows:
            score_rows(*arguments, chunk)
        else:
            kd_loss(*arguments, 1.0, chunk, train_head).loss.backward()
    return found


def test_the_ledger_counts():
    with Ledger() as found:
        x = torch.zeros(4 * BUFFER // 4)
        y = x.view(2, -1) + 1
        del x, y
        torch.zeros(BUFFER // 4)
    assert (found.largest, found.peak, found.buffers, sum(found.live.values())) == (
        4 * BUFFER,
        8 * BUFFER,
        3,
        0,
    )


@pytest.mark.parametrize(
    "divergence, temperature, buffers",
    [
        ("forward_kl", 1.0, 1),
        ("forward_kl", 2.0, 3),
        ("reverse_kl", 1.0, 1),
        ("reverse_kl", 2.0, 3),
        ("jsd", 1.0, 6),
        ("jsd", 2.0, 8),
    ],
)
def test_peak_memory_does_not_grow_with_positions(
    divergence: str, temperature: float, buffers: int
):
    """Eight times the positions, the same peak but for what is returned: both logits of a chunk,
    and buffers of a few positions.
    """
    objective = Objective(divergence, temperature=temperature)
    small, large = ledger(4 * CHUNK, objective), ledger(32 * CHUNK, objective)
    rows = 4 * 32 * CHUNK * (24 + 16)  # the gradient [N, D] and a few columns [N]
    assert small.largest == large.largest == BUFFER
    assert small.peak <= large.peak <= small.peak + rows
    assert large.peak <= (2 + buffers / 4) * BUFFER + 2 * rows < 32 * BUFFER


@pytest.mark.parametrize("function", [kd_loss, score_rows])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_two_buffers_serve_every_chunk(divergence: str, function: Callable):
    assert [
        ledger(rows, Objective(divergence), function).buffers for rows in (CHUNK, 8 * CHUNK)
    ] == [2, 2]


def test_chunks_are_even(monkeypatch: pytest.MonkeyPatch):
    """A small last chunk would pass over the whole head for a few positions."""
    sizes, chunk = [], subject._Walk._chunk
    monkeypatch.setattr(
        subject._Walk, "_chunk", lambda *args: sizes.append(args[3]) or chunk(*args)
    )
    ledger(2 * CHUNK + 1, Objective())
    assert [place.stop - place.start for place in sizes] == [86, 86, 85]  # 2 × 128 + 1
    assert [place.start for place in sizes] == [0, 86, 172]


def test_whole_logits_are_seen_in_the_ledger():
    """The mutant: one chunk as long as the batch."""
    whole = ledger(32 * CHUNK, Objective(), chunk=32 * CHUNK)
    assert whole.largest == 32 * BUFFER and whole.peak > 2 * 32 * BUFFER


def test_a_trained_head_costs_its_gradient_and_no_more():
    frozen, trained = (
        ledger(8 * CHUNK, Objective()),
        ledger(8 * CHUNK, Objective(), train_head=True),
    )
    gradient = 4 * VOCABULARY * 24
    assert trained.peak - frozen.peak <= 2 * gradient  # it and `.grad`, at most
    assert trained.largest == max(BUFFER, gradient)


def test_half_precision_heads_are_promoted_in_blocks(monkeypatch: pytest.MonkeyPatch):
    """Never as a whole float32 copy, forward or backward, the student's or the teacher's."""
    monkeypatch.setattr(products, "BLOCK_ROWS", 64)
    case = make_case(0, rows=8, vocab=4096)
    hidden, matrix, teacher_hidden, teacher_matrix, targets, weight = map(
        TORCH.array, case.__dict__.values()
    )
    half, teacher_half = matrix.bfloat16(), teacher_matrix.bfloat16()
    with Ledger() as found:
        arguments = (
            teacher_hidden,
            MatrixHead(teacher_half),
            targets,
            weight,
            Objective(),
            8.0,
            2,
            False,
        )
        kd_loss(hidden.requires_grad_(), half, *arguments).loss.backward()
    assert (
        found.largest == 4 * 2 * 4096 < 4 * 4096 * 16
    )  # a chunk's logits; a promoted head would be twelve times as large


@pytest.mark.parametrize("block_rows", [1, 64, 203, 1000])
def test_blocks_of_a_half_precision_head_are_its_sum(
    block_rows: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(products, "BLOCK_ROWS", block_rows)
    case = make_case(5)
    left, right = torch.from_numpy(case.hidden), torch.from_numpy(case.matrix).bfloat16()
    wide = right.double()
    assert products.project(left, right).double() == near(left.double() @ wide.T, abs=1e-5)
    slope = torch.randn(31, 203, generator=torch.Generator().manual_seed(0))
    assert products.product(slope, right).double() == near(slope.double() @ wide, abs=1e-5)


def once(case, train_head: bool = True):
    hidden, matrix, teacher_hidden, teacher_matrix, targets, weight = map(
        TORCH.array, case.__dict__.values()
    )
    leaves = hidden.requires_grad_(), matrix.requires_grad_()
    rows = kd_loss(
        *leaves,
        teacher_hidden,
        MatrixHead(teacher_matrix),
        targets,
        weight,
        Objective(),
        31.0,
        8,
        train_head,
    )
    return leaves, rows


@pytest.mark.parametrize("retain_graph", [False, True])
def test_backward_runs_once(retain_graph: bool):
    """The gradients are scaled where they lie: a second pass would scale them twice."""
    (hidden, _), rows = once(make_case(0))
    (rows.loss * 2).backward(retain_graph=retain_graph)
    first = hidden.grad.clone()
    with pytest.raises(RuntimeError):
        rows.loss.backward()
    assert torch.equal(hidden.grad, first)


def test_gradients_are_scaled_by_what_follows_and_added_to_what_is_there():
    case = make_case(0)
    want = exact(case, Objective())
    leaves, rows = once(case)
    (3 * rows.loss).backward()
    again = kd_loss(
        *leaves,
        torch.from_numpy(case.teacher_hidden),
        MatrixHead(torch.from_numpy(case.teacher_matrix)),
        torch.from_numpy(case.targets),
        torch.from_numpy(case.weight),
        Objective(),
        31.0,
        8,
        True,
    )
    again.loss.backward()
    for leaf, name in zip(leaves, ("hidden_grad", "weight_grad"), strict=True):
        assert leaf.grad.numpy() == near(4 * want[name], rel=1e-4, abs=1e-6)


def test_there_is_no_second_derivative():
    (hidden, _), rows = once(make_case(0))
    [gradient] = torch.autograd.grad(rows.loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_only_the_loss_carries_gradients():
    _, rows = once(make_case(0))
    assert rows.loss.requires_grad and not any(column.requires_grad for column in rows[1:])


@pytest.mark.parametrize("train_head", [False, True])
def test_no_gradient_work_where_no_gradient_is_asked_for(
    train_head: bool, monkeypatch: pytest.MonkeyPatch
):
    """Not for hidden states that do not train (a LoRA of nothing, a frozen trunk), not for a head
    that does not, not for scores.
    """
    made, add = [], []
    product, add_product = products.product, products.add_product
    monkeypatch.setattr(subject, "product", lambda *args: made.append(0) or product(*args))
    monkeypatch.setattr(
        subject,
        "add_product",
        lambda *args, **options: add.append(0) or add_product(*args, **options),
    )
    case = make_case(0, rows=16)
    hidden, matrix, teacher_hidden, teacher_matrix, targets, weight = map(
        TORCH.array, case.__dict__.values()
    )
    arguments = (teacher_hidden, MatrixHead(teacher_matrix), targets, weight, Objective())
    rows = kd_loss(hidden, matrix.requires_grad_(), *arguments, 16.0, 8, train_head)
    assert (len(made), len(add), rows.loss.requires_grad) == (0, 2 * train_head, train_head)
    kd_loss(hidden.requires_grad_(), matrix, *arguments, 16.0, 8, train_head)
    assert (len(made), len(add)) == (2, 4 * train_head)
    scores = score_rows(hidden, matrix, *arguments, 8)
    assert (len(made), len(add), scores.loss.requires_grad) == (2, 4 * train_head, False)


def test_what_is_given_is_left_alone():
    """The buffers are overwritten, the arguments are not."""
    case = make_case(0)
    arrays = list(map(TORCH.array, case.__dict__.values()))
    kept = [array.clone() for array in arrays]
    hidden, matrix, teacher_hidden, teacher_matrix, targets, weight = arrays
    for head in (
        MatrixHead(teacher_matrix, torch.ones(203)),
        CallableHead(lambda hidden: hidden @ teacher_matrix.T),
    ):
        for objective in (Objective(temperature=2.0), Objective("reverse_kl"), Objective("jsd")):
            score_rows(hidden, matrix, teacher_hidden, head, targets, weight, objective, 8)
    assert all(torch.equal(array, before) for array, before in zip(arrays, kept, strict=True))


@pytest.fixture
def compiler():
    """`_compiled`, and torch's settings as they were afterwards; the function itself off Linux or
    without a C++ compiler.
    """
    import torch._dynamo

    with torch._dynamo.config.patch(suppress_errors=False):
        yield (
            subject._compiled
            if sys.platform == "linux" and shutil.which("c++")
            else lambda function: function
        )
    subject._compiled.cache_clear()
    torch._dynamo.reset()


@pytest.fixture
def pretended_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU that say they lie on CUDA, and the one product of CUDA's that the CPU
    lacks.
    """
    product = torch.mm

    def mm(left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        assert left.dtype == right.dtype
        return product(left.float(), right.float()).to(out_dtype)

    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch, "mm", mm)


@pytest.mark.parametrize("divergence", (*DIVERGENCES, "dkd"))
@pytest.mark.parametrize("temperature, kd_weight", [(1.0, 0.4), (2.0, 0.4), (1.0, 1.0), (2.0, 0.0)])
def test_cudas_branch_computes_the_definition(
    pretended_cuda,
    monkeypatch: pytest.MonkeyPatch,
    divergence: str,
    temperature: float,
    kd_weight: float,
):
    monkeypatch.setattr(subject, "_compiled", lambda function: function)
    case, objective = make_case(0), Objective(divergence, 0.3, kd_weight, temperature)
    got, want = answer(TORCH, case, objective), exact(case, objective)
    for name, array in want.items():
        assert got[name] == near(array, rel=1e-5, abs=2e-6), name


@pytest.mark.parametrize("train_head", [False, True])
def test_cudas_products_in_half_precision(
    pretended_cuda, monkeypatch: pytest.MonkeyPatch, train_head: bool
):
    """Of bfloat16 alone, float32 without: its 8 bits are what the gradients differ by, and the rows
    do not lose them again.
    """
    monkeypatch.setattr(subject, "_compiled", lambda function: function)
    case, objective = make_case(0, rows=64, masked=False), Objective()
    want = exact(case, objective)
    hidden, matrix, teacher_hidden, teacher_matrix, targets, weight = map(
        TORCH.array, case.__dict__.values()
    )
    hidden, matrix = hidden.bfloat16().requires_grad_(), matrix.requires_grad_(train_head)
    head = MatrixHead(teacher_matrix.bfloat16())
    rows = kd_loss(
        hidden,
        matrix,
        teacher_hidden.bfloat16(),
        head,
        targets,
        weight,
        objective,
        64.0,
        16,
        train_head,
        dtype=torch.bfloat16,
    )
    rows.loss.backward()
    assert (rows.loss.dtype, rows.kd.dtype, hidden.grad.dtype) == (
        torch.float32,
        torch.float32,
        torch.bfloat16,
    )
    assert rows.loss.item() == pytest.approx(want["loss"], rel=2e-3)
    for found, name in [
        (hidden.grad, "hidden_grad"),
        *([(matrix.grad, "weight_grad")] if train_head else []),
    ]:
        error = np.linalg.norm(found.double().numpy() - want[name]) / np.linalg.norm(want[name])
        assert 1e-4 < error < 1e-2, name


@pytest.mark.parametrize(
    "divergence, dtype",
    [("forward_kl", torch.bfloat16), ("jsd", torch.float32), ("dkd", torch.float32)],
)
def test_the_fused_kernels_tell_the_same_numbers(
    compiler: Callable, divergence: str, dtype: torch.dtype
):
    """As CUDA runs them, here through the CPU's compiler; the logits stay as they were."""
    random = torch.Generator().manual_seed(0)
    logits, answers = (2 * torch.randn(16, 203, generator=random) for _ in range(2))
    targets, share = (
        torch.randint(0, 203, (16, 1), generator=random),
        torch.rand(16, 1, generator=random),
    )
    kept = logits.clone(), answers.clone()
    arguments = (targets, share, Objective(divergence), True, dtype)
    eager = subject._by_rows(logits.clone(), answers.clone(), torch.empty(4, 203), *arguments[:-1])
    fused_cross = compiler(subject._at_once)  # which warns if it runs eagerly: an error here
    fused = fused_cross(logits, answers, *arguments)
    assert torch.equal(logits, kept[0]) and torch.equal(answers, kept[1])
    assert fused[0].dtype == dtype
    torch.testing.assert_close(
        fused[0].float(), eager[0], rtol=1e-5 if dtype == torch.float32 else 2**-8, atol=1e-6
    )
    for found, expected in zip(fused[1:], eager[1:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_fused_forward_kl_writes_its_slope_alone(compiler: Callable):
    """No other [C, V] is made or written: traffic is what the elementwise part costs a GPU."""
    if compiler is not subject._compiled:
        pytest.skip("no compiler")  # which tests/conftest.py lets nobody miss
    from torch._inductor.utils import run_and_get_code

    logits, answers = torch.zeros(16, 1003), torch.ones(16, 1003)
    targets, share = torch.zeros(16, 1, dtype=torch.long), torch.ones(16, 1)
    _, code = run_and_get_code(
        compiler(subject._at_once),
        logits,
        answers,
        targets,
        share,
        Objective(),
        True,
        torch.bfloat16,
    )
    made = re.findall(
        r"empty_strided_cpu\(\((?:16|s\d+), 1003\), \(1003, 1\), torch\.(\w+)\)", "".join(code)
    )
    assert made == ["bfloat16"]


def test_a_compiler_that_fails_is_told_once_and_leaves_torchs_settings_alone(monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    from mlx_distill.backends.torch.compiled import Compiled

    def broken(function: Callable) -> Callable:
        def fails(*arguments):
            raise TorchDynamoException("no C++ compiler\nand more")

        return fails

    monkeypatch.setattr(torch, "compile", broken)
    before = torch._dynamo.config.suppress_errors, torch._dynamo.config.recompile_limit
    doubled = Compiled(lambda x: 2 * x)
    with pytest.warns(RuntimeWarning, match="runs eagerly and more slowly: no C"):
        assert doubled(torch.ones(3)).tolist() == [2, 2, 2]
    assert doubled(torch.ones(2)).tolist() == [2, 2]  # and says nothing
    assert before == (torch._dynamo.config.suppress_errors, torch._dynamo.config.recompile_limit)


def test_another_number_of_rows_is_no_other_compilation(compiler: Callable):
    if compiler is not subject._compiled:
        pytest.skip("no compiler")  # which tests/conftest.py lets nobody miss
    from torch._dynamo.testing import CompileCounter

    from mlx_distill.backends.torch.compiled import Compiled

    counter, plain = CompileCounter(), torch.compile
    function = Compiled(lambda x: x.exp().sum(dim=1))
    function._fused = plain(function.function, backend=counter)
    for rows in (7, 5, 16):
        function(torch.ones(rows, 4))
    assert counter.frame_count == 1
