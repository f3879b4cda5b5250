"""What follows a cut (`truncation.ending`) and which examples are not cut (`truncation.whole_share`),
against definitions on lists of places.
"""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import recipe_of

from mlx_distill.data.batches import ALL_SEGMENTS, Steps, make_batch
from mlx_distill.data.counts import count_tokens, token_runs
from mlx_distill.data.examples import make_example
from mlx_distill.data.prepare import cut_sequence, learnable
from mlx_distill.data.sequences import Segment, TokenSequence, render
from mlx_distill.data.truncate import stays_whole, truncate
from mlx_distill.errors import DataError
from mlx_distill.recipe.recipe import Recipe, with_values
from mlx_distill.recipe.tables import TruncationTable
from mlx_distill.recipe.training_tables import BatchTable

CUTS = [
    {"keep": keep, "span": span, "context": context, "fraction": fraction, "max_tokens": most}
    for keep, span, context, fraction, most in itertools.product(
        ("prefix", "suffix", "middle", "cot"),
        ("sequence", "cot"),
        ("drop", "keep"),
        (0.1, 0.5, 0.9, 1.0),
        (0, 5),
    )
    if keep != "cot" or fraction == 1
]
SEGMENT_SETS = [
    names for count in (1, 2, 3) for names in itertools.combinations(ALL_SEGMENTS, count)
]


def places(prompt=4, cot=10, answer=3, tag=2, name="x"):
    """Tokens that are their own places; the last `tag` of the chain of thought are `</think>`."""
    total = prompt + cot + answer
    ends = prompt, prompt + cot
    allowed = np.ones(total, bool)
    return TokenSequence(
        name, np.arange(total, dtype=np.int32), *ends, allowed, closing=ends[1] - tag
    )


def with_ending(whole: TokenSequence, cut: TokenSequence) -> list[int]:
    """By hand: the places that a cut leaves, and all later ones from `</think>` on."""
    kept = cut.tokens.tolist()
    if kept[-1] < whole.prompt_end:
        return kept
    return kept + [place for place in range(whole.closing, len(whole)) if place > kept[-1]]


@given(
    prompt=st.integers(0, 12),
    cot=st.integers(3, 30),
    answer=st.integers(1, 9),
    tag=st.integers(1, 3),
    cut=st.sampled_from(CUTS),
    segments=st.sampled_from(SEGMENT_SETS),
)
def test_the_ending_follows_every_cut_and_is_learned(prompt, cot, answer, tag, cut, segments):
    whole = places(prompt, cot, answer, tag)
    plain = truncate(whole, TruncationTable(**cut))
    ended = truncate(whole, TruncationTable(**cut, ending="answer"))
    expected = with_ending(whole, plain)
    assert ended.tokens.tolist() == expected
    added = expected[len(plain) :]
    assert ended.ending == len(added)
    assert ended.prompt_end == sum(place < whole.prompt_end for place in expected)
    assert ended.cot_end == sum(place < whole.cot_end for place in expected)
    learned = [*plain.tokens[plain.supervised(segments)], *(p for p in added if p != expected[0])]
    assert ended.tokens[ended.supervised(segments)].tolist() == learned
    if not added:  # not one array differs
        assert dataclasses.replace(ended, tokens=0, allowed=0) == dataclasses.replace(
            plain, tokens=0, allowed=0
        )
    if ended.closing >= 0:
        assert ended.tokens[ended.closing] == whole.closing
    else:
        assert whole.closing not in expected


def test_a_text_that_never_closes_its_thinking_has_no_ending():
    unfinished = dataclasses.replace(places(answer=1), closing=-1)
    cut = truncate(unfinished, TruncationTable(fraction=0.5, ending="answer"))
    assert cut.ending == 0 and len(cut) == 7


QWEN3 = (  # 2+3? in twelve tokens; <think>\n Two and three .\n </think> \n\n 5 <|im_end|>
    [151644, 872, 198, 17, 10, 18, 30, 151645, 198, 151644, 77091, 198],
    [151667, 198, 11613, 323, 2326, 624, 151668, 271],
    [20, 151645],
)


