"""The same recipe on MLX and on torch, both in float32 on a CPU: two independent texts that must
tell the same numbers.

Logits 1e-4 apart, loss terms 1e-5 relative, gradients 1e-4 relative, the losses of 50 training
steps 1e-3 relative to the end, greedy generations token for token where the best token leads by
more than 1e-3. Gradients are looked at as in `test_contract.py`.
"""

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from test_contract import (
    LOGITS,
    ROWS,
    SEQUENCES,
    TUNINGS,
    accumulate,
    assert_close,
    batch,
    gradients,
    load_student,
    sequence,
    weights,
)
from tiny import family_folder, llama_config, texts

from mlx_distill.backends import choose_backend
from mlx_distill.backends.loss_sums import LossSums
from mlx_distill.backends.protocol import Backend, Student, Teacher
from mlx_distill.backends.torch import dense, divergences
from mlx_distill.backends.torch import loss as torch_loss
from mlx_distill.backends.torch import student as torch_student
from mlx_distill.backends.torch.generate import TorchModel
from mlx_distill.data.batches import Steps
from mlx_distill.data.truncate import thin, truncate
from mlx_distill.objective import Objective
from mlx_distill.recipe.tables import TruncationTable
from mlx_distill.recipe.training_tables import BatchTable
from mlx_distill.training.loop import loss_terms

BOTH = ("mlx", "torch")
FAMILIES = {
    "llama tied": llama_config(vocabulary=ROWS),
    "llama untied": llama_config(vocabulary=ROWS, tied=False),
    "qwen3 tied": llama_config(vocabulary=ROWS, family="qwen3"),
    "qwen3 untied": llama_config(vocabulary=ROWS, family="qwen3", tied=False),
}
HOT = {"kd_weight": 1.0, "temperature": 2.0}
# each divergence on each tuning, mixed and plain, hot and cold
DIVERGENCES = [
    ("full", Objective("forward_kl", kd_weight=0.5)),
    ("lora", Objective("forward_kl", **HOT)),
    ("full", Objective("reverse_kl", **HOT)),
    ("lora", Objective("reverse_kl", kd_weight=0.5)),
    ("full", Objective("jsd", 0.3, kd_weight=0.5)),
    ("lora", Objective("jsd", 0.3, **HOT)),
    ("full", Objective("skew_kl", temperature=2.0)),
    ("full", Objective("tvd")),
    ("full", Objective("mixed_kl", mixed_weight=0.3)),
    ("full", Objective("log_tvd", kd_weight=0.5)),
    ("full", Objective("entropy_kl", entropy_half=0.5, **HOT)),
    ("full", Objective("dkd", temperature=2.0, dkd_rest=8.0)),
    ("lora", Objective("dkd", kd_weight=0.5, dkd_target=2.0)),
    ("lora", Objective("skew_reverse_kl")),
]
TRAJECTORIES = [  # what errors compound over: the other families and objectives are compared in one pass
    ("llama tied", "full", Objective(), 50),
    ("qwen3 untied", "dora", Objective("jsd", 0.3, **HOT), 50),
    ("qwen3 untied", "full", Objective("reverse_kl", **HOT), 20),
    ("llama tied", "lora", Objective("skew_kl", kd_weight=0.5), 20),
]
# llama and qwen3, tied and untied, with each tuning
ONE_PASS = [
    *(("llama tied", "full"), ("llama untied", "lora"), ("llama tied", "dora")),
    *(("qwen3 untied", "full"), ("qwen3 tied", "lora"), ("qwen3 untied", "dora")),
]
# one of each kind of batch: shorter rows, masked ones with their context, single tokens left out
TRUNCATIONS = {
    "prefix": {"fraction": 0.5},
    "suffix in context": {"keep": "suffix", "fraction": 0.5, "context": "keep"},
    "half of the cot": {"span": "cot", "fraction": 0.5},
    "a share": {"token_share": 0.5},
}


@pytest.fixture(scope="module")
def backends() -> list[Backend]:
    return [choose_backend(name) for name in BOTH]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory) -> Callable[[str], Path]:
    """A family → a folder with a teacher of 3 layers and a student of 2, made once."""
    return cache(lambda family: pair(tmp_path_factory.mktemp("pair"), family))


@pytest.fixture(params=FAMILIES)
def root(request, folder_of) -> Path:
    return folder_of(request.param)


@pytest.fixture
def llamas(folder_of) -> Path:
    return folder_of("llama tied")


def pair(folder: Path, family: str) -> Path:
    family_folder(folder / "teacher", FAMILIES[family] | {"num_hidden_layers": 3}, seed=1)
    family_folder(folder / "student", FAMILIES[family], seed=2)
    return folder


def teachers(backends: list[Backend], root: Path) -> list[Teacher]:
    return [backend.load_teacher(root / "teacher", "teacher") for backend in backends]


