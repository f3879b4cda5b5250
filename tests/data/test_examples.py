"""Each row format, each source, each reason to skip or refuse a row, and the split."""

import gzip
import hashlib
import json
import sys
import types
from collections import Counter

import pytest

from mlx_distill.data.examples import example_id, make_example, shuffled
from mlx_distill.data.prepare import take
from mlx_distill.data.reading import read_examples
from mlx_distill.data.reasoning import split_reasoning
from mlx_distill.data.sequences import render
from mlx_distill.errors import DataError, NotFound
from mlx_distill.recipe.tables import DataTable

BESPOKE = (
    "<|begin_of_thought|>\n\nTwo and "
    "three.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n5\n\n<|end_of_solution|>"
)

INSTRUCTION = (  # the system text of Sky-T1, Bespoke-Stratos and OpenThoughts
    "Your role as an assistant involves thoroughly exploring questions through a systematic long "
    "thinking process before providing the final precise and accurate solutions. This requires "
    "engaging in a comprehensive cycle of analysis, summarizing, exploration, reassessment, "
    "reflection, backtracing, and iteration to develop well-considered thinking process. Please "
    "structure your response into two main sections: Thought and Solution. In the Thought section, "
    "detail your reasoning process using the specified format: <|begin_of_thought|> {thought "
    "with steps separated with '\\n\\n'} <|end_of_thought|> Each step should include detailed "
    "considerations such as analisying questions, summarizing relevant findings, brainstorming new "
    "ideas, verifying the accuracy of the current steps, refining any errors, and revisiting "
    "previous steps. In the Solution section, based on various attempts, explorations, and "
    "reflections from the Thought section, systematically present the final solution that you deem "
    "correct. The solution should remain a logical, accurate, concise expression style and detail "
    "necessary step needed to reach the conclusion, formatted as follows: <|begin_of_solution|> "
    "{final formatted, precise, and clear solution} <|end_of_solution|> Now, try to solve the "
    "following question through the above guidelines:"
)


