"""Shift, padding, order and the count of loss tokens, against plain loops over the sequences."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distill.data.batches import Steps, make_batch, share_of, validation_batches
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.errors import DataError
from mlx_distill.recipe.training_tables import BatchTable

ALL = ("prompt", "cot", "answer")
SETS = [
    ("prompt",),
    ("cot",),
    ("answer",),
    ("prompt", "cot"),
    ("cot", "answer"),
    ("prompt", "answer"),
    ALL,
]


def sequence(number, prompt, cot, answer):
    """Tokens that tell sequence and place: 1000 * number + t + 1 (never the padding's 0)."""
    total = prompt + cot + answer
    tokens = np.arange(total, dtype=np.int32) + 1000 * number + 1
    return TokenSequence(f"s{number}", tokens, prompt, prompt + cot, np.ones(total, bool))


def corpus(count, seed=0):
    random = np.random.default_rng(seed)
    return [sequence(i, *random.integers(1, 12, 3).tolist()) for i in range(count)]


# --- one batch ---


def test_a_sequences_weight_is_its_positions():
    one, other = corpus(2)
    batch = make_batch([one, replace(other, weight=0.25)], ("cot",), 8)
    first = int(one.supervised(("cot",)).sum())
    rest = int(other.supervised(("cot",)).sum())
    assert batch.weight[: first + rest].tolist() == [1.0] * first + [0.25] * rest
    assert not batch.weight[first + rest :].any()


def test_shift_by_hand():
    batch = make_batch([sequence(0, 2, 2, 1), sequence(1, 1, 3, 2)], ("cot",))
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 0], [1001, 1002, 1003, 1004, 1005, 1006]]
    assert batch.positions.tolist() == [1, 2, 6, 7, 8]  # of [B*T], each before its target
    assert batch.targets.tolist() == [3, 4, 1002, 1003, 1004]
    assert batch.segment.tolist() == [1] * 5 and batch.weight.tolist() == [1.0] * 5
    assert batch.lengths.tolist() == [5, 6] and batch.ids == ("s0", "s1")


@pytest.mark.parametrize("segments", SETS)
@pytest.mark.parametrize("multiple", [1, 7, 32])
def test_every_target_follows_its_position(segments, multiple):
    sequences = corpus(5)
    batch = make_batch(sequences, segments, multiple)
    width = batch.tokens.shape[1]
    real = batch.weight > 0
    found = []
    for position, target, kind in zip(
        batch.positions[real], batch.targets[real], batch.segment[real], strict=True
    ):
        row, place = divmod(int(position), width)
        assert place + 1 < batch.lengths[row]
        assert batch.tokens[row, place + 1] == target
        found.append((int(target), int(kind)))
    expected = [
        (int(token), int(kind))
        for sequence in sequences
        for place, (token, kind) in enumerate(
            zip(sequence.tokens, sequence.segments(), strict=True)
        )
        if place > 0 and ALL[kind] in segments
    ]
    assert found == expected


@given(multiple=st.integers(1, 40), count=st.integers(1, 6), seed=st.integers(0, 20))
def test_padding(multiple, count, seed):
    sequences = corpus(count, seed)
    batch = make_batch(sequences, ("cot",), multiple)
    longest = max(map(len, sequences))
    assert (
        batch.tokens.shape[1] % multiple == 0
        and longest <= batch.tokens.shape[1] < longest + multiple
    )
    assert len(batch.positions) == len(batch.targets) == len(batch.segment) == len(batch.weight)
    assert len(batch.positions) % multiple == 0
    for row, sequence in enumerate(sequences):
        assert batch.tokens[row, : len(sequence)].tolist() == sequence.tokens.tolist()
        assert not batch.tokens[row, len(sequence) :].any()
    padding = batch.weight == 0
    assert not batch.positions[padding].any() and not batch.targets[padding].any()
    assert (batch.positions >= 0).all() and (batch.positions < batch.tokens.size).all()


def test_tokens_without_leave_carry_no_loss():
    whole = sequence(0, 2, 6, 2)
    allowed = whole.allowed.copy()
    allowed[[3, 5]] = False
    masked = TokenSequence(whole.id, whole.tokens, whole.prompt_end, whole.cot_end, allowed)
    assert make_batch([masked], ("cot",)).targets.tolist() == [3, 5, 7, 8]


def test_dtypes():
    batch = make_batch(corpus(3), ALL, 4)
    assert [
        array.dtype
        for array in (
            batch.tokens,
            batch.positions,
            batch.targets,
            batch.segment,
            batch.weight,
            batch.lengths,
        )
    ] == [np.int32, np.int32, np.int32, np.int8, np.float32, np.int32]


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match="at least one sequence"):
        make_batch([], ALL)
    negative = TokenSequence("n", np.array([1, -2, 3], np.int32), 1, 2, np.ones(3, bool))
    with pytest.raises(ValueError, match="negative: -2"):
        make_batch([negative], ALL)


