"""Rows as people have them: each file of fixtures/rows, what is skipped, what is counted, and what
a template drops.
"""

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_examples import INSTRUCTION, read, write

from mlx_distill.data.columns import OPTIONAL
from mlx_distill.data.examples import Skip
from mlx_distill.data.formats import MARKER_NAME
from mlx_distill.data.messages import KEYS
from mlx_distill.data.reading import read_examples
from mlx_distill.data.sequences import render
from mlx_distill.errors import DataError
from mlx_distill.recipe.tables import DataTable

ROWS = Path(__file__).parents[1] / "fixtures" / "rows"
USER, REPLY = (
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "<think>c</think>a"},
)
CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "look", "arguments": '{"city": "Rome"}'},
}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "rain"}
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "d", "parameters": {"properties": {"city": {}}}},
}


def read_file(name, format_):
    skipped, unused = Counter(), Counter()
    found = list(
        read_examples(DataTable(source=str(ROWS / name), format=format_), 0, skipped, unused)
    )
    return found, skipped, unused


@pytest.fixture
def reading(tmp_path):
    """One row → its example or the reason why there is none, and what was not used."""

    def reading(row, format_="messages", **settings):
        skipped, unused = Counter(), Counter()
        data = DataTable(source=write(tmp_path, [row]), format=format_, **settings)
        try:
            (example,) = read_examples(data, 0, skipped, unused)
        except DataError:
            ((example, _),) = skipped.items()
        return example, dict(unused)

    return reading


# --- the files, on a template that has a place for everything ---

QUESTION = "<|im_start|>user\nCount to 0.<|im_end|>\n<|im_start|>assistant\n"
LEARNED = "<think>\nI count to 0\n</think>\n\nIt is 0.<|im_end|>"
LEARNED_LONG = LEARNED.replace("to 0", "up to 0 one by one.")
WEATHER = "<|im_start|>assistant\n[get_weather {}]<|im_end|>\n"
PROMPTS = {
    ("alpaca.jsonl", "alpaca"): QUESTION.replace("to 0.", "to the number.\n0") + LEARNED,
    ("caps.jsonl", "messages"): QUESTION + LEARNED,
    (
        "developer.jsonl",
        "messages",
    ): "<|im_start|>system\nALWAYSPIRATE: answer like a pirate.<|im_end|>\n"
    + QUESTION
    + LEARNED_LONG,
    (
        "multiturn_think.jsonl",
        "messages",
    ): "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    + QUESTION
    + LEARNED,
    (
        "observation.jsonl",
        "messages",
    ): "<|im_start|>user\nweather?<|im_end|>\n<|im_start|>assistant\n[get_weather {}]"
    "<|im_end|>\n<|im_start|>tool\nOBSERVED: rain<|im_end|>\n<|im_start|>assistant\nIt "
    "rains.<|im_end|>\n" + QUESTION + LEARNED_LONG,
    ("parts_thinking.jsonl", "messages"): QUESTION + LEARNED,
    ("reasoning_field.jsonl", "messages"): QUESTION + LEARNED,
    (
        "sharegpt_system.jsonl",
        "conversations",
    ): "<|im_start|>system\nKEEPME: you are a pirate.<|im_end|>\n" + QUESTION + LEARNED,
    ("system_column.jsonl", "conversations"): "<|im_start|>system\nKEEPME pirate<|im_end|>\n"
    + QUESTION
    + LEARNED,
    ("tag_channel.jsonl", "messages"): QUESTION + LEARNED,
    ("tag_reasoning.jsonl", "messages"): QUESTION + LEARNED,
    (
        "toolhist.jsonl",
        "messages",
    ): '<|im_start|>tools\n[{"type": "function", "function": {"name": "get_weather", '
    '"description": "weather of a city", "parameters": {"type": "object", "properties": {"city": '
    '{"type": "string"}}}}}]'
    "<|im_end|>\n<|im_start|>user\nweather in Rome?<|im_end|>\n"
    '<|im_start|>assistant\n[get_weather {"city": '
    '"Rome"}]<|im_end|>\n<|im_start|>tool\nrain<|im_end|>\n'
    "<|im_start|>assistant\nIt rains.<|im_end|>\n"
    + QUESTION
    + LEARNED.replace("to 0\n", "up to 0.\n"),
}