def write(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(folder, rows, **settings):
    skipped = Counter()
    found = list(read_examples(DataTable(source=write(folder, rows), **settings), skipped=skipped))
    return found, skipped


def parts(example):
    return example.prompt, example.cot, example.answer, example.history


# --- formats: the same example in every layout ---

USER, REPLY = (
    {"role": "user", "content": "2+3?"},
    {"role": "assistant", "content": "<think>\nTwo and three.\n</think>\n\n5"},
)
LAYOUTS = {
    "columns": ({"prompt": "2+3?", "cot": "Two and three.", "answer": 5}, {"format": "columns"}),
    "columns, named": (
        {"q": "2+3?", "r": " Two and three. ", "a": "5\n"},
        {"format": "columns", "prompt_column": "q", "cot_column": "r", "answer_column": "a"},
    ),
    "response": ({"prompt": "2+3?", "response": REPLY["content"]}, {"format": "response"}),
    "response without the opening tag": (
        {"prompt": "2+3?", "response": "Two and three.\n</think>5"},
        {"format": "response"},
    ),
    "messages": ({"messages": [USER, REPLY]}, {"format": "messages"}),
    "messages, reasoning_content": (
        {
            "chat": [
                USER,
                {"role": "assistant", "content": "5", "reasoning_content": "Two and three."},
            ]
        },
        {"format": "messages", "messages_column": "chat"},
    ),
    "messages, content in parts": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "3?"}],
                },
                REPLY,
            ]
        },
        {"format": "messages"},
    ),
    "messages as a JSON string": ({"messages": json.dumps([USER, REPLY])}, {"format": "messages"}),
    "conversations (Bespoke-Stratos, OpenThoughts, Sky-T1)": (
        {
            "system": INSTRUCTION,
            "conversations": [
                {"from": "system", "value": INSTRUCTION},
                {"from": "user", "value": "2+3?"},
                {"from": "assistant", "value": BESPOKE},
            ],
        },
        {"format": "conversations"},
    ),
    "conversations, human and gpt": (
        {"conversations": [{"from": "human", "value": "2+3?"}, {"from": "gpt", "value": BESPOKE}]},
        {"format": "conversations"},
    ),
    "gsm8k": (
        {"question": "2+3?", "answer": "Two<<2=2>> and<<1+1=2>> three.\n#### 5"},
        {"format": "gsm8k"},
    ),
    "SYNTHETIC-1": (
        {"prompt": "2+3?", "llm_response": REPLY["content"], "task_type": "verifiable_math"},
        {
            "format": "response",
            "response_column": "llm_response",
            "where": {"task_type": "verifiable_math"},
        },
    ),
    "s1K-1.1": (
        {
            "question": "2+3?",
            "deepseek_thinking_trajectory": "Two and three.",
            "deepseek_attempt": "5",
        },
        {
            "format": "columns",
            "prompt_column": "question",
            "cot_column": "deepseek_thinking_trajectory",
            "answer_column": "deepseek_attempt",
        },
    ),
    "DeepMath": (
        {"question": "2+3?", "final_answer": "5", "r1_solution_1": REPLY["content"]},
        {
            "format": "response",
            "prompt_column": "question",
            "response_column": "r1_solution_1",
        },
    ),
    "Multilingual-Thinking": (
        {
            "messages": [
                {"role": "user", "content": "2+3?", "thinking": None},
                {"role": "assistant", "content": "5", "thinking": "Two and three."},
            ]
        },
        {"format": "messages"},
    ),
    "Llama-Nemotron": (
        {"input": [USER], "output": REPLY["content"], "reasoning": "on"},
        {
            "format": "response",
            "prompt_column": "input",
            "response_column": "output",
            "where": {"reasoning": "on"},
        },
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, tmp_path, bytes_tokenizer, bytes_ids):
    row, settings = LAYOUTS[layout]
    (example,), skipped = read(tmp_path, [row], **settings)
    assert parts(example) == ("2+3?", "Two and three.", "5", ())
    assert not skipped
    sequence = render(example, bytes_tokenizer("qwen2_5"))
    prompt = bytes_ids(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n"
    )
    cot = bytes_ids("<think>\nTwo and three.\n</think>\n\n")
    assert sequence.tokens.tolist() == prompt + cot + bytes_ids("5<|im_end|>")
    assert (sequence.prompt_end, sequence.cot_end) == (len(prompt), len(prompt) + len(cot))


# fmt: off
GOLDEN = {
    "qwen3_tokenizer": (
        [151644, 872, 198, 17, 10, 18, 30, 151645, 198, 151644, 77091, 198,
         151667, 198, 11613, 323, 2326, 624, 151668, 271,
         20, 151645], 12, 20),
    "smollm2_tokenizer": (
        [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2,
         198, 1, 4093, 198, 34, 27, 35, 47, 2, 198, 1, 520, 9531, 198,
         44, 17400, 46, 198, 10345, 284, 1296, 30, 198, 9617, 17400, 46, 1116,
         37, 2], 34, 47),
}
# fmt: on


@pytest.mark.network
@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_on_real_tokenizers(layout, name, tmp_path, request):
    row, settings = LAYOUTS[layout]
    (example,), _ = read(tmp_path, [row], **settings)
    sequence = render(example, request.getfixturevalue(name))
    assert (sequence.tokens.tolist(), sequence.prompt_end, sequence.cot_end) == GOLDEN[name]


def test_history_is_kept_and_loses_its_reasoning(tmp_path):
    system, second = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "And 4+4?"},
    )
    last = {"role": "assistant", "content": "<think>Four twice.</think>8"}
    (example,), _ = read(
        tmp_path, [{"messages": [system, USER, REPLY, second, last, USER]}], format="messages"
    )
    assert parts(example) == (
        "And 4+4?",
        "Four twice.",
        "8",
        (("system", "Be brief."), ("user", "2+3?"), ("assistant", "5")),
    )


def test_a_list_prompt_keeps_its_history(tmp_path):
    row = {"prompt": [{"role": "system", "content": "S"}, USER], "response": "<think>a</think>b"}
    (example,), _ = read(tmp_path, [row], format="response")
    assert parts(example) == ("2+3?", "a", "b", (("system", "S"),))