# --- steps ---


def table(micro=2, total=4, multiple=1):
    sizes = {"micro_batch_size": micro, "global_batch_size": total}
    return BatchTable(**sizes, pad_multiple=multiple, sort_window=1)


def ids_of(step):
    return [name for batch in step.batches for name in batch.ids]


@pytest.mark.parametrize(
    ("micro", "total"), [(1, 4), (2, 4), (3, 4), (4, 4), (8, 4), (2, 5), (10, 10)]
)
def test_global_batch_size_is_exact(micro, total):
    steps = Steps(corpus(10), ("cot",), table(micro, total), seed=1, epochs=3)
    for step in steps:
        assert len(ids_of(step)) == total
        assert all(len(batch.ids) <= micro for batch in step.batches)
        lengths = np.concatenate([batch.lengths for batch in step.batches])
        assert (np.diff(lengths) >= 0).all()


def long_chains(count: int) -> list[TokenSequence]:
    """As long as chains of thought are: half of them within 30 % of 600 to 1,700 tokens."""
    lengths = np.random.default_rng(4).lognormal(7.0, 0.7, count).clip(40, 4096).astype(int)
    return [
        TokenSequence(str(i), np.ones(n, np.int32), 20, n - 2, np.ones(n, bool))
        for i, n in enumerate(lengths)
    ]


def padding(steps) -> float:
    """Share of the tokens computed."""
    batches = [batch for step in steps for batch in step.batches]
    real = sum(int(batch.lengths.sum()) for batch in batches)
    return 1 - real / sum(batch.tokens.size for batch in batches)


def test_at_the_defaults_little_is_padding():
    """On the lengths of long chains, with the window that a recipe without one has."""
    steps = Steps(long_chains(640), ("cot",), BatchTable(), seed=1)
    assert padding(steps) <= 0.12


def test_a_window_of_steps_sorted_together_needs_little_padding():
    """The recipe's defaults but for the window, on the lengths of long chains: every example as
    often as before, each step as many, of short and long ones; the largest micro-batch is no larger.
    """
    sequences = long_chains(640)
    plain = Steps(sequences, ("cot",), table(4, 8, 32), seed=1)
    sorted_table = BatchTable(
        micro_batch_size=4, global_batch_size=8, pad_multiple=32, sort_window=16
    )
    window = Steps(sequences, ("cot",), sorted_table, seed=1)
    assert padding(plain) > 0.25 and padding(window) <= 0.12
    assert len(window) == len(plain) == 80
    for begin in range(0, 80, 16):  # what a window holds is what its steps held
        taken, before = (
            [ids_of(steps.step(index)) for index in range(begin, begin + 16)]
            for steps in (window, plain)
        )
        assert sorted(chain(*taken)) == sorted(chain(*before))
        assert all(len(ids) == 8 for ids in taken) and taken != before
    largest = [max(b.tokens.size for step in s for b in step.batches) for s in (plain, window)]
    assert largest[1] <= largest[0]

    def spread(steps: Steps) -> float:
        return float(np.std([sum(b.lengths.sum() for b in step.batches) for step in steps]))

    assert spread(window) < 1.1 * spread(plain)  # steps are about as long as each other as before
    again = Steps(sequences, ("cot",), sorted_table, seed=1)  # a step knows no step before it
    assert [ids_of(again.step(i)) for i in (79, 3, 40)] == [
        ids_of(window.step(i)) for i in (79, 3, 40)
    ]
    order = window.order
    assert [order.of_step(i) for i in range(80)] == order.all_steps().tolist()


@pytest.mark.parametrize(
    ("micro", "total", "window"), [(3, 8, 4), (1, 5, 3), (8, 4, 7), (4, 4, 100)]
)
def test_a_window_takes_every_example_of_an_epoch_once(micro, total, window):
    """Where a micro-batch is left over, where a step is one, and at the end of a run too."""
    asked = BatchTable(micro_batch_size=micro, global_batch_size=total, sort_window=window)
    steps = Steps(long_chains(10 * total), ("cot",), asked, seed=2)
    taken = [ids_of(step) for step in steps]
    assert all(len(ids) == total for ids in taken)
    assert sorted(chain(*taken), key=int) == [str(i) for i in range(10 * total)]


@pytest.mark.parametrize(
    ("count", "total", "epochs", "steps"), [(8, 4, 1, 2), (9, 4, 1, 3), (10, 4, 3, 8), (4, 4, 2, 2)]
)
def test_epochs_see_every_example_so_often_at_least(count, total, epochs, steps):
    sequences = corpus(count)
    run = Steps(sequences, ("cot",), table(2, total), seed=1, epochs=epochs)
    assert len(run) == steps
    stream = [name for step in run for name in ids_of_stream(run, step)]
    for epoch in range(epochs):
        part = stream[epoch * count : (epoch + 1) * count]
        assert sorted(part) == sorted(sequence.id for sequence in sequences)