def students(backends: list[Backend], root: Path, *args, **settings) -> list[Student]:
    return [load_student(backend, root, *args, **settings) for backend in backends]


def assert_same_sums(found: LossSums, expected: LossSums) -> None:
    for name in ("kd", "ce"):
        np.testing.assert_allclose(
            found.terms[name], expected.terms[name], rtol=1e-5, atol=1e-9, err_msg=name
        )
    assert np.array_equal(found.terms["agree"], expected.terms["agree"])
    assert np.array_equal(found.tokens, expected.tokens)


# One pass


@pytest.mark.parametrize("which", ["teacher", *TUNINGS])
def test_logits(backends: list[Backend], root: Path, which: str):
    pairs = teachers(backends, root) if which == "teacher" else students(backends, root, which)
    ids = SEQUENCES[3].tokens.tolist()
    ours, theirs = (LOGITS[name](model, ids) for name, model in zip(BOTH, pairs, strict=True))
    assert np.abs(ours).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family, tuning", ONE_PASS)
def test_losses_and_gradients(backends: list[Backend], folder_of, family: str, tuning: str):
    assert_losses_and_gradients(backends, folder_of(family), tuning, Objective(kd_weight=0.5))


@pytest.mark.parametrize(
    "tuning, objective", DIVERGENCES, ids=[f"{t} {o.divergence}" for t, o in DIVERGENCES]
)
def test_divergences(backends: list[Backend], llamas: Path, tuning: str, objective: Objective):
    assert_losses_and_gradients(backends, llamas, tuning, objective)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_without_a_teacher(backends: list[Backend], llamas: Path, tuning: str):
    assert_losses_and_gradients(backends, llamas, tuning, Objective(kd_weight=0.0), taught=False)


def assert_losses_and_gradients(
    backends: list[Backend], root: Path, tuning: str, objective: Objective, taught: bool = True
) -> None:
    taught_by = teachers(backends, root) if taught else [None, None]
    pairs = list(zip(students(backends, root, tuning), taught_by, strict=True))
    assert_same_sums(
        *(
            student.score(batch(), teacher.targets(batch()) if teacher else None, objective)
            for student, teacher in pairs
        )
    )
    ours, theirs = (
        gradients(student, teacher, [batch(SEQUENCES[:2]), batch(SEQUENCES[2:])], objective)
        for student, teacher in pairs
    )
    assert_close(theirs, ours, 1e-4)


# Training


def long_sequences(table: TruncationTable) -> list:
    """Forty of 20 to 44 tokens, after the cut."""
    whole = [
        sequence(length, seed)
        for seed, length in enumerate(np.random.default_rng(0).integers(20, 45, 40).tolist())
    ]
    return [thin(truncate(one, table), table.token_share, ("cot", "answer"), 0) for one in whole]


def trajectory(
    backend: Backend,
    root: Path,
    tuning: str,
    optim: dict,
    objective: Objective,
    truncation: dict,
    steps: int = 50,
) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """The loss terms of every step, and the weights at the end."""
    teacher, student = (
        backend.load_teacher(root / "teacher", "teacher"),
        load_student(backend, root, tuning, optim),
    )
    table = BatchTable(micro_batch_size=2, global_batch_size=4, pad_multiple=8)
    rows = []
    for step in Steps(
        long_sequences(TruncationTable(**truncation)), ("cot", "answer"), table, seed=3, steps=steps
    ):
        sums = [
            student.accumulate(part, teacher.targets(part), objective, step.loss_tokens)
            for part in step.batches
        ]
        rows.append(loss_terms(sum(sums[1:], sums[0]), objective))
        student.apply(optim["learning_rate"])
    return rows, weights(student)


def assert_same_trajectory(
    backends: list[Backend],
    root: Path,
    tuning: str = "full",
    optim: dict | None = None,
    objective: Objective | None = None,
    steps: int = 50,
) -> None:
    optim = optim or {"learning_rate": 3e-3, "weight_decay": 0.1}
    settings = tuning, optim, objective or Objective(), {"fraction": 0.7}, steps
    (ours, weight), (theirs, other) = (trajectory(backend, root, *settings) for backend in backends)
    start, end = (
        np.mean([row["loss"] for row in ours[place]]) for place in (slice(5), slice(-5, None))
    )
    assert (
        len(ours) == steps and end < 0.95 * start
    )  # there was something to learn, and it was learned
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=1e-3), (step, name)
    assert_close(other, weight, 2e-2)


@pytest.mark.parametrize(
    "family, tuning, objective, steps",
    TRAJECTORIES,
    ids=[f"{family}, {tuning}, {o.divergence}" for family, tuning, o, _ in TRAJECTORIES],
)
def test_many_steps(
    backends: list[Backend], folder_of, family: str, tuning: str, objective: Objective, steps: int
):
    assert_same_trajectory(backends, folder_of(family), tuning, objective=objective, steps=steps)