@pytest.mark.gsm8k
def test_real_gsm8k_rows(gsm8k_folder):
    skipped = Counter()
    data = DataTable(source=str(gsm8k_folder / "train.jsonl"), format="gsm8k")
    examples = list(read_examples(data, skipped=skipped))
    assert len(examples) == 7473 and not skipped
    assert examples[0].cot == (
        "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April "
        "and May."
    )
    assert examples[0].answer == "72"
    assert not any("<<" in example.cot or "####" in example.cot for example in examples)


# --- skipped rows ---


@pytest.mark.parametrize(
    ("row", "settings", "reason"),
    [
        ({"prompt": "q", "cot": "", "answer": "a"}, {}, "no reasoning"),
        ({"prompt": "q", "cot": None, "answer": "a"}, {}, "no reasoning"),
        ({"prompt": "q", "cot": "c", "answer": " "}, {}, "no answer"),
        ({"prompt": "", "cot": "c", "answer": "a"}, {}, "no prompt"),
        ({"prompt": "q", "response": "5"}, {"format": "response"}, "no reasoning"),
        (
            {"prompt": "q", "response": "<think>\n\n</think>5"},
            {"format": "response"},
            "no reasoning",
        ),
        (
            {"prompt": "q", "response": "<think>so 5"},
            {"format": "response"},
            "reasoning never closed",
        ),
        ({"messages": [USER]}, {"format": "messages"}, "no assistant turn"),
        ({"messages": []}, {"format": "messages"}, "no assistant turn"),
        (
            {"messages": [REPLY]},
            {"format": "messages"},
            "no user turn before the last assistant turn",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, REPLY]},
            {"format": "messages"},
            "content that is not text",
        ),
        ({"question": "q", "answer": "5"}, {"format": "gsm8k"}, "no #### before the answer"),
        (
            {"prompt": "q", "cot": "c", "answer": "a", "kind": "x"},
            {"where": {"kind": "y"}},
            "not chosen by data.where",
        ),
    ],
)
def test_skipped_rows_are_counted_and_nothing_left_is_an_error(row, settings, reason, tmp_path):
    with pytest.raises(DataError) as error:
        read(tmp_path, [row, row], **settings)
    assert (
        f"no usable example with format = {settings.get('format', 'columns')!r}: 2 × {reason};"
        in str(error.value)
    )
    assert "\n" not in str(error.value)


def test_some_skipped_rows_are_counted(tmp_path):
    good = {"prompt": "q", "cot": "c", "answer": "a"}
    examples, skipped = read(tmp_path, [good, {**good, "cot": ""}, good, {**good, "prompt": "r"}])
    assert [example.prompt for example in examples] == ["q", "r"]
    assert skipped == {"no reasoning": 1, "same as an earlier row": 1}


def test_an_empty_file_says_so(tmp_path):
    with pytest.raises(DataError, match="it has no rows"):
        read(tmp_path, [])


def test_second_reasoning_stays_in_the_answer():
    assert split_reasoning("<think>a</think>b<think>c</think>d") == ("a", "b<think>c</think>d")


def test_ids_depend_on_content_alone():
    digest = hashlib.sha256(b'["p", "c", "a", []]').hexdigest()[:16]
    assert example_id("p", "c", "a") == make_example("p", " c", "a ").id == digest
    texts = [("pc", "", "a"), ("p", "ca", ""), ("p", "c", "a")]
    assert (
        len({example_id(*text) for text in texts} | {example_id("p", "c", "a", (("user", "x"),))})
        == 4
    )


# --- refused rows ---


def test_wrong_column_names_everything(tmp_path):
    source = write(tmp_path, [{"prompt": "q", "cot": "c", "answers": "a"}])
    with pytest.raises(DataError) as error:
        list(read_examples(DataTable(source=source)))
    assert str(error.value) == (
        f"{source}, line 1: no column 'answer', found prompt, cot, answers; "
        "did you mean 'answers'? Set data.answer_column"
    )


def test_wrong_where_column(tmp_path):
    with pytest.raises(DataError, match=r"no column 'kind', found prompt; set data\.where"):
        read(tmp_path, [{"prompt": "q"}], where={"kind": "x"})