@pytest.mark.parametrize(("name", "format_"), PROMPTS)
def test_each_file_is_rendered_whole(name, format_, bytes_tokenizer):
    (first, _), skipped, unused = read_file(name, format_)
    tokenizer = bytes_tokenizer("tools")
    sequence = render(first, tokenizer, unused=unused)
    assert tokenizer.decode(sequence.tokens) == PROMPTS[name, format_]
    assert not skipped
    also = {
        "multiturn_think.jsonl": {"reasoning of earlier turns": 2},
        "toolhist.jsonl": {"key tool_call_id": 1},
    }
    assert dict(unused) == also.get(name, {})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("toolcall_last.jsonl", "2 × its answer is a tool call; conversations must end"),
        ("weight0.jsonl", r"2 × its answer is not to be learned \(weight = 0\); set that key to 1"),
    ],
)
def test_files_without_an_answer_to_learn(name, reason):
    with pytest.raises(DataError, match=reason):
        read_file(name, "messages")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("observation.jsonl", "the chat template drops its tool calls"),
        ("toolhist.jsonl", "the chat template drops its tool calls"),
    ],
)
def test_turns_that_a_template_drops_skip_the_row(name, reason, bytes_tokenizer):
    """The mutant that renders without asking `_lost` writes "weather?" and "It rains." with nothing
    between them.
    """
    for example in read_file(name, "messages")[0]:
        with pytest.raises(Skip, match=reason):
            render(example, bytes_tokenizer("no_tools"))


@pytest.mark.network
def test_qwen3_renders_tools_as_its_template_says(qwen3_tokenizer):
    """Compared with the template's own rendering of the row as it stands in the file."""
    row = json.loads((ROWS / "toolhist.jsonl").read_text().splitlines()[0])
    (first, _), _, _ = read_file("toolhist.jsonl", "messages")
    sequence = render(first, qwen3_tokenizer)
    turns = row["messages"][:-1]
    turns[1]["content"] = ""  # which the template wants to be text
    turns[1]["tool_calls"][0]["function"]["arguments"] = {"city": "Rome"}
    prompt = qwen3_tokenizer.apply_chat_template(
        turns, tools=row["tools"], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert sequence.tokens[: sequence.prompt_end].tolist() == prompt
    assert qwen3_tokenizer.decode(prompt).count("<tool_response>") == 1


@pytest.mark.network
@pytest.mark.parametrize(("name", "format_"), PROMPTS)
def test_each_file_on_real_tokenizers(name, format_, qwen3_tokenizer, smollm2_tokenizer):
    (first, _), _, _ = read_file(name, format_)
    marks = {
        "developer.jsonl": "ALWAYSPIRATE",
        "sharegpt_system.jsonl": "KEEPME",
        "system_column.jsonl": "KEEPME pirate",
    }
    marks |= {"observation.jsonl": "OBSERVED: rain", "toolhist.jsonl": "<tool_response>\nrain\n"}
    text = qwen3_tokenizer.decode(render(first, qwen3_tokenizer).tokens)
    assert marks.get(name, "Count to") in text and "first secret" not in text
    assert text.endswith("</think>\n\nIt is 0.<|im_end|>")
    if name == "toolhist.jsonl":
        with pytest.raises(Skip, match="the chat template drops its "):
            render(first, smollm2_tokenizer)


# --- an answer after a tool's result ---


def test_an_answer_after_tools_is_learned_with_all_that_led_to_it(reading, bytes_tokenizer):
    calling = {"role": "assistant", "reasoning": "I look.", "content": "", "tool_calls": [CALL]}
    row = {"tools": [TOOL], "messages": [USER, calling, RESULT, {**REPLY, "reasoning": None}]}
    example, unused = reading(row)
    assert (example.prompt, example.history) == ("q", ())
    tokenizer = bytes_tokenizer("tools")
    text = tokenizer.decode(render(example, tokenizer).tokens)
    assert text.startswith("<|im_start|>tools\n") and text.endswith(
        "<|im_start|>user\nq<|im_end|>\n"
        '<|im_start|>assistant\n(I look.)[look {"city": "Rome"}]<|im_end|>\n'
        "<|im_start|>tool\nrain<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nc\n</think>\n\na<|im_end|>"
    )
    assert unused == {}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"messages": [USER, {"role": "critic", "content": "no"}, USER, REPLY]}, "critic turn"),
        (
            {
                "messages": [
                    USER,
                    {**REPLY, "content": "a"},
                    {"role": "system", "content": "s"},
                    USER,
                    REPLY,
                ]
            },
            "system turn",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, RESULT, REPLY]},
            "tool calls",
        ),
        ({"messages": [USER, {"role": "tool", "content": "r"}, REPLY]}, "tool turn"),
    ],
)
def test_what_a_template_drops_is_named(changes, reason, reading, bytes_tokenizer):
    example, _ = reading({"messages": [USER, REPLY]} | changes)
    with pytest.raises(Skip, match=f"^the chat template drops its {reason}$"):
        render(example, bytes_tokenizer("no_tools"))