def test_steps_of_adafactor(backends: list[Backend], llamas: Path):
    """Its rule is compared with its definition in test_optimizers.py, its steps with adapters below,
    where one backend continues what the other began.
    """
    optim = {"optimizer": "adafactor", "learning_rate": 2e-2, "weight_decay": 0.1}
    assert_same_trajectory(backends, llamas, "full", optim, steps=20)


@pytest.mark.parametrize("name", TRUNCATIONS)
def test_a_step_of_each_truncation(backends: list[Backend], llamas: Path, name: str):
    """Cuts are made before a backend sees them: what is compared is each kind of batch that comes
    out.
    """
    table, optim = (
        TruncationTable(**TRUNCATIONS[name]),
        {"learning_rate": 3e-3, "weight_decay": 0.1},
    )
    whole, cut = long_sequences(TruncationTable()), long_sequences(table)
    learned = [
        sum(one.supervised(("cot", "answer")).sum() for one in side) for side in (whole, cut)
    ]
    assert 0 < learned[1] < learned[0]
    settings = "full", optim, Objective(), TRUNCATIONS[name], 3
    (ours, weight), (theirs, other) = (trajectory(one, llamas, *settings) for one in backends)
    for a, b in zip(ours, theirs, strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    assert_close(other, weight, 1e-3)


# Generation

PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3, 2, 1], [40, 41], [5, 6, 7, 8]]


def test_greedy_generations_agree(backends: list[Backend], root: Path):
    """Token for token, as far as the best token leads the second by more than 1e-3."""
    ours, theirs = teachers(backends, root)
    written = [texts(model, PROMPTS, 24, batch_size=2) for model in (ours, theirs)]
    compared = 0
    for prompt, one, other in zip(PROMPTS, *written, strict=True):
        logits = np.sort(LOGITS["mlx"](ours, prompt + one), axis=-1)[len(prompt) - 1 : -1]
        sure = np.append(logits[:, -1] - logits[:, -2] > 1e-3, False)
        until = int(sure.argmin())  # the first token that is a toss-up
        assert one[:until] == other[:until]
        compared += until
    assert compared > 60


def test_drawn_texts_agree(backends: list[Backend], root: Path):
    """The same numbers draw them, so they part only where a sum lies within rounding of one."""
    ours, theirs = teachers(backends, root)
    drawn = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    one, other = (texts(model, PROMPTS, 24, batch_size=4, **drawn) for model in (ours, theirs))
    assert sum(a == b for a, b in zip(one, other, strict=True)) >= len(PROMPTS) - 1
    assert one != texts(ours, PROMPTS, 24, batch_size=4, **(drawn | {"seed": 4}))


# State


CONTINUED = [  # each tuning by each optimizer and in each direction
    *(("full", "adamw", BOTH), ("lora", "adamw", BOTH[::-1]), ("dora", "adamw", BOTH)),
    *(("full", "adafactor", BOTH[::-1]), ("lora", "adafactor", BOTH)),
    ("dora", "adafactor", BOTH[::-1]),
    ("full", "schedule_free_adamw", BOTH),
    ("lora", "schedule_free_adamw", BOTH[::-1]),
]


@pytest.mark.parametrize("tuning, optimizer, order", CONTINUED)
def test_one_continues_what_the_other_began(
    backends: list[Backend],
    llamas: Path,
    tmp_path: Path,
    tuning: str,
    optimizer: str,
    order: tuple[str, str],
):
    """Weights to the bit, and with the optimizer's state the next steps too."""
    first, second = order
    optim = {"optimizer": optimizer, "learning_rate": 1e-2, "weight_decay": 0.1}
    named, taught = (
        dict(zip(BOTH, backends, strict=True)),
        dict(zip(BOTH, teachers(backends, llamas), strict=True)),
    )
    begun, continued = (
        load_student(named[name], llamas, tuning, optim) for name in (first, second)
    )
    for part in (SEQUENCES[:2], SEQUENCES[2:]):
        accumulate(begun, taught[first], [batch(part)])
        begun.apply(1e-2)
    begun.save_state(tmp_path)
    continued.restore_state(tmp_path)
    for name, array in weights(begun).items():
        assert weights(continued)[name].tobytes() == array.tobytes(), name
    for student, name in ((begun, first), (continued, second)):
        for part in (SEQUENCES[1:3], SEQUENCES[:3]):
            accumulate(student, taught[name], [batch(part)])
            student.apply(1e-2)
    assert_close(weights(continued), weights(begun), 1e-4)


# Mutants: what these tests are made to see


def flipped(monkeypatch):
    """A divergence in the other direction."""
    monkeypatch.setitem(divergences.PAIRS, "forward_kl", divergences.reverse_kl)