def test_list_where_text_was_expected(tmp_path):
    with pytest.raises(DataError, match="line 1: column 'cot' holds a list, text was expected"):
        read(tmp_path, [{"prompt": "q", "cot": ["a"], "answer": "b"}])


@pytest.mark.parametrize("value", ["hello", [1], [{"from": "user"}], 3, None])
def test_messages_that_are_none(value, tmp_path):
    with pytest.raises(
        DataError, match="line 1: column 'messages' is no list of objects with 'role' and 'content'"
    ):
        read(tmp_path, [{"messages": value}], format="messages")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"prompt": "q"', "not valid JSON"),
        (b"[1, 2]", "a JSON list, expected an object"),
        (b'{"prompt": "\xff"}', "byte 0xff is not UTF-8"),
    ],
)
def test_unreadable_line(line, found, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "q", "cot": "c", "answer": "a"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=f"rows.jsonl, line 3: {found}"):
        list(read_examples(DataTable(source=str(path))))


# --- sources ---

ROWS = [
    {"prompt": "q, 1", "cot": 'say "c"\nthen', "answer": "a"},
    {"prompt": "é", "cot": "漢", "answer": "b"},
]


def write_csv(path, separator=","):
    lines = '"prompt",cot,answer\r\n"q; 1","say ""c""\nthen",a\r\né,漢,b\r\n'
    path.write_bytes(lines.replace(",", separator).replace("q; 1", "q, 1").encode("utf-8-sig"))


def write_parquet(path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("ending", "save"),
    [
        (
            ".jsonl",
            lambda path: path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8"),
        ),
        (
            ".NDJSON",
            lambda path: path.write_text(
                "\ufeff" + "\n".join(map(json.dumps, ROWS)), encoding="utf-8"
            ),
        ),
        (
            ".jsonl.gz",
            lambda path: path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
        ),
        (
            ".csv.GZ",
            lambda path: (write_csv(path), path.write_bytes(gzip.compress(path.read_bytes()))),
        ),
        (".tsv", lambda path: write_csv(path, "\t")),
        (".CSV", lambda path: write_csv(path, ";")),
        ("-bar.csv", lambda path: write_csv(path, "|")),
        (".json", lambda path: path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")),
        (".csv", write_csv),
        (".parquet", write_parquet),
    ],
)
def test_file_sources_agree(ending, save, tmp_path):
    path = tmp_path / f"rows{ending}"
    save(path)
    found = [(e.prompt, e.cot, e.answer) for e in read_examples(DataTable(source=str(path)))]
    assert found == [tuple(row.values()) for row in ROWS]


def test_what_a_column_format_fills_in_is_nothing(tmp_path):
    """Arrow gives each object the keys of all others, and a column of numbers has NaN where there
    is none.
    """
    pyarrow = pytest.importorskip("pyarrow")
    call = {"function": {"name": "look", "arguments": {"city": "Rome"}}}
    other = {"function": {"name": "go", "arguments": {"miles": 3}}}
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "tool_calls": [used]},
                      {"role": "tool", "content": "r"}, REPLY], "score": score}
        for text, used, score in (("a", call, float("nan")), ("b", other, 1.5))
    ]  # fmt: skip
    path = tmp_path / "rows.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    unused = Counter()
    examples = list(read_examples(DataTable(source=str(path), format="messages"), unused=unused))
    calls = [
        json.loads(example.after[0][2])["tool_calls"][0]["function"]["arguments"]
        for example in examples
    ]
    assert calls == [{"city": "Rome"}, {"miles": 3}]
    assert unused == {"column score": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"prompt": "q"},\n oops]', "a.json, line 2: not valid JSON"),
        ("a.json", b'{"prompt": "q"}\n{"prompt": "q"}', "is it JSON lines"),
        ("a.json", b'{"prompt": "q"}', "a JSON dict, expected a list"),
        ("a.json", b"[1]", "row 1: a JSON int, expected an object"),
        ("a.csv", b"prompt,cot\nq\n", "a.csv, line 2: not readable as CSV"),
        ("a.csv", b"prompt,cot\nq,c,a\n", "a.csv, line 2: not readable as CSV"),
        (
            "a.csv",
            b'prompt,cot\n"q,c\nq,c\n',
            "line 2: not readable as CSV .a quote .* is never closed",
        ),
        ("a.csv", b'prompt,cot\n"q"x,c\n', "line 2: not readable as CSV"),
        (
            "a.csv",
            b"sep=;\nprompt;cot\nq;c\n",
            "its first line 'sep=;' is for Excel alone; delete it",
        ),
        (
            "a.csv",
            b"prompt:cot\nq:c\n",
            "separated by something else than a comma, semicolon, tab or bar",
        ),
        (
            "a.jsonl",
            b'[{"prompt": "q"}]',
            "a JSON list, .*; is it one list over many lines. Then name it .json",
        ),
        (
            "a.jsonl",
            b'[\n{"prompt": "q"}]',
            "not valid JSON.*is it one list over many lines. Then name it .json",
        ),
        ("a.parquet.gz", b"", "not read from .gz; unpack it"),
        ("a.csv", b"prompt,cot\nq,\xff\n", "line 2: byte 0xff is not UTF-8"),
        ("a.csv", b"prompt,cot,cot\nq,c,d\n", "two columns are called 'cot'; rename one"),
        ("a.parquet", b"PAR1 not at all", "not readable as Parquet"),
        (
            "a.txt",
            b"hello",
            "ends in '.txt'; known are .jsonl, .ndjson, .json, .csv, .tsv, .parquet",
        ),
    ],
)
def test_unreadable_files(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        list(read_examples(DataTable(source=str(tmp_path / name))))
    assert "\n" not in str(error.value)


def test_missing_file_lists_its_neighbours(tmp_path):
    write(tmp_path, ROWS, "train.jsonl")
    with pytest.raises(NotFound, match=r"trian.jsonl is not there \(.* holds train.jsonl\)"):
        list(read_examples(DataTable(source=str(tmp_path / "trian.jsonl"))))
    with pytest.raises(NotFound, match=r"is a folder \(.* holds train.jsonl\)"):
        list(read_examples(DataTable(source=str(tmp_path))))


def test_config_of_a_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"data.config = 'SFT' names a part of a hub dataset"):
        read(tmp_path, ROWS, config="SFT")


