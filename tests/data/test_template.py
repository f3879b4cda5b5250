"""What is known of a chat template before rows are rendered: its day, its switch, its name, what it
alters.
"""

import datetime
from collections import Counter

import pytest

from mlx_distill.data import day as days
from mlx_distill.data.day import choose_day
from mlx_distill.data.examples import Skip, make_example
from mlx_distill.data.sequences import generation_prompt, render, stop_ids
from mlx_distill.data.template import prompt_text, reads_clock, refuse_unusable
from mlx_distill.errors import DataError, ModelError
from mlx_distill.recipe.tables import DataTable

QUESTION = (("user", "q"),)
THINKS = "{{ messages[-1].content }}<|im_start|>{% if SWITCH %}<think>{% else %}</think>{% endif %}"


# --- the day ---


def test_a_clock_is_stopped_at_a_day(bytes_tokenizer):
    tokenizer = bytes_tokenizer("clock")
    assert reads_clock(tokenizer) and not reads_clock(bytes_tokenizer("tools"))
    assert prompt_text(QUESTION, tokenizer, day="2024-02-29").startswith(
        "<|im_start|>system\nToday Date: 29 Feb 2024<"
    )
    ids = generation_prompt((("user", "q"),), tokenizer, day="2024-02-29").tokens
    assert (
        render(make_example("q", "c", "a"), tokenizer, "2024-02-29").tokens[: len(ids)].tolist()
        == ids
    )


def test_without_a_day_it_is_transformers_own_clock(bytes_tokenizer):
    tokenizer = bytes_tokenizer("clock")
    before = datetime.date.today()
    found = prompt_text(QUESTION, tokenizer)
    assert found in {
        prompt_text(QUESTION, tokenizer, day=str(day)) for day in (before, datetime.date.today())
    }
    assert found == tokenizer.apply_chat_template(
        [{"role": "user", "content": "q"}], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    "format_", ["%Y-%m-%d", "%A, %-d %B %y", "%d%%", "%%Y %H:%M", "%e.%m.", "%j %b %a"]
)
def test_every_format_is_what_strftime_says(format_, bytes_tokenizer):
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = (
        "\n{{ strftime_now(" + repr(format_) + ") }}{{ messages[-1].content }}"
    )
    assert (
        prompt_text(QUESTION, tokenizer, day="2026-03-07")
        == f"\n{datetime.datetime(2026, 3, 7).strftime(format_)}q"
    )


def test_which_day_is_chosen(bytes_tokenizer, monkeypatch):
    monkeypatch.setattr(days, "today", lambda: "2026-01-03")
    clock, data = bytes_tokenizer("clock"), DataTable()
    assert choose_day(data, clock) == "2026-01-03"
    assert choose_day(data, clock, ["", "2026-01-02", "2026-01-01"]) == "2026-01-02"
    assert choose_day(DataTable(date="2025-12-31"), clock, ["2026-01-02"]) == "2025-12-31"
    assert choose_day(data, bytes_tokenizer("tools"), ["2026-01-02"]) == ""
    with pytest.raises(
        DataError, match=r"\[data\] date is 2025-12-31, but the chat template of .* reads no clock"
    ):
        choose_day(DataTable(date="2025-12-31"), bytes_tokenizer("tools"))


# --- thinking ---


@pytest.mark.parametrize("switch", ["enable_thinking", "thinking"])
def test_thinking_is_switched_on(switch, bytes_tokenizer):
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = THINKS.replace("SWITCH", switch)
    assert prompt_text(QUESTION, tokenizer) == "q<|im_start|><think>"


@pytest.mark.parametrize(
    ("template", "advice"),
    [
        (
            THINKS.replace("SWITCH", "reasoning_mode"),
            "it switches on reasoning_mode: let its default",
        ),
        (
            "{{ messages[-1].content }}<think>\n\n</think>\n\n",
            "it has no switch: use the chat_template.jinja of the reasoning",
        ),
    ],
)
def test_a_prompt_that_closes_thinking_is_refused(template, advice, bytes_tokenizer):
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = template
    for ask in (refuse_unusable, lambda tokenizer: render(make_example("q", "c", "a"), tokenizer)):
        with pytest.raises(
            ModelError, match=f"ends each prompt in </think>, so no reasoning can follow; {advice}"
        ) as error:
            ask(tokenizer)
        assert "\n" not in str(error.value)


def test_a_row_that_switches_thinking_off_is_skipped(bytes_tokenizer):
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = THINKS.replace(
        "SWITCH", "not messages[0].content.endswith('/no_think')"
    )
    with pytest.raises(Skip, match="its prompt closes thinking before the reasoning"):
        render(make_example("q /no_think", "c", "a"), tokenizer)


# --- named templates ---


def test_named_templates_need_a_default(bytes_tokenizer):
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = {"tool_use": "x", "rag": "y"}
    for ask in (refuse_unusable, stop_ids):
        with pytest.raises(
            ModelError,
            match="its chat templates are called tool_use, rag and none is the default; keep",
        ):
            ask(tokenizer)


def test_a_template_for_tools_is_used_where_there_are_some(bytes_tokenizer):
    tokenizer = bytes_tokenizer("tools")
    tokenizer.chat_template = {
        "default": "{{ messages[-1].content }}<|im_end|>",
        "tool_use": tokenizer.chat_template,
    }
    tools = '[{"function": {"name": "look", "description": "d", "parameters": {"properties": {}}}}]'
    assert prompt_text(QUESTION, tokenizer) == "q<|im_end|>"
    assert prompt_text(QUESTION, tokenizer, tools).startswith("<|im_start|>tools\n")


# --- what is dropped or altered ---


def test_text_that_a_template_cuts_out_of_a_turn_skips_the_row(bytes_tokenizer):
    tokenizer = bytes_tokenizer("deepseek_r1_distill")
    history = (("user", "q"), ("assistant", "b</think>c"))
    with pytest.raises(Skip, match="the chat template alters its assistant turn"):
        prompt_text((*history, *QUESTION), tokenizer)
    assert "\n c\n<" in prompt_text((("user", "q"), ("assistant", "\n c\n"), *QUESTION), tokenizer)


def test_keys_that_a_template_does_not_read_are_counted(bytes_tokenizer):
    result = ("tool", "r", '{"name": "look", "tool_call_id": "1"}')
    unused = Counter()
    prompt_text((*QUESTION, result), bytes_tokenizer("tools"), unused=unused)
    assert unused == {"key name": 1, "key tool_call_id": 1}


def test_a_shape_is_rendered_once(bytes_tokenizer, monkeypatch):
    tokenizer, rendered = bytes_tokenizer("tools"), []
    apply = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer,
        "apply_chat_template",
        lambda *args, **more: rendered.append(1) or apply(*args, **more),
    )
    for count in range(5):
        prompt_text((("system", f"s{count}"), *QUESTION), tokenizer)
    asked = len(rendered)
    prompt_text((("system", "another"), *QUESTION), tokenizer)
    assert len(rendered) == asked + 1