def test_arguments_are_given_in_the_form_that_a_template_writes_as_json(reading, bytes_tokenizer):
    call = {"function": {"name": "look", "arguments": {"city": "Rome"}}}
    example, _ = reading(
        {"messages": [USER, {"role": "assistant", "tool_calls": [call]}, RESULT, REPLY]}
    )
    tokenizer = bytes_tokenizer("tools")
    as_object = tokenizer.decode(render(example, tokenizer).tokens)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "(call.function.arguments | tojson)", "call.function.arguments"
    )
    assert tokenizer.decode(render(example, tokenizer).tokens) == as_object


# --- roles, keys and parts ---


@pytest.mark.parametrize("role", ["gpt", "GPT", "Assistant", "model", "bot", "chatgpt"])
def test_names_of_the_assistant(role, reading):
    assert reading({"conversations": [{"from": "Human", "value": "q"}, {"from": role, "value": REPLY["content"]}]},
                   "conversations")[0].answer == "a"  # fmt: skip


@pytest.mark.parametrize("role", ["observation", "function", "tool", "ipython", "Tool_Response"])
def test_names_of_a_result(role, reading):
    row = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"city": "Rome"}}'},
        {"from": role, "value": "rain"},
        {"from": "gpt", "value": REPLY["content"]},
    ]
    example, unused = reading({"conversations": row}, "conversations")
    (call, result) = example.after
    assert json.loads(call[2])["tool_calls"][0]["function"] == {
        "name": "look",
        "arguments": {"city": "Rome"},
    }
    assert result == ("tool", "rain") and unused == {}


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        ({"tool_calls": [CALL], "content": None}, "its answer is a tool call"),
        ({"function_call": {"name": "look", "arguments": "{}"}}, "its answer is a tool call"),
        ({"content": '<think>c</think>\n<tool_call>\n{"name": "look"}\n</tool_call>'}, "its answer is a tool call"),
        ({"content": [{"type": "tool_use", "id": "1", "name": "look", "input": {}}]}, "its answer is a tool call"),
        (
            {"content": "<|channel|>analysis<|message|>c<|end|><|start|>assistant<|channel|>commentary to=functions.look "
             "<|constrain|>json<|message|>{}<|call|>"},
            "its answer is a tool call",
        ),
        ({"weight": 0}, "its answer is not to be learned (weight = 0)"),
        ({"weight": 0.0}, "its answer is not to be learned (weight = 0)"),
        ({"weight": "0"}, "its answer is not to be learned (weight = 0)"),
        ({"train": False}, "its answer is not to be learned (train = false)"),
        ({"loss": False}, "its answer is not to be learned (loss = false)"),
        ({"content": None, "refusal": "I cannot."}, "its answer is a refusal"),
        ({"content": None, "audio": {"id": "x"}}, "content that is not text"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "content that is not "
                                                                          "text"),
        ({"content": "<reasoning>never closed"}, "reasoning never closed"),
        ({"content": "<|channel|>analysis<|message|>only this"}, "reasoning never closed"),
        ({"content": "a \ud83d", "reasoning": "c"}, "half of a character (a lone surrogate) in its "
                                                    "text"),
    ],
)  # fmt: skip
def test_answers_that_are_not_learned(last, reason, reading):
    assert reading({"messages": [USER, REPLY | last]})[0] == reason