def turned(name: str):
    """One model takes the share, or the weight, that is the other's."""

    def mutant(monkeypatch):
        right = divergences.PAIRS[name]
        monkeypatch.setitem(
            divergences.PAIRS, name, lambda u, v, s, share: right(u, v, s, 1 - share)
        )

    return mutant


def taken_for(name: str, other: str):
    """One divergence for another."""
    return lambda monkeypatch: monkeypatch.setitem(
        divergences.PAIRS, name, divergences.PAIRS[other]
    )


def without_a_teacher_that_is_sure(monkeypatch):
    """Forward and reverse KL weigh the same wherever the teacher stands."""
    monkeypatch.setitem(divergences.PAIRS, "entropy_kl", divergences.mixed_kl)


def with_the_target_among_the_others(monkeypatch):
    """What decoupled distillation takes apart stays together."""
    monkeypatch.setattr(divergences, "set_at", lambda x, ids, value: None)


def with_the_sign_of_the_other(monkeypatch):
    """The difference of the logarithms, but not its size."""
    right = divergences.log_tvd
    monkeypatch.setitem(
        divergences.PAIRS, "log_tvd", lambda u, v, s, parameter: right(v, u, s, parameter)
    )


def shifted(monkeypatch):
    """Positions one token late."""
    gather = TorchModel.gather
    monkeypatch.setattr(
        TorchModel,
        "gather",
        lambda self, tokens, positions: gather(self, tokens, (positions + 1) % tokens.size),
    )


def half_scaled(monkeypatch):
    """Gradients of the head left out by a half."""
    added = torch_loss.add_product
    monkeypatch.setattr(
        torch_loss,
        "add_product",
        lambda total, left, right, first: added(total, left, 0.5 * right, first),
    )


def unscaled(monkeypatch):
    """The temperature's square in the value but not in the gradient."""
    right = dense.divergence
    monkeypatch.setattr(
        dense,
        "divergence",
        lambda u, v, spare, objective, weight, *rest: right(
            u, v, spare, objective, weight / 4, *rest
        ),
    )


@pytest.mark.parametrize(
    "mutant, objective",
    [
        (flipped, Objective()),
        (shifted, Objective()),
        (half_scaled, Objective()),
        (unscaled, Objective(temperature=2.0)),
        (taken_for("reverse_kl", "forward_kl"), Objective("reverse_kl")),
        (taken_for("tvd", "jsd"), Objective("tvd")),
        (turned("jsd"), Objective("jsd", jsd_beta=0.3)),
        (turned("skew_kl"), Objective("skew_kl")),
        (turned("skew_reverse_kl"), Objective("skew_reverse_kl")),
        (turned("mixed_kl"), Objective("mixed_kl", mixed_weight=0.3)),
        (without_a_teacher_that_is_sure, Objective("entropy_kl", entropy_half=0.5)),
        (with_the_target_among_the_others, Objective("dkd")),
        (with_the_sign_of_the_other, Objective("log_tvd")),
    ],
)
def test_a_mutant_of_the_loss_is_seen(
    backends: list[Backend], llamas: Path, monkeypatch, mutant, objective: Objective
):
    """All of these pass without the mutant: see the tests above."""
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        assert_losses_and_gradients(backends, llamas, "full", objective)


def test_a_mutant_of_a_trajectory_is_seen(backends: list[Backend], llamas: Path, monkeypatch):
    """MLX's default AdamW has no bias correction: the second step already differs."""
    made = torch_student.make_optimizer

    def later(recipe, *rest):
        optimizer = made(recipe, *rest)
        for state in optimizer.state.values():
            state["step"] += 1000
        return optimizer

    def second_loss() -> list[float]:
        settings = "full", {"learning_rate": 3e-3}, Objective(), {"fraction": 0.7}, 2
        return [trajectory(backend, llamas, *settings)[0][1]["loss"] for backend in backends]

    ours, theirs = second_loss()
    assert theirs == pytest.approx(ours, rel=1e-3)
    monkeypatch.setattr(torch_student, "make_optimizer", later)
    ours, theirs = second_loss()
    assert theirs != pytest.approx(ours, rel=1e-3)


def test_a_mutant_of_a_head_is_seen(backends: list[Backend], llamas: Path, monkeypatch):
    """Logits off by 1 %, through a teacher that MLX reads otherwise."""
    teacher = backends[1].load_teacher(llamas / "teacher", "teacher")
    head = dataclasses.replace(teacher.loss_head, finish=lambda logits: 1.01 * logits)
    teacher.loss_head = head
    student, objective = load_student(backends[1], llamas), Objective()
    expected = load_student(backends[0], llamas).score(
        batch(), teachers(backends, llamas)[0].targets(batch()), objective
    )
    with pytest.raises(AssertionError):
        assert_same_sums(student.score(batch(), teacher.targets(batch()), objective), expected)