def ids_of_stream(run, step):
    size = sum(len(batch.ids) for batch in step.batches)
    names = [f"s{row}" for row in run.order.rows(step.index * size, size)]
    assert sorted(names) == sorted(ids_of(step))
    return names


def test_a_step_is_a_function_of_its_number():
    sequences = corpus(30)
    first, second = (Steps(sequences, ("cot",), table(), seed=5, epochs=4) for _ in range(2))
    later = second.step(17)  # without having made the ones before
    assert ids_of(list(first)[17]) == ids_of(later)
    assert all(
        a.tokens.tolist() == b.tokens.tolist()
        for a, b in zip(first.step(17).batches, later.batches, strict=True)
    )


@pytest.mark.parametrize("window", [1, 8])
def test_the_work_of_a_step_does_not_grow_with_the_examples(window, monkeypatch):
    """An epoch is permuted once, and a window dealt once, not for each of the steps."""
    permuted = []

    class Counting(np.random.Generator):
        def permutation(self, x, axis=0):
            permuted.append(x if isinstance(x, int) else len(x))
            return super().permutation(x, axis)

    def counting(seed):
        return Counting(np.random.PCG64(np.random.SeedSequence(seed)))

    monkeypatch.setattr(np.random, "default_rng", counting)
    asked = BatchTable(micro_batch_size=2, global_batch_size=4, sort_window=window)
    for count in (64, 512):
        permuted.clear()
        steps = Steps(corpus(16) * (count // 16), ("cot",), asked, seed=1, epochs=2)
        assert len([step for step in steps]) == count // 2
        dealt = count // 2 if window > 1 else 0  # a row for each step
        assert sum(permuted) == 2 * count + dealt


def test_seed_and_epoch_change_the_order():
    sequences = corpus(40)
    one, other = (Steps(sequences, ("cot",), table(4, 40), seed=seed, epochs=2) for seed in (1, 2))
    assert one.order.rows(0, 40) != other.order.rows(0, 40)
    assert one.order.rows(0, 40) != one.order.rows(40, 40)


def test_a_step_that_there_is_not():
    run = Steps(corpus(8), ("cot",), table(), seed=1, epochs=1, steps=7)
    assert len(run) == 7 and len(list(run)) == 7
    for index in (-1, 7):
        with pytest.raises(IndexError):
            run.step(index)


@pytest.mark.parametrize("segments", SETS)
def test_loss_tokens_do_not_depend_on_micro_batching(segments):
    sequences = corpus(12)
    for micro, multiple in [(1, 1), (2, 8), (3, 32), (6, 5)]:
        for step in Steps(sequences, segments, table(micro, 6, multiple), seed=3, epochs=2):
            members = [sequences[int(name[1:])] for name in ids_of(step)]
            assert step.loss_tokens == sum(
                int(member.supervised(segments).sum()) for member in members
            )
            assert step.loss_tokens == sum(batch.weight.sum() for batch in step.batches)
            assert step.tokens == sum(map(len, members))


def test_too_few_examples_for_one_step():
    with pytest.raises(
        DataError, match=r"batch\.global_batch_size is 4, but only 3 training examples carry loss"
    ):
        Steps(corpus(3), ("cot",), table(), seed=0)


# --- validation ---


def test_validation_batches_hold_each_whole_sequence_once():
    sequences = corpus(7)
    batches = validation_batches(sequences, table(3, 3, 8))
    assert sorted(name for batch in batches for name in batch.ids) == sorted(
        s.id for s in sequences
    )
    assert (np.diff(np.concatenate([batch.lengths for batch in batches])) >= 0).all()
    assert sum(batch.weight.sum() for batch in batches) == sum(len(s) - 1 for s in sequences)
    assert {int(kind) for batch in batches for kind in batch.segment[batch.weight > 0]} == {0, 1, 2}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_ranks_share_every_micro_batch_once_and_run_equally_many(count, size):
    batches = [make_batch([sequence], ("cot",)) for sequence in corpus(count)]
    shares = [share_of(batches, rank, size) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    working = [batch for share in shares for batch in share if batch.weight.any()]
    assert sorted(id(batch) for batch in working) == sorted(map(id, batches))
    assert {batch.tokens.tobytes() for share in shares for batch in share} == {
        batch.tokens.tobytes() for batch in batches
    }


def test_a_batch_with_more_positions_than_32_bits_count_is_one_line():
    whole = sequence(0, 1, 1, 1)
    with pytest.raises(
        DataError,
        match=r"a micro-batch of 2 × 2,000,000,000 tokens .*; lower batch\.micro_batch_size",
    ):
        make_batch([whole, whole], ("cot",), 2_000_000_000)