def test_hub_dataset_is_asked_for_config_and_split(monkeypatch):
    asked = []
    fake = types.SimpleNamespace(
        load_dataset=lambda *names, **options: asked.append((names, options)) or ROWS
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    data = DataTable(source="org/name", config="SFT", split="math", format="columns")
    assert [example.prompt for example in read_examples(data)] == ["q, 1", "é"]
    assert asked == [(("org/name", "SFT"), {"split": "math"})]


def test_hub_failure_is_one_line(monkeypatch):
    def load_dataset(*names, **options):
        raise ConnectionError("Couldn't reach 'org/name'\non the hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(NotFound) as error:
        list(read_examples(DataTable(source="org/name")))
    assert "\n" not in str(error.value)
    assert (
        "org/name, split 'train' is no file here and could not be loaded from the hub: Couldn't "
        "reach" in str(error.value)
    )
    assert "HF_HUB_OFFLINE" in str(error.value)


def test_hub_offline_is_one_line(monkeypatch, tmp_path):
    """The real package, told to stay offline (its flags are read at import, hence set on the
    modules).
    """
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(NotFound, match="nobody/nothing-here, split 'train' is no file here"):
        list(read_examples(DataTable(source="nobody/nothing-here")))


def test_without_the_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r"need the datasets package; pip install 'mlx-distill\[data\]'"
    ):
        list(read_examples(DataTable(source="org/name")))


def test_embedded_source(monkeypatch):
    asked = []

    def generate(partition, count, seed):
        asked.append((partition, count, seed))
        return [(f"{seed}+{i}?", "c", str(i)) for i in range(count)]

    monkeypatch.setitem(
        sys.modules,
        "mlx_distill.embedded",
        types.SimpleNamespace(EMBEDDED={"sums": generate}, PARTITIONS=("train",)),
    )
    data = DataTable(source="embedded:sums", train_examples=5, validation_examples=2)
    assert [example.answer for example in read_examples(data, seed=3)] == list("0123456")
    assert asked == [("train", 7, 3)]
    with pytest.raises(NotFound, match="no embedded task 'sum'; there are: sums"):
        list(read_examples(DataTable(source="embedded:sum", train_examples=5)))
    with pytest.raises(DataError, match=r"set data\.train_examples"):
        list(read_examples(DataTable(source="embedded:sums")))
    with pytest.raises(DataError, match="no split 'tran'; there are: train"):
        list(read_examples(DataTable(source="embedded:sums", split="tran", train_examples=5)))
    for field, value in (("where", {"a": "b"}), ("stream_rows", 9), ("cot_column", "c")):
        with pytest.raises(DataError, match=rf"data\.{field} = .* is about rows, and an embedded"):
            list(read_examples(data.model_copy(update={field: value})))


# --- the split ---


def numbered(count, prompts=None):
    return [make_example(f"q{i % (prompts or count)}", f"c{i}", "a") for i in range(count)]


def split(examples, data, seed, skipped=None):
    pairs = ((example, example.cot) for example in shuffled(examples, seed))
    sides = take(pairs, data, Counter() if skipped is None else skipped, len(examples))
    assert all(rendered == example.cot for side in sides for example, rendered in side)
    return tuple([example for example, _ in side] for side in sides)


def test_split_is_seeded_and_complete():
    examples, data = numbered(50), DataTable(source="x", validation_examples=10)
    train, validation = split(examples, data, 7)
    assert (len(train), len(validation)) == (40, 10)
    assert {e.id for e in train} | {e.id for e in validation} == {e.id for e in examples}
    assert split(examples, data, 7) == (train, validation)
    assert split(examples, data, 8)[1] != validation


@pytest.mark.parametrize(
    ("rows", "held_out"), [(2, 1), (9, 1), (10, 1), (30, 3), (639, 63), (640, 64), (5000, 64)]
)
def test_where_a_recipe_does_not_say_a_tenth_is_held_out_and_64_at_most(rows, held_out):
    train, validation = split(numbered(rows), DataTable(source="x"), 7)
    assert (len(train), len(validation)) == (rows - held_out, held_out)
    chosen = DataTable(source="x", validation_examples=1)
    assert len(split(numbered(rows), chosen, 7)[1]) == 1


def test_held_out_rows_do_not_depend_on_the_number_of_training_rows():
    examples = numbered(50)
    splits = [
        split(examples, DataTable(source="x", validation_examples=10, train_examples=n), 7)
        for n in (5, 30)
    ]
    assert splits[0][1] == splits[1][1]
    assert splits[0][0] == splits[1][0][:5]


@pytest.mark.parametrize("seed", range(5))
def test_no_prompt_is_on_both_sides(seed):
    skipped = Counter()
    examples = numbered(60, prompts=12)
    train, validation = split(
        examples, DataTable(source="x", validation_examples=6), seed, skipped=skipped
    )
    assert not {e.prompt for e in train} & {e.prompt for e in validation}
    assert len(train) + len(validation) + skipped["its prompt is in the validation set"] == 60
    assert skipped["its prompt is in the validation set"] > 0


def test_no_more_are_drawn_than_needed():
    data = DataTable(source="x", validation_examples=5, train_examples=10)
    drawn = iter([(example, None) for example in numbered(50)])
    train, validation = take(drawn, data, Counter(), 50)
    assert (len(train), len(validation)) == (10, 5)
    assert len(list(drawn)) == 35


@pytest.mark.parametrize(
    ("validation", "train", "found"), [(10, 0, "10 and 0"), (11, 0, "10 and 0"), (4, 7, "4 and 6")]
)
def test_too_few_examples(validation, train, found):
    data = DataTable(source="rows.jsonl", validation_examples=validation, train_examples=train)
    with pytest.raises(DataError, match=f"found {found} usable ones in 10 examples") as error:
        split(numbered(10), data, 0)
    assert str(error.value).startswith("rows.jsonl: asked for ")