@pytest.mark.network
@pytest.mark.parametrize(
    ("cut", "kept", "ending"),
    [
        ({"fraction": 0.65}, slice(0, 2), slice(6, 8)),
        ({"span": "cot", "fraction": 0.5}, slice(0, 4), slice(6, 8)),
        ({"span": "cot", "fraction": 0.9}, slice(0, 7), slice(7, 8)),
        ({"keep": "cot"}, slice(0, 8), slice(8, 8)),
        ({"keep": "suffix", "span": "cot", "fraction": 0.5}, slice(4, 8), slice(8, 8)),
        ({"keep": "middle", "span": "cot", "fraction": 0.5}, slice(2, 6), slice(6, 8)),
    ],
)
def test_exact_ids_with_qwen3(qwen3_tokenizer, cut, kept, ending):
    prompt, cot, answer = QWEN3
    whole = render(make_example("2+3?", "Two and three.", "5"), qwen3_tokenizer)
    assert whole.tokens.tolist() == prompt + cot + answer and whole.closing == 18
    ended = truncate(whole, TruncationTable(**cut, ending="answer"))
    assert ended.tokens.tolist() == prompt + cot[kept] + cot[ending] + answer
    after_the_window = cut.get("keep") == "suffix"  # it reaches the end by itself
    assert ended.ending == (0 if after_the_window else len(cot[ending]) + 2)
    assert ended.segments().tolist() == [0] * 12 + [1] * len(cot[kept] + cot[ending]) + [2] * 2


@pytest.mark.network
def test_a_tag_of_several_tokens_is_whole_after_every_cut(smollm2_tokenizer):
    whole = render(make_example("2+3?", "Two and three.", "5"), smollm2_tokenizer)
    tag = whole.tokens[whole.closing :].tolist()
    assert smollm2_tokenizer.decode(tag) == "</think>\n\n5<|im_end|>"
    assert tag[:3] == [9617, 17400, 46] and tag[-1] == 2  # </ think > … <|im_end|>
    cots = whole.cot_end - whole.prompt_end
    for stop in range(whole.prompt_end + 1, len(whole) + 1):
        share = min(1.0, (stop - whole.prompt_end + 0.5) / cots)
        table = TruncationTable(span="cot", fraction=share, ending="answer")
        ended = truncate(whole, table)
        kept = min(stop, whole.closing)
        assert ended.tokens.tolist() == whole.tokens[:kept].tolist() + tag


def test_a_token_over_the_line_break_before_the_tag_belongs_to_the_ending(bytes_tokenizer):
    tokenizer = bytes_tokenizer("qwen2_5", think_tokens=False, merges=(("Ċ", "<"),))
    whole = render(make_example("2+3?", "Two and three.", "5"), tokenizer)
    assert tokenizer.decode(whole.tokens[whole.closing]) == "\n<"
    ended = truncate(whole, TruncationTable(span="cot", fraction=0.3, ending="answer"))
    kept = len(ended) - ended.ending
    assert tokenizer.decode(ended.tokens[kept:]) == "\n</think>\n\n5<|im_end|>"


# which examples stay whole


def test_the_share_that_stays_whole_is_a_function_of_seed_and_id():
    names = [places(name=f"{i:016x}") for i in range(4000)]
    found = {
        share: {one.id for one in names if stays_whole(one, share, 7)} for share in (0.1, 0.25, 1)
    }
    assert found[0.1] < found[0.25] < found[1] == {one.id for one in names}
    for share in (0.1, 0.25):  # four standard deviations of a share of 4,000
        assert abs(len(found[share]) / 4000 - share) < 4 * np.sqrt(share * (1 - share) / 4000)
    assert {one.id for one in names[::-2] if stays_whole(one, 0.25, 7)} <= found[0.25]
    assert found[0.25] != {one.id for one in names if stays_whole(one, 0.25, 8)}
    assert not any(stays_whole(one, 0.0, 7) for one in names)


def recipe(**truncation) -> Recipe:
    return recipe_of(truncation={"fraction": 0.5} | truncation)


def test_an_example_that_stays_whole_is_neither_cut_nor_capped():
    asked = recipe(max_tokens=5, whole_share=0.3, ending="answer")
    for name in map(str, range(50)):
        whole, table = places(name=name), asked.truncation
        cut = cut_sequence(whole, asked)
        expected = whole if stays_whole(whole, 0.3, 42) else truncate(whole, table)
        assert cut.tokens.tolist() == expected.tokens.tolist() and cut.ending == expected.ending


def test_a_share_of_tokens_leaves_the_ending_alone():
    asked = recipe(token_share=0.25, ending="answer", span="cot")
    whole = places(cot=20, answer=3)
    cut = cut_sequence(whole, asked)
    learned = cut.tokens[cut.supervised(("cot",))].tolist()
    assert learned[-5:] == [22, 23, 24, 25, 26]  # </think> and the answer
    assert len(learned) == round(0.25 * 10) + 5
    assert all(4 <= place < 14 for place in learned[:-5])
    without = cut_sequence(whole, with_values(asked, truncation={"ending": "none"}))
    assert learned[:-5] == without.tokens[without.supervised(("cot",))].tolist()


def test_digests_of_recipes_without_either_are_what_they_were():
    assert recipe().digest() == recipe(whole_share=0.0, ending="none").digest()
    assert len({recipe().digest(), recipe(whole_share=0.1).digest()}) == 2
    assert len({recipe().digest(), recipe(ending="answer").digest()}) == 2