@pytest.mark.parametrize(
    "last",
    [
        {"reasoning": "c", "content": "a"},
        {"thinking": "c", "content": "a"},
        {"reasoning_content": "c", "reasoning": "c", "content": "<think>c</think>a"},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "c"}]},
                {"type": "text", "text": "a"},
            ]
        },
        {"content": [{"type": "reasoning", "text": "c"}, {"type": "output_text", "text": "a"}]},
        {
            "content": [
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "c"}]},
                "a",
            ]
        },
        {"content": "<thinking>c</thinking>a"},
        {"content": "<thought>\nc</thought>\na"},
        {"content": "<reasoning>c</reasoning>\n<answer>\na\n</answer>"},
        {"content": "[THINK]c[/THINK]a"},
        {"content": "<|START_THINKING|>c<|END_THINKING|><|START_RESPONSE|>a<|END_RESPONSE|>"},
        {
            "content": "<|start|>assistant<|channel|>analysis<|message|>c<|end|><|start|>assistant<|channel|>final<|message|>a<|return|>"
        },
        {"content": "analysisc assistantfinala"},
    ],
)
def test_marks_of_reasoning(last, reading):
    example, unused = reading({"messages": [USER, {"role": "assistant"} | last]})
    assert (example.cot, example.answer, unused) == ("c", "a", {})


def test_channels_as_messages_of_their_own(reading):
    said = [("analysis", "c"), ("analysis", "d"), ("final", "a")]
    row = [
        USER,
        *({"role": "assistant", "channel": channel, "content": text} for channel, text in said),
    ]
    example, unused = reading({"messages": row})
    assert (example.cot, example.answer, example.history, unused) == ("c\n\nd", "a", (), {})


def test_anthropic_calls_and_results(reading):
    used = {"type": "tool_use", "id": "1", "name": "look", "input": {"city": "Rome"}}
    result = {
        "type": "tool_result",
        "tool_use_id": "1",
        "content": [{"type": "text", "text": "rain"}],
    }
    row = [
        USER,
        {"role": "assistant", "content": [used]},
        {"role": "user", "content": [result]},
        REPLY,
    ]
    example, unused = reading({"messages": row})
    assert json.loads(example.after[0][2])["tool_calls"][0]["function"]["arguments"] == {
        "city": "Rome"
    }
    assert example.after[1] == ("tool", "rain", '{"tool_call_id": "1"}') and unused == {}


def test_a_commentary_that_the_user_sees_is_part_of_the_answer(reading):
    text = "<|channel|>analysis<|message|>c<|end|><|start|>assistant<|channel|>commentary<|message|>b<|end|>"
    text += "<|start|>assistant<|channel|>final<|message|>a"
    example, _ = reading({"messages": [USER, {"role": "assistant", "content": text}]})
    assert (example.cot, example.answer) == ("c", "b\n\na")


def test_keys_and_turns_that_nothing_reads_are_counted(reading):
    row = {"messages": [
        {**USER, "name": "Ann", "mood": "glad"}, {**REPLY, "weight": 0.5, "audio": {"id": None}, "logprobs": [1]}, USER, RESULT,
    ], "score": 0, "empty": "", "nothing": None, "hollow": [{}, {"x": None}]}  # fmt: skip
    assert reading(row)[1] == {
        "key name": 1, "key mood": 1, "key weight": 1, "key logprobs": 1, "column score": 1,
        "user turn after the last answer": 1, "tool turn after the last answer": 1,
    }  # fmt: skip


def test_a_column_under_another_columns_usual_name_is_counted(reading):
    row = {"q": "asked", "prompt": "not this", "response": REPLY["content"]}
    example, unused = reading(row, "response", prompt_column="q")
    assert (example.prompt, unused) == ("asked", {"column prompt": 1})


