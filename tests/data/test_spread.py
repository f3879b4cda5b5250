"""Cuts at a fraction of each example's own (`truncation.spread`), against their definition."""

import numpy as np
import pytest
from tiny import recipe_of

from mlx_distill.data.prepare import cut_sequence
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.data.truncate import stays_whole
from mlx_distill.recipe.recipe import Recipe, with_values

LONG = 10_000


def recipe(**truncation) -> Recipe:
    return recipe_of(truncation={"fraction": 0.5, "spread": 0.6} | truncation)


def long_text(name: str) -> TokenSequence:
    return TokenSequence(name, np.arange(LONG, dtype=np.int32), 10, LONG - 10, np.ones(LONG, bool))


def kept(recipe: Recipe, names: range) -> np.ndarray:
    """Share of each text that its cut leaves."""
    return np.array([len(cut_sequence(long_text(str(name)), recipe)) for name in names]) / LONG


def test_fractions_are_spread_evenly_around_the_recipes():
    shares = kept(recipe(), range(2000))
    assert 0.2 <= shares.min() < 0.21 and 0.79 < shares.max() <= 0.8
    counts = np.histogram(shares, bins=6, range=(0.2, 0.8))[0]
    assert np.abs(counts - 2000 / 6).max() < 4 * np.sqrt(2000 * 5 / 36)


def test_a_draw_is_a_function_of_the_seed_and_the_example():
    one = kept(recipe(), range(20))
    assert np.array_equal(kept(recipe(), range(20)), one)
    assert np.array_equal(kept(recipe(), range(10, 20)), one[10:])
    other = kept(with_values(recipe(), run={"seed": 7}), range(20))
    assert (other != one).all()


def test_the_draw_is_apart_from_which_examples_stay_whole():
    """As many long cuts among those that a larger share leaves whole as among all."""
    names = range(2000)
    whole = np.array([stays_whole(long_text(str(name)), 0.5, 42) for name in names])
    long = kept(recipe(), names) > 0.5
    assert abs(long[whole].mean() - long[~whole].mean()) < 4 * np.sqrt(0.25 / 500)
    assert (kept(recipe(whole_share=0.5), names)[whole] == 1).all()


def test_a_share_of_the_chain_of_thought_is_spread_too():
    cut = [cut_sequence(long_text(str(name)), recipe(span="cot")) for name in range(50)]
    shares = [(one.cot_end - 10) / (LONG - 20) for one in cut]
    assert 0.2 <= min(shares) < 0.3 and 0.7 < max(shares) <= 0.8


def test_a_spread_beyond_the_whole_is_refused():
    with pytest.raises(ValueError, match=r"spread = 0\.6 draw fractions up to 1\.28"):
        recipe(fraction=0.8)
    recipe(fraction=0.5, spread=1.0)


def test_digests_of_recipes_without_are_what_they_were():
    assert recipe(spread=0.0).digest() == recipe_of(truncation={"fraction": 0.5}).digest()
    assert recipe().digest() != recipe(spread=0.0).digest()
