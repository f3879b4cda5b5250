"""What `show` prints, and `prepare`, the function that it shares with training."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from test_examples import INSTRUCTION

from mlx_distill.data.counts import count_tokens, token_runs
from mlx_distill.data.prepare import prepare
from mlx_distill.data.sequences import Segment
from mlx_distill.errors import DataError
from mlx_distill.recipe.load import load_recipe
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.recipe.tables import DataTable, StudentTable, TeacherTable, TruncationTable
from mlx_distill.runs.provenance import data_account
from mlx_distill.terminal.show import show

OR_SPAN = ', or set truncation.span = "cot", which keeps prompts whole'
ROWS = [
    {"prompt": f"{i}+1?", "cot": f"One more than {i}.\nSo {i + 1}.", "answer": str(i + 1)}
    for i in range(20)
]


@pytest.fixture
def recipe(tmp_path, bytes_tokenizer):
    """Twenty rows and a student that is a tokenizer and nothing else."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    student = tmp_path / "student"
    bytes_tokenizer("qwen2_5").save_pretrained(student)
    (student / "config.json").write_text('{"model_type": "llama"}')
    data = DataTable(source=str(tmp_path / "rows.jsonl"), validation_examples=4)
    return Recipe(
        teacher=TeacherTable(model="some/teacher"),
        student=StudentTable(model=str(student)),
        data=data,
        truncation=TruncationTable(span="cot", fraction=0.5),
    )


def changed(recipe, **tables):
    """The recipe with fields of its tables replaced: `changed(recipe, data={...})`."""
    return recipe.model_copy(
        update={
            name: getattr(recipe, name).model_copy(update=fields) for name, fields in tables.items()
        }
    )


def printed(recipe, colour=False, example=1):
    file = io.StringIO()
    show(
        recipe,
        Console(
            file=file,
            width=120,
            force_terminal=colour,
            color_system="truecolor" if colour else None,
        ),
        example,
    )
    return file.getvalue()


# --- prepare ---


def test_prepare_accounts_for_every_row(recipe, bytes_tokenizer):
    prepared = prepare(recipe, bytes_tokenizer("qwen2_5"))
    assert (len(prepared.train), len(prepared.train_whole), len(prepared.validation)) == (16, 16, 4)
    assert prepared.skipped == {}
    assert set(prepared.examples) == {s.id for s in prepared.train + prepared.validation}
    for cut, whole in zip(prepared.train, prepared.train_whole, strict=True):
        assert cut.id == whole.id and cut.tokens.tolist() == whole.tokens[: len(cut)].tolist()
        assert cut.cot_end - cut.prompt_end == (whole.cot_end - whole.prompt_end) // 2


def test_rows_are_the_same_at_every_fraction(recipe, bytes_tokenizer):
    found = [
        prepare(changed(recipe, truncation={"fraction": f}), bytes_tokenizer("qwen2_5"))
        for f in (0.25, 0.5, 1.0)
    ]
    assert len({tuple(s.id for s in prepared.train) for prepared in found}) == 1
    assert len({tuple(tuple(s.tokens) for s in prepared.validation) for prepared in found}) == 1


def test_examples_without_a_supervised_token_are_dropped_and_counted(recipe, bytes_tokenizer):
    """62 tokens hold a prompt of one digit and one token more, or a prompt of two digits and
    nothing else.
    """
    cut = changed(recipe, truncation={"span": "sequence", "fraction": 1.0, "max_tokens": 62})
    prepared = prepare(cut, bytes_tokenizer("qwen2_5"))
    dropped = {s.id for s in prepared.train_whole} - {s.id for s in prepared.train}
    assert dropped == {
        s.id for s in prepared.train_whole if len(prepared.examples[s.id].prompt) == len("10+1?")
    }
    assert (
        prepared.skipped == {"its prompt alone outlasts the cut": len(dropped)}
        and len(dropped) == 7
    )
    assert all(s.supervised(("cot",)).sum() == 1 for s in prepared.train)


def test_nothing_supervised_is_an_error(recipe, bytes_tokenizer):
    with pytest.raises(
        DataError, match="none of 16 training examples has a token of answer left after the cut"
    ):
        prepare(changed(recipe, objective={"segments": ("answer",)}), bytes_tokenizer("qwen2_5"))


@pytest.mark.parametrize(
    ("truncation", "segments", "cause", "advice"),
    [
        ({"max_tokens": 20}, ("cot",), "16 × its prompt alone outlasts the cut", f"raise truncation.max_tokens{OR_SPAN}"),
        ({"fraction": 0.1}, ("cot",), "16 × its prompt alone outlasts the cut", f"raise truncation.fraction{OR_SPAN}"),
        ({"token_share": 0.001}, ("cot",), "16 × its share of tokens rounds to none", "raise truncation.token_share"),
        ({"keep": "cot"}, ("answer",), "16 × no supervised token left after the cut",
         'choose another truncation.keep than "cot", or supervise other segments'),
    ],
)  # fmt: skip
def test_the_remedy_is_that_of_the_cause(
    truncation, segments, cause, advice, recipe, bytes_tokenizer
):
    cut = recipe.model_copy(update={"truncation": TruncationTable(**truncation)})
    with pytest.raises(DataError) as error:
        prepare(changed(cut, objective={"segments": segments}), bytes_tokenizer("qwen2_5"))
    assert str(error.value).endswith(f"left after the cut ({cause}); {advice}")