# batches


def test_the_positions_of_endings_stand_last_in_a_batch():
    table = TruncationTable(span="cot", fraction=0.5, ending="answer")
    sequences = [truncate(places(cot=n, name=str(n)), table) for n in (6, 20, 11)]
    sequences.append(places(name="whole"))
    batch = make_batch(sequences, ("cot",), 8, endings=True)
    width = batch.tokens.shape[1]
    taught, alone = [], []
    for row, one in enumerate(sequences):
        for place in np.flatnonzero(one.supervised(("cot",))):
            side = alone if place >= len(one) - one.ending else taught
            side.append((row * width + place - 1, one.tokens[place], one.segments()[place]))
    assert batch.taught == len(taught) and len(alone) == 3 * 5
    count = len(taught) + len(alone)
    found = zip(batch.positions, batch.targets, batch.segment, strict=True)
    assert list(found)[:count] == taught + alone
    assert batch.weight.tolist() == [1] * count + [0] * (len(batch.weight) - count)
    assert batch.endings.tolist() == [5, 5, 5, 0]


def test_a_run_has_batches_of_one_kind():
    sequences = [places(name=str(n)) for n in range(8)]
    table = BatchTable(micro_batch_size=2, global_batch_size=4)
    assert all(b.endings is None for s in Steps(sequences, ("cot",), table, 0) for b in s.batches)
    sequences[3] = truncate(places(name="3"), TruncationTable(fraction=0.6, ending="answer"))
    steps = list(Steps(sequences, ("cot",), table, 0))
    endings = [batch.endings for step in steps for batch in step.batches]
    assert all(one is not None for one in endings) and sum(one.sum() for one in endings) == 5
    whole = [b for s in steps for b in s.batches if not b.endings.any()]
    assert whole and all(b.taught == len(b.weight) for b in whole)


def test_a_text_that_weighs_nothing_moves_no_boundary():
    table = TruncationTable(span="cot", fraction=0.5, ending="answer")
    sequences = [truncate(places(cot=n, name=str(n)), table) for n in (6, 20, 11)]
    light = [dataclasses.replace(sequences[0], weight=0.0), *sequences[1:]]
    batch, plain = (make_batch(rows, ("cot",), 8, endings=True) for rows in (light, sequences))
    assert batch.taught == plain.taught and batch.positions.tolist() == plain.positions.tolist()
    assert (batch.weight == 0).sum() > (plain.weight == 0).sum()


# what people are shown


def test_runs_and_counts_tell_the_ending():
    asked, whole = recipe(span="cot", ending="answer"), places()
    runs = list(token_runs(whole, asked))
    assert [(run.segment, run.kept, run.ending, len(run.tokens)) for run in runs] == [
        (Segment.PROMPT, True, False, 4),
        (Segment.COT, True, False, 5),
        (Segment.COT, False, False, 3),
        (Segment.COT, True, True, 2),
        (Segment.ANSWER, True, True, 3),
    ]
    assert [bool(run.learned.all()) for run in runs] == [False, True, False, True, True]
    counts = count_tokens([cut_sequence(whole, asked)], ("cot",))
    assert counts.ending == 5 and counts.supervised.tolist() == [0, 7, 3]


def test_an_example_whose_prompt_outlasts_the_cut_gets_no_ending():
    from mlx_distill.data.prepare import PROMPT_OUTLASTS, Chosen

    long, short = places(prompt=40, name="long"), places(name="short")
    pairs = tuple((make_example(one.id, "c", "a"), one) for one in (long, short))
    chosen = Chosen(pairs, pairs[:1], {}, {}, "")
    found = learnable(chosen, recipe(ending="answer"))
    assert [one.id for one in found.train] == ["short"]
    assert found.skipped == {PROMPT_OUTLASTS: 1}


def test_held_out_texts_without_a_token_of_what_is_learned_are_refused():
    """As where a model did not finish the only one; the loss of no tokens was said to be nan."""
    from mlx_distill.data.prepare import Chosen

    whole, thought = places(name="whole"), places(name="thought")
    end = thought.cot_end
    thought = dataclasses.replace(
        thought, tokens=thought.tokens[:end], allowed=thought.allowed[:end]
    )
    pairs = [(make_example(one.id, "c", "a"), one) for one in (whole, thought)]
    asked = recipe_of(objective={"segments": ["answer"]})
    learnable(Chosen((pairs[0],), tuple(pairs), {}, {}, ""), asked)
    with pytest.raises(DataError, match="none of 1 held-out texts has a token of answer, by which"):
        learnable(Chosen((pairs[0],), (pairs[1],), {}, {}, ""), asked)