@pytest.mark.parametrize("format_", OPTIONAL)
def test_a_system_column_stands_first_or_is_counted(format_, reading):
    usual = {
        "columns": {"prompt": "q", "cot": "c", "answer": "a"}, "response": {"prompt": "q", "response": REPLY["content"]},
        "alpaca": {"instruction": "q", "output": REPLY["content"]}, "messages": {"messages": [USER, REPLY]},
        "conversations": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": REPLY["content"]}]},
        "gsm8k": {"question": "q", "answer": "c #### a"}, "prompts": {"prompt": "q"},
    }[format_]  # fmt: skip
    example, unused = reading(usual | {"system": "S"}, format_)
    kept = ((("system", "S"),), {}) if format_ != "gsm8k" else ((), {"column system": 1})
    assert (example.history, unused) == kept


def test_a_system_text_that_stands_twice_is_one(reading):
    row = {"system": "S", "messages": [{"role": "developer", "content": "S "}, USER, REPLY]}
    assert reading(row)[0].history == (("system", "S"),)


@pytest.mark.parametrize("text", [INSTRUCTION, INSTRUCTION.replace(". ", ".\n\n")])
def test_only_the_instruction_itself_is_dropped(text, reading):
    def row(system):
        return {"system": system, "messages": [USER, REPLY]}

    example, unused = reading(row(text))
    assert (example.history, unused) == ((), {MARKER_NAME: 1})
    example, unused = reading(row(f"{text}\nKEEPME"))
    assert (example.history, unused) == ((("system", f"{text}\nKEEPME"),), {})


def test_prompts_are_asked_and_may_know_their_answer(reading):
    row = {"prompt": " q ", "answer": 5, "note": "n"}
    example, unused = reading(row, "prompts")
    assert (example.prompt, example.cot, example.answer) == (" q ", "", "5")
    assert not example.solved and unused == {"column note": 1}
    asked = {"prompt": [{"role": "system", "content": "S"}, USER], "gold": "6", "answer": "7"}
    example, unused = reading(asked, "prompts", answer_column="gold")
    assert (example.history, example.answer) == ((("system", "S"),), "6")
    assert unused == {"column answer": 1}
    assert reading({"prompt": "q"}, "prompts")[0].answer == ""


def test_alpaca_with_history(reading):
    row = {"instruction": "i", "input": "x", "output": REPLY["content"], "history": [["a?", "b"]]}
    example, _ = reading(row, "alpaca")
    assert (example.history, example.prompt) == ((("user", "a?"), ("assistant", "b")), "i\nx")


def test_rows_of_another_format_are_told_theirs(tmp_path):
    for format_ in ("columns", "response", "messages"):
        with pytest.raises(
            DataError,
            match=r'found instruction, input, output; these are the columns of format "alpaca"',
        ):
            read(tmp_path, [{"instruction": "i", "input": "x", "output": "o"}], format=format_)


def test_an_unused_column_is_named_where_nothing_is_usable(tmp_path):
    with pytest.raises(DataError, match=r"1 × no reasoning; .*; not used: column input in 1 row$"):
        read(tmp_path, [{"prompt": "i", "input": "x", "response": "o"}], format="response")


# --- every unused thing of any row is counted ---

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.just(float("nan"))
    | st.sampled_from(["", " ", "x", "[]"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
    ),
    max_leaves=4,
)
names = st.sampled_from(["source", "id", "Tools", "x\x1b[31m", "role2", "système"])


def says(value):
    """Another definition of content: whether a leaf of the value is neither null nor NaN nor blank."""
    leaves = [value]
    while any(isinstance(leaf, list | dict) for leaf in leaves):
        leaves = [inner for leaf in leaves for inner in _inside(leaf)]
    return any(leaf is not None and leaf == leaf and str(leaf).strip() for leaf in leaves)


def _inside(leaf):
    return leaf.values() if isinstance(leaf, dict) else leaf if isinstance(leaf, list) else [leaf]