def test_too_few_examples_name_what_kept_them_out(recipe, bytes_tokenizer):
    with pytest.raises(
        DataError, match=r"20 × longer than data.longest_tokens = 20; raise data.longest_tokens$"
    ):
        prepare(changed(recipe, data={"longest_tokens": 20}), bytes_tokenizer("qwen2_5"))


def test_what_rows_carry_besides_is_shown(recipe, tmp_path):
    rows = [row | {"source": "x", "\x1b[31mid": number} for number, row in enumerate(ROWS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = printed(recipe)
    assert (
        "not used: column source in 20 rows\n" in page
        and "not used: column \\x1b[31mid in 20 rows\n" in page
    )


def test_the_day_is_shown(recipe, bytes_tokenizer):
    bytes_tokenizer("clock").save_pretrained(recipe.student.model)
    page = printed(changed(recipe, data={"date": "2026-01-02"}))
    assert "prompts say the date 2026-01-02" in page and "Today Date: 02 Jan 2026" in page


def test_long_and_unrenderable_rows_are_counted(recipe, tmp_path, bytes_tokenizer):
    rows = [
        *ROWS,
        {"prompt": "q", "cot": "x" * 500, "answer": "1"},
        {"prompt": "q", "cot": "a</think>", "answer": "1"},
        {"prompt": "q", "cot": "", "answer": "1"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepared = prepare(changed(recipe, data={"longest_tokens": 400}), bytes_tokenizer("qwen2_5"))
    assert prepared.skipped == {
        "longer than data.longest_tokens = 400": 1,
        "literal </think> in its reasoning": 1,
        "no reasoning": 1,
    }
    assert len(prepared.train) + len(prepared.validation) == 20


def test_endings_and_whole_examples_are_shown_and_counted(recipe, bytes_tokenizer):
    asked = changed(recipe, truncation={"ending": "answer", "whole_share": 0.25})
    prepared = prepare(asked, bytes_tokenizer("qwen2_5"))
    whole = [len(a) == len(b) for a, b in zip(prepared.train, prepared.train_whole, strict=True)]
    ended = [one for one in prepared.train if one.ending]
    assert 0 < sum(whole) < 16 and len(ended) == 16 - sum(whole)
    page = printed(asked, example=whole.index(False) + 1)
    assert f"{sum(whole)} of 16 examples stay whole" in page
    assert f"{len(ended)} of 16 examples end in </think> and the answer after the cut" in page
    assert f"{sum(one.ending for one in ended)} tokens, learned from the text alone" in page
    assert re.search("answer · [23] tokens · after the cut, learned from the text alone", page)
    assert "then </think> and the answer, 25% of examples whole" in page
    assert "CUT" not in printed(asked, example=whole.index(True) + 1)
    account = data_account(prepared, asked)
    assert (account.whole, account.ended) == (sum(whole), len(ended))
    assert account.ending_tokens == sum(one.ending for one in ended)


def test_a_random_share_is_drawn_from_the_seed_of_the_run(recipe, bytes_tokenizer):
    def allowed(seed):
        shared = changed(recipe, truncation={"token_share": 0.5}, run={"seed": seed})
        return {s.id: s.allowed.tolist() for s in prepare(shared, bytes_tokenizer("qwen2_5")).train}

    one, other = allowed(1), allowed(2)
    assert one == allowed(1)
    assert all(one[name] != other[name] for name in one.keys() & other.keys())


def test_counts(recipe, bytes_tokenizer):
    prepared = prepare(recipe, bytes_tokenizer("qwen2_5"))
    counts = count_tokens(prepared.train, ("cot", "answer"))
    assert counts.examples == 16
    assert counts.tokens.sum() == sum(map(len, prepared.train))
    assert (
        counts.tokens[Segment.COT]
        == counts.supervised[Segment.COT]
        == sum(s.cot_end - s.prompt_end for s in prepared.train)
    )
    assert counts.supervised[Segment.PROMPT] == 0


# --- runs of tokens ---


@pytest.mark.parametrize(
    "truncation",
    [
        {},
        {"keep": "suffix", "fraction": 0.3},
        {"keep": "middle", "span": "cot", "fraction": 0.4},
        {"keep": "middle", "fraction": 0.4, "context": "keep"},
        {"token_share": 0.3},
        {"keep": "cot"},
    ],
)
def test_runs_tile_the_sequence_and_agree_with_training(truncation, recipe, bytes_tokenizer):
    recipe = recipe.model_copy(update={"truncation": TruncationTable(**truncation)})
    prepared = prepare(recipe, bytes_tokenizer("qwen2_5"))
    for cut, whole in zip(prepared.train, prepared.train_whole, strict=True):
        runs = list(token_runs(whole, recipe))
        assert np.concatenate([run.tokens for run in runs]).tolist() == whole.tokens.tolist()
        assert (
            np.concatenate([run.tokens for run in runs if run.kept]).tolist() == cut.tokens.tolist()
        )
        learned = np.concatenate([run.tokens[run.learned] for run in runs])
        assert learned.tolist() == cut.tokens[cut.supervised(("cot",))].tolist()
        assert not any(run.learned.any() for run in runs if not run.kept)


# --- the page ---


def test_what_was_held_out_is_said_with_the_field_that_sets_it(recipe):
    sets_it = "(data.validation_examples sets how many)"
    assert sets_it not in printed(recipe)
    assert f"validation: 2 whole examples, 95 tokens each on average {sets_it}" in printed(
        changed(recipe, data={"validation_examples": 0})
    )


def test_page_without_colour(recipe):
    page = printed(recipe)
    assert "\x1b" not in page
    for line in (
        "example 1 of 16",
        "▌prompt · 62 tokens · kept, not learned",
        "▌cot · 15 tokens · kept, learned",
        "▌cot · 15 tokens · CUT",
        "▌answer · 3 tokens · CUT",
        "learns cot, keeps prefix 0.5 of the cot",
        "validation: 4 whole examples",
        "not used: none",
    ):
        assert line in page
    assert (
        "│ cot *    │   463 │ 28.9 │   231 │ 14.4 │   49.9 │     231 │ 14.4 │      49.9 │" in page
    )


def test_page_in_colour(recipe):
    page = printed(recipe, colour=True)
    assert "\x1b[1;4;33m" in page  # learned reasoning: bold, underlined, yellow
    assert "\x1b[2;9m" in page  # the cut: dim, struck
    assert "⟦" not in page


def test_learned_tokens_among_others_are_marked_without_colour(recipe):
    page = printed(changed(recipe, truncation={"token_share": 0.4}))
    assert "tokens · kept, 6 learned" in page and page.count("⟦") > 1


def test_reasons_and_dropped_examples_are_shown(recipe):
    cut = changed(recipe, truncation={"span": "sequence", "fraction": 1.0, "max_tokens": 62})
    pages = [printed(cut, example=number) for number in range(1, 17)]
    assert all("not used: 7 × its prompt alone outlasts the cut" in page for page in pages)
    assert sum("it is not trained on" in page for page in pages) == 7


@pytest.mark.network
def test_the_mac_recipe_shows_on_local_rows(tmp_path, qwen3_tokenizer):
    """Its rows come from a file and its tokenizer from a folder without weights; all else is as
    written.
    """
    begin, middle, end = (
        "<|begin_of_thought|>",
        "<|end_of_thought|>\n\n<|begin_of_solution|>",
        "<|end_of_solution|>",
    )
    rows = [
        {
            "system": INSTRUCTION,
            "conversations": [
                {"from": "user", "value": f"What is {i}+1?"},
                {
                    "from": "assistant",
                    "value": f"{begin}\n\n{'Let me see. ' * 30}\n\n{middle}\n\n\\boxed{{{i + 1}}}\n\n{end}",
                },
            ],
        }
        for i in range(120)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    qwen3_tokenizer.save_pretrained(tmp_path / "student")
    (tmp_path / "student" / "config.json").write_text('{"model_type": "qwen3"}')
    path = Path(__file__).parents[2] / "recipes" / "qwen3-8b-to-0.6b-cot50.toml"
    settings = (
        f"student.model={tmp_path / 'student'}",
        f"data.source={tmp_path / 'rows.jsonl'}",
        "data.train_examples=20",
    )
    page = printed(load_recipe(path, settings))
    example, _, counted = page.partition("not used:")
    assert "begin_of" not in example and "Your role as" not in example
    assert counted.startswith(" system text that asks for <|begin_of_thought|> in 120 turns")
    assert (
        "example 1 of 20" in page
        and "<|im_start|>user\nWhat is " in page
        and "validation: 100 whole" in page
    )
    assert (
        "▌cot · 57 tokens · kept, learned\n<think>\nLet me see." in page
    )  # 16 of the prompt + 57 = int(147 / 2)
    assert "▌cot · 67 tokens · CUT" in page and "▌answer · 7 tokens · CUT" in page


@pytest.mark.parametrize("number", [0, 17, -1])
def test_no_such_example(number, recipe):
    with pytest.raises(DataError, match=f"no training example {number}; there are 1 to 16"):
        printed(recipe, example=number)
