"""Windows by hand, and what holds for every segment set under every truncation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distill.data.sequences import TokenSequence
from mlx_distill.data.truncate import WINDOWS, thin, truncate
from mlx_distill.recipe.tables import TruncationTable


def sequence(prompt=4, cot=10, answer=2, name="x"):
    """Tokens that are their own places: 0 … T-1."""
    total = prompt + cot + answer
    return TokenSequence(
        name, np.arange(total, dtype=np.int32), prompt, prompt + cot, np.ones(total, bool)
    )


def kept(cut):
    return cut.tokens.tolist(), cut.prompt_end, cut.cot_end


def span(*ranges):
    return [place for start, stop in ranges for place in range(start, stop)]


# prompt 0-3, cot 4-13, answer 14-15
@pytest.mark.parametrize(
    ("settings", "tokens", "prompt_end", "cot_end"),
    [
        ({"keep": "prefix"}, span((0, 16)), 4, 14),
        ({"keep": "prefix", "fraction": 0.5}, span((0, 8)), 4, 8),
        ({"keep": "prefix", "fraction": 0.99}, span((0, 15)), 4, 14),
        ({"keep": "prefix", "fraction": 0.2}, span((0, 3)), 3, 3),
        ({"keep": "prefix", "fraction": 0.001}, span((0, 1)), 1, 1),
        ({"keep": "prefix", "fraction": 0.5, "max_tokens": 6}, span((0, 6)), 4, 6),
        ({"keep": "prefix", "fraction": 0.5, "max_tokens": 9}, span((0, 8)), 4, 8),
        ({"keep": "suffix", "fraction": 0.5}, span((8, 16)), 0, 6),
        ({"keep": "suffix", "fraction": 0.1}, span((15, 16)), 0, 0),
        ({"keep": "middle", "fraction": 0.5}, span((4, 12)), 0, 8),
        ({"keep": "middle", "fraction": 0.45}, span((4, 11)), 0, 7),
        ({"keep": "middle"}, span((0, 16)), 4, 14),
        ({"keep": "cot"}, span((0, 14)), 4, 14),
        ({"keep": "cot", "max_tokens": 5}, span((0, 5)), 4, 5),
        ({"keep": "prefix", "span": "cot"}, span((0, 16)), 4, 14),
        ({"keep": "prefix", "span": "cot", "fraction": 0.5}, span((0, 9)), 4, 9),
        ({"keep": "prefix", "span": "cot", "max_tokens": 3}, span((0, 7)), 4, 7),
        ({"keep": "prefix", "span": "cot", "max_tokens": 10}, span((0, 16)), 4, 14),
        ({"keep": "suffix", "span": "cot", "fraction": 0.5}, span((0, 4), (9, 16)), 4, 9),
        ({"keep": "middle", "span": "cot", "fraction": 0.5}, span((0, 4), (6, 11)), 4, 9),
        ({"keep": "cot", "span": "cot"}, span((0, 14)), 4, 14),
    ],
)
def test_window(settings, tokens, prompt_end, cot_end):
    cut = truncate(sequence(), TruncationTable(**settings))
    assert kept(cut) == (tokens, prompt_end, cot_end)
    assert cut.allowed.all()


@pytest.mark.parametrize(
    ("settings", "tokens", "allowed"),
    [
        ({"keep": "suffix", "fraction": 0.5}, span((0, 16)), span((8, 16))),
        ({"keep": "middle", "fraction": 0.5}, span((0, 12)), span((4, 12))),
        ({"keep": "prefix", "fraction": 0.5}, span((0, 8)), span((0, 8))),
        ({"keep": "suffix", "span": "cot", "fraction": 0.5}, span((0, 16)), span((0, 4), (9, 16))),
        ({"keep": "middle", "span": "cot", "fraction": 0.5}, span((0, 11)), span((0, 4), (6, 11))),
    ],
)
def test_kept_context_is_read_and_carries_no_loss(settings, tokens, allowed):
    cut = truncate(sequence(), TruncationTable(context="keep", **settings))
    assert cut.tokens.tolist() == tokens
    assert cut.tokens[cut.allowed].tolist() == allowed


@given(length=st.integers(1, 5000), fraction=st.floats(0.001, 1))
def test_lead_span_proportion_is_the_papers(length, fraction):
    whole = sequence(0, length, 0)
    assert len(truncate(whole, TruncationTable(fraction=fraction))) == max(
        1, int(fraction * length)
    )


# --- any segments × any truncation ---

SEGMENTS = st.lists(
    st.sampled_from(["prompt", "cot", "answer"]), min_size=1, max_size=3, unique=True
).map(tuple)
TABLES = st.builds(
    TruncationTable,
    keep=st.sampled_from([keep for keep in WINDOWS if keep != "cot"]),
    span=st.sampled_from(["sequence", "cot"]),
    fraction=st.floats(0.01, 1),
    max_tokens=st.integers(0, 40),
    context=st.sampled_from(["drop", "keep"]),
) | st.builds(
    TruncationTable,
    keep=st.just("cot"),
    span=st.sampled_from(["sequence", "cot"]),
    max_tokens=st.integers(0, 40),
    context=st.sampled_from(["drop", "keep"]),
)
WHOLE = st.builds(sequence, st.integers(0, 12), st.integers(1, 25), st.integers(0, 8))


@given(whole=WHOLE, table=TABLES, segments=SEGMENTS)
def test_invariants(whole, table, segments):
    cut = truncate(whole, table)
    places = cut.tokens
    assert len(cut) >= 1 or (whole.prompt_end == 0 and table.span == "cot")
    assert (np.diff(places) > 0).all()  # order is kept, nothing twice
    assert 0 <= cut.prompt_end <= cut.cot_end <= len(cut) == len(cut.allowed)
    assert (
        cut.segments().tolist() == whole.segments()[places].tolist()
    )  # every token stays in its segment
    learned = cut.supervised(segments)
    assert not learned[:1].any()
    assert set(places[learned]) <= set(places[cut.allowed])
    assert set(places[learned]) <= set(
        np.flatnonzero(
            np.isin(
                whole.segments(), [{"prompt": 0, "cot": 1, "answer": 2}[name] for name in segments]
            )
        )
    )
    if table.span == "cot":
        assert places[: whole.prompt_end].tolist() == list(range(whole.prompt_end))


@given(whole=WHOLE, table=TABLES, segments=SEGMENTS)
def test_keeping_the_context_learns_the_same_tokens_as_dropping_it(whole, table, segments):
    """All but the first of the window, which has a predecessor only where the context is kept."""
    dropped = truncate(whole, table.model_copy(update={"context": "drop"}))
    read = truncate(whole, table.model_copy(update={"context": "keep"}))
    without_context = set(dropped.tokens[dropped.supervised(segments)])
    with_context = set(read.tokens[read.supervised(segments)])
    assert without_context <= with_context
    assert with_context - without_context <= {dropped.tokens[0]}
    assert read.tokens.tolist() == list(
        range(len(read))
    )  # nothing is missing before the end of the window
    assert read.tokens[-1] == dropped.tokens[-1]


@given(whole=WHOLE, table=TABLES)
def test_cutting_a_cut_by_nothing_changes_nothing(whole, table):
    cut = truncate(whole, table)
    again = truncate(cut, TruncationTable())
    assert kept(again) == kept(cut) and again.allowed.tolist() == cut.allowed.tolist()


# --- a random share ---


@given(
    whole=WHOLE, table=TABLES, segments=SEGMENTS, share=st.floats(0.01, 1), seed=st.integers(0, 3)
)
def test_share_is_exact(whole, table, segments, share, seed):
    cut = truncate(whole, table)
    thinned = thin(cut, share, segments, seed)
    before, after = cut.supervised(segments), thinned.supervised(segments)
    assert after.sum() == round(share * before.sum())
    assert not (after & ~before).any()
    assert thinned.tokens.tolist() == cut.tokens.tolist()
    assert not (thinned.allowed & ~before).any() or share == 1


def test_share_depends_on_seed_and_id_alone():
    whole, segments = sequence(2, 100, 2), ("cot",)
    first = thin(whole, 0.3, segments, 1).allowed
    assert first.tolist() == thin(whole, 0.3, segments, 1).allowed.tolist()
    assert first.tolist() != thin(whole, 0.3, segments, 2).allowed.tolist()
    assert first.tolist() != thin(sequence(2, 100, 2, name="y"), 0.3, segments, 1).allowed.tolist()


def test_share_is_spread_evenly():
    counts = sum(
        thin(sequence(1, 20, 0, name=str(i)), 0.5, ("cot",), 0).allowed.astype(int)
        for i in range(400)
    )
    assert (
        counts[0] == 0 and (counts[1:] > 140).all() and (counts[1:] < 260).all()
    )  # 200 ± 6 standard deviations
