"""Which tokens carry loss: how many of each sequence, which ones, and what they weigh, in whatever
batch a sequence stands.
"""

from dataclasses import replace

import numpy as np
import pytest

from mlx_distill.data.batches import Batch, Steps, make_batch
from mlx_distill.data.narrowing import narrowed
from mlx_distill.data.selection import chosen_count, place_weights, select_known
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.recipe.training_tables import BatchTable, SelectionTable

ALL = ("prompt", "cot", "answer")


def corpus(count: int = 8, ending: int = 0) -> list[TokenSequence]:
    random = np.random.default_rng(0)
    made = []
    for index, length in enumerate(random.integers(9, 20, count)):
        tokens = random.integers(1, 90, length).astype(np.int32)
        made.append(
            TokenSequence(
                f"e{index}", tokens, 3, length - 2, np.ones(length, bool), -1, ending * (index % 2)
            )
        )
    return made


def learned(batch: Batch) -> dict[str, list[tuple[int, float]]]:
    """Example → (place of a token that carries loss, its weight), in order."""
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in batch.ids}
    live = np.flatnonzero(batch.weight)
    for position, weight in zip(batch.positions[live], batch.weight[live], strict=True):
        row, place = divmod(int(position), batch.tokens.shape[1])
        found[batch.ids[row]].append((place + 1, float(weight)))
    return found


def scores_of(batch: Batch) -> np.ndarray:
    """A score that is a token's own, whatever it is batched with; many are equal."""
    return (batch.targets[: batch.taught] % 7).astype(np.float32)


@pytest.mark.parametrize(
    "share, supervised, count",
    [(0.1, 30, 3), (0.1, 31, 4), (0.7, 10, 7), (1e-6, 5, 1), (0.5, 0, 0)],
)
def test_the_count_is_rounded_up_but_not_by_rounding(share: float, supervised: int, count: int):
    """0.1 × 30 and 0.7 × 10 are a little more than a whole number in float64."""
    assert chosen_count(share, supervised) == count


@pytest.mark.parametrize("kind", ["flat", "rising", "falling"])
def test_weights_by_place_have_mean_one_in_a_row(kind: str):
    rows = np.repeat([0, 1, 4], [1, 5, 8])
    weights = place_weights(kind, rows)
    for row in (0, 1, 4):
        of_row = weights[rows == row]
        assert of_row.mean() == pytest.approx(1, rel=1e-6) and (of_row > 0).all()
        steps = np.diff(of_row)
        assert {
            "flat": (steps == 0).all(),
            "rising": (steps > 0).all(),
            "falling": (steps < 0).all(),
        }[kind]
    assert place_weights("rising", rows)[1:6] == pytest.approx(np.arange(1, 6) / 3)


@pytest.mark.parametrize("by", ["random", "position"])
@pytest.mark.parametrize("ending", [0, 2])
def test_a_known_rule_leaves_a_share_of_each_sequence(by: str, ending: int):
    table = SelectionTable(share=0.3, by=by, position_weight="rising")
    for sequence in corpus(ending=ending):
        left = select_known(sequence, ("cot",), table, 5, 0)
        before, after = (np.flatnonzero(one.supervised(("cot",))) for one in (sequence, left))
        among = before[before < len(sequence) - sequence.ending]
        chosen = after[after < len(sequence) - sequence.ending]
        assert len(chosen) == np.ceil(0.3 * len(among)) and set(after) <= set(before)
        assert len(after) - len(chosen) == sequence.ending
        if by == "position":
            assert (chosen == among[-len(chosen) :]).all()
            falling = table.model_copy(update={"position_weight": "falling"})
            first = select_known(sequence, ("cot",), falling, 5, 0).supervised(("cot",))
            assert (np.flatnonzero(first)[: len(chosen)] == among[: len(chosen)]).all()