@given(
    st.dictionaries(names, values),
    st.lists(st.dictionaries(names, values), min_size=2, max_size=2),
    st.booleans(),
)
def test_whatever_has_content_and_is_not_read_is_counted(tmp_path_factory, columns, keys, broken):
    last = REPLY | ({"content": "no reasoning"} if broken else {})
    row = {**columns, "messages": [{**keys[0], **USER}, {**keys[1], **last}]}
    folder = tmp_path_factory.mktemp("row")
    unused = Counter()
    try:
        list(
            read_examples(DataTable(source=write(folder, [row]), format="messages"), unused=unused)
        )
    except DataError:
        assert broken
    expected = Counter(f"column {name}" for name, value in columns.items() if says(value))
    expected += Counter(
        f"key {name}" for found in keys for name, value in found.items() if says(value)
    )
    assert (
        Counter({name.replace("\\x1b", "\x1b"): count for name, count in unused.items()})
        == expected
    )
    assert all(name.isprintable() for name in unused)


ODD = [
    None,
    True,
    0,
    3.5,
    "",
    "x",
    "[]",
    "{}",
    [],
    [None],
    ["a"],
    {},
    {"type": "text"},
    {"function": None},
    "\ud83d",
    "\x1b[31m",
]


def test_a_damaged_row_is_an_example_or_a_line(tmp_path, bytes_tokenizer):
    """Values of the fixtures' rows replaced, deleted or added at random: nothing but `DataError`
    and `Skip` comes of it.
    """
    random, tokenizer = Random(9), bytes_tokenizer("tools")
    rows = [json.loads(path.read_text().splitlines()[0]) for path in sorted(ROWS.glob("*.jsonl"))]
    outcomes = Counter()
    for _ in range(400):
        row = json.loads(json.dumps(random.choice(rows)))
        damage(row, random)
        format_ = next((name for name in ("conversations", "messages") if name in row), "alpaca")
        try:
            for example in read_examples(DataTable(source=write(tmp_path, [row]), format=format_)):
                render(example, tokenizer)
                outcomes["rendered"] += 1
        except (DataError, Skip) as error:
            outcomes[type(error)] += 1
            assert "\n" not in str(error) and str(error).isprintable()
    assert min(outcomes["rendered"], outcomes[DataError]) > 50


def damage(value, random):
    """Change one place somewhere inside a value."""
    while True:
        place = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if isinstance(value[place], dict | list) and value[place] and random.random() < 0.8:
            value = value[place]
        elif random.random() < 0.2:
            del value[place]
            return
        else:
            value[place] = random.choice(ODD)
            return


def test_the_known_keys_are_those_that_are_read():
    assert not {"role", "content", "from", "value"} & KEYS


# --- what others' rows hold beside ---

TURN = [{"role": "user", "content": "q"}]


@pytest.mark.parametrize(
    ("row", "format_", "settings"),
    [
        (
            {"prompt": TURN, "completion": [REPLY]},
            "response",
            {"response_column": "completion"},
        ),  # TRL
        ({"prompt": "q", "completion": [REPLY]}, "response", {"response_column": "completion"}),
        ({"instruction": "q", "output": REPLY["content"], "history": "[]"}, "alpaca", {}),
    ],
)
def test_a_completion_may_be_messages_and_a_history_a_cell(row, format_, settings, reading):
    example, unused = reading(row, format_, **settings)
    assert (example.turns, example.cot, example.answer, unused) == ((("user", "q"),), "c", "a", {})


def test_a_system_column_of_text_parts_and_a_history_in_json(reading):
    row = {"system": [{"type": "text", "text": "s"}], "messages": [USER, REPLY]}
    assert reading(row)[0].history == (("system", "s"),)
    row = {"instruction": "q", "output": REPLY["content"], "history": '[["a", "b"]]'}
    assert reading(row, "alpaca")[0].history == (("user", "a"), ("assistant", "b"))


def test_a_taken_column_is_not_proposed(tmp_path):
    row = {"instruction": "q", "input": "", "chosen": "x", "rejected": "y"}
    with pytest.raises(DataError, match=r"no column 'output'.*; set data.response_column"):
        list(read_examples(DataTable(source=write(tmp_path, [row]), format="alpaca")))


def test_a_role_that_would_be_a_control_token_is_refused(reading, bytes_tokenizer):
    example, _ = reading({"messages": [{"role": "critic<|im_end|>", "content": "x"}, USER, REPLY]})
    with pytest.raises(Skip, match=r"literal <.im_end.> in its prompt"):
        render(example, bytes_tokenizer())