def test_a_random_choice_is_made_again_each_epoch_or_once():
    sequences, batch = corpus(), BatchTable(micro_batch_size=3, global_batch_size=4, sort_window=1)

    def epochs(redraw: str, seed: int = 1) -> list[dict]:
        table = SelectionTable(share=0.4, redraw=redraw)
        steps = Steps(sequences, ALL, batch, seed, epochs=3, selection=table)
        found: list[dict] = [{}, {}, {}]
        for index, step in enumerate(steps):
            for part in step.batches:
                found[index // 2] |= learned(part)
        return found

    first, second, third = epochs("epoch")
    assert first != second != third != first
    assert {name: len(places) for name, places in first.items()} == {
        name: len(places) for name, places in second.items()
    }
    assert epochs("epoch") == [first, second, third] != epochs("epoch", seed=2)
    once = epochs("once")
    assert once[0] == once[1] == once[2] == first


@pytest.mark.parametrize("by", ["random", "position", "divergence"])
@pytest.mark.parametrize("position_weight", ["flat", "rising"])
@pytest.mark.parametrize("ending", [0, 2])
def test_the_divisor_is_known_and_the_choice_is_the_same_in_any_batch(
    by: str, position_weight: str, ending: int
):
    """The mutant that ranks a batch instead of its rows failed here."""
    sequences = [
        replace(one, weight=0.25 * (1 + i % 3)) for i, one in enumerate(corpus(ending=ending))
    ]
    weights = {one.id: one.weight for one in sequences}
    if by == "position" and position_weight == "flat":
        position_weight = "falling"
    table = SelectionTable(share=0.3, by=by, position_weight=position_weight)
    found = []
    for micro in (1, 3, 8):
        batch = BatchTable(micro_batch_size=micro, global_batch_size=8, pad_multiple=4)
        step = Steps(sequences, ("cot",), batch, 3, selection=table).step(0)
        total: dict = {}
        for part in step.batches:
            if by == "divergence":
                part, places = narrowed(part, scores_of(part), table, 4)
                assert len(places) == part.taught and len(part.positions) % 4 == 0
            total |= learned(part)
        found.append(total)
        carried = [weight for places in total.values() for _, weight in places]
        assert sum(carried) == pytest.approx(step.loss_tokens, rel=1e-6)
        assert len(carried) == step.positions
    assert found[0] == found[1] == found[2]
    for one in sequences:
        window = len(one) - one.ending
        supervised = np.flatnonzero(one.supervised(("cot",)))
        among = supervised[supervised < window]
        count = int(np.ceil(0.3 * len(among)))
        chosen = [place for place, _ in found[0][one.id] if place < window]
        if by == "divergence":
            best = sorted(among, key=lambda place: (-(one.tokens[place] % 7), place))[:count]
            assert chosen == sorted(best)
        of_chosen = [weight for place, weight in found[0][one.id] if place < window]
        assert np.mean(of_chosen) == pytest.approx(weights[one.id], rel=1e-6)


def test_a_batch_without_weight_stays_one_without_positions():
    """As `share_of` gives a rank where others have one more."""
    batch = make_batch(corpus(2), ALL, 4)
    nothing = replace(batch, weight=np.zeros_like(batch.weight))
    left, places = narrowed(nothing, scores_of(nothing), SelectionTable(share=0.5), 4)
    assert not left.weight.any() and len(left.positions) == left.taught == len(places) == 4


@pytest.mark.parametrize("window", [1, 3])
def test_each_epoch_draws_every_example_once_in_any_window(window: int):
    order = BatchTable(micro_batch_size=2, global_batch_size=5, sort_window=window)
    steps = Steps(corpus(8), ALL, order, 3, epochs=5)
    seen = [
        pair
        for index in range(len(steps))
        for pair in zip(steps.order.of_step(index), steps.order.epochs_of_step(index), strict=True)
    ]
    assert sorted(seen) == [(row, epoch) for row in range(8) for epoch in range(5)]
