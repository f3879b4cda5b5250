"""`data.compat = "paper"` beside the paper's public code (weiruichen01/distilling-the-essence at
b55aaf8, BSD-2), whose formulas are written again here: token ids and labels. The loss: `test_compat_loss.py`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from test_examples import BESPOKE, INSTRUCTION

from mlx_distill.data.compat import whole_conversation
from mlx_distill.data.prepare import prepare
from mlx_distill.data.reading import read_examples
from mlx_distill.data.truncate import truncate
from mlx_distill.errors import DataError, RecipeError
from mlx_distill.recipe.load import load_recipe
from mlx_distill.recipe.tables import DataTable, TruncationTable

IGNORED = -100
SECTIONS = {
    "promptcotAns": ("prompt", "cot", "answer"),
    "promptCot": ("prompt", "cot"),
    "cot": ("cot",),
    "cotAns": ("cot", "answer"),
    "ans": ("answer",),
    "promptAns": ("prompt", "answer"),
}
ASKED = ["2+3?", "Let $x = \\frac{1}{2}$.\n\nFind é.", "Add 7 and\n8, then halve it: why?"]


def stratos(asked, thought):
    """A row of Bespoke-Stratos, OpenThoughts or Sky-T1."""
    said = BESPOKE.replace("Two", f"{thought} Well, two")
    turns = [{"from": "user", "value": asked}, {"from": "assistant", "value": said}]
    return {"system": INSTRUCTION, "conversations": turns}


def written(asked, text):
    """A row of theirs whose answer is this text, marks and white space as they stand."""
    turns = [{"from": "user", "value": asked}, {"from": "assistant", "value": text}]
    return {"system": INSTRUCTION, "conversations": turns}


SAID = [" <think>Two\n and three. \n\n</think>5 \n", "\n<think>\n\n  Two.\n</think>\n\n\n\n5\n\n"]
ROWS = {
    "bespoke-stratos": [
        *[stratos(asked, asked) for asked in ASKED],
        written("2+3? ", f" {BESPOKE.replace('Two', ' Two')} "),
        written("2+3?!", BESPOKE.replace("\n\n", "\n").replace("three.", "three. \n\n")),
        written("2+3", BESPOKE.replace("\n\n", "") + "\n\nThat is all."),
    ],
    "synthetic-1": [
        {"prompt": f"\n2+3{mark}", "llm_response": said, "task_type": "verifiable_math"}
        for mark, said in zip("?!", SAID, strict=True)
    ],
    "nemotron": [
        {"input": [{"role": "user", "content": f"2+3{mark}"}], "output": said, "reasoning": "on"}
        for mark, said in zip("?!", SAID, strict=True)
    ],
}


def their_ids(row, tokenizer):
    """`formatting_func` and `tokenize`."""
    messages = [
        {"role": "user", "content": row.get("prompt") or row.get("input", [{}])[0].get("content")},
        {"role": "assistant", "content": row.get("llm_response") or row.get("output")},
    ]
    if "conversations" in row:
        messages = []
    for turn in row.get("conversations", ()):
        content = turn["value"]
        if turn["from"] == "assistant":
            content = content.replace("<|begin_of_solution|>\n\n", "")
            content = content.replace("\n\n<|end_of_solution|>", "")
            content = content.replace("<|begin_of_thought|>", "<think>")
            content = content.replace("<|end_of_thought|>", "</think>")
        messages.append({"role": turn["from"], "content": content})
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    return tokenizer(text)["input_ids"]


def their_labels(ids, section, tokenizer):
    """The collator's labels of one example, without padding."""
    labels = np.array(ids)
    begin = ids.index(tokenizer.convert_tokens_to_ids("<think>"))
    end = ids.index(tokenizer.convert_tokens_to_ids("</think>")) + 1
    if section in ("cot", "cotAns"):
        labels[:begin] = IGNORED
    if section in ("cot", "promptCot"):
        labels[end + 1 :] = IGNORED
    if section == "ans":
        labels[:end] = IGNORED
    if section == "promptAns":
        labels[begin:end] = IGNORED
    return labels


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Rows of each dataset's layout, as the public code and as we read them."""
    found = {}
    for name, rows in ROWS.items():
        path = tmp_path_factory.mktemp("rows") / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        examples = read_examples(DataTable(source=f"{name}:{path}", compat="paper"))
        found[name] = list(zip(rows, examples, strict=True))
    return found


@pytest.mark.network
@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("name", ROWS)
def test_ids_and_labels_are_the_public_codes(name, section, pairs, qwen3_tokenizer):
    for row, example in pairs[name]:
        ours = whole_conversation(example, qwen3_tokenizer, SECTIONS[section])
        ids = their_ids(row, qwen3_tokenizer)
        assert ours.tokens.tolist() == ids
        labels = their_labels(ids, section, qwen3_tokenizer)
        labels[0] = IGNORED  # it is shifted away
        said = np.where(ours.supervised(SECTIONS[section]), ours.tokens, IGNORED)
        assert said.tolist() == labels.tolist()


# our cut, and where theirs begins among the tokens that it leaves out
CUTS = [
    *((TruncationTable(fraction=fraction), 0.0) for fraction in (0.1, 0.25, 0.5, 0.75)),
    (TruncationTable(keep="suffix", fraction=0.5), 1.0),
    (TruncationTable(keep="middle", fraction=0.5), 0.5),
]


@pytest.mark.network
@pytest.mark.parametrize(("cut", "left_out"), CUTS)
def test_a_part_is_the_public_codes(cut, left_out, pairs, qwen3_tokenizer):
    for row, example in pairs["bespoke-stratos"]:
        ours = whole_conversation(example, qwen3_tokenizer, SECTIONS["promptcotAns"])
        ids = their_ids(row, qwen3_tokenizer)
        length = max(1, int(len(ids) * cut.fraction))
        start = int((len(ids) - length) * left_out)
        assert truncate(ours, cut).tokens.tolist() == ids[start : start + length]


@pytest.mark.network
@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("name", ROWS)
def test_what_ends_with_the_reasoning_is_the_public_codes(name, section, pairs, qwen3_tokenizer):
    """`truncate_after_think_end_token`, which leaves no line break after `</think>`."""
    cut, segments = TruncationTable(keep="cot"), SECTIONS[section]
    for row, example in pairs[name]:
        ours = truncate(whole_conversation(example, qwen3_tokenizer, segments, cut.keep), cut)
        ids = their_ids(row, qwen3_tokenizer)
        ids = ids[: ids.index(qwen3_tokenizer.convert_tokens_to_ids("</think>")) + 1]
        assert ours.tokens.tolist() == ids
        labels = their_labels(ids, section, qwen3_tokenizer)
        labels[0] = IGNORED
        said = np.where(ours.supervised(segments), ours.tokens, IGNORED)
        assert said.tolist() == labels.tolist()


def test_what_a_model_writes_is_not_rendered_as_the_paper_does():
    recipe = Path(__file__).parents[2] / "recipes" / "cot50.toml"
    with pytest.raises(RecipeError, match='compat = "paper" renders what the data says'):
        load_recipe(recipe, ("data.compat=paper", "rollouts.by=teacher"))
    with pytest.raises(RecipeError, match="prompt has no place for the problem"):
        load_recipe(recipe, ('eval.prompt="no"',))


ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
)


def prepared(folder, rows, tokenizer, *settings):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    counts = ("data.train_examples=2", "data.validation_examples=1")
    recipe = Path(__file__).parents[2] / "recipes" / "paper" / "sky-t1-compat.toml"
    return prepare(load_recipe(recipe, (f"data.source={path}", *counts, *settings)), tokenizer)


def asked(many, **more):
    said = f"<think>\nOne more.\n</think>\n\n{many + 1}"
    turns = [{"role": "user", "content": f"{many} + 1?"}, {"role": "assistant", "content": said}]
    return {"messages": turns} | more


def test_what_is_held_out_is_cut_without_an_ending(bytes_tokenizer, tmp_path):
    """A teacher is not asked about one, and the public code has none."""
    tokenizer, rows = bytes_tokenizer("qwen2_5"), [asked(many) for many in range(3)]
    cut_in_cot = "truncation.span=cot", "truncation.fraction=0.5"
    ended = prepared(tmp_path, rows, tokenizer, *cut_in_cot, "truncation.ending=answer")
    assert all(one.ending for one in ended.train)
    (cut,) = prepared(tmp_path, rows, tokenizer, *cut_in_cot).validation
    (held_out,) = ended.validation
    assert held_out.tokens.tolist() == cut.tokens.tolist() and not held_out.ending
    assert held_out.weight == cut.weight


def test_what_the_public_code_does_not_read_is_counted(bytes_tokenizer, tmp_path):
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [asked(many, system="Be brief.", tools=tools) for many in range(3)]
    found = prepared(tmp_path, rows, bytes_tokenizer("qwen2_5")).unused
    assert found == {
        'system text (data.compat = "paper")': 3,
        'tools (data.compat = "paper")': 3,
    }


def test_a_run_that_keeps_the_reasoning_ends_with_its_tag(bytes_tokenizer, tmp_path):
    tokenizer = bytes_tokenizer("qwen2_5")
    keep = "truncation.keep=cot", "truncation.fraction=1.0"
    found = prepared(tmp_path, map(asked, range(3)), tokenizer, *keep)
    for one in (*found.train, *found.validation):
        assert tokenizer.decode(one.tokens).endswith("\n</think>")


def test_a_template_that_takes_reasoning_out_is_named_as_the_cause(bytes_tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"3 × no </think> in its tokens; this chat template takes"):
        prepared(tmp_path, map(asked, range(3)), bytes_tokenizer("deepseek_r1_distill"))


def test_a_conversation_that_the_template_refuses_is_counted(bytes_tokenizer, tmp_path):
    tokenizer = bytes_tokenizer("qwen2_5")
    tokenizer.chat_template = ALTERNATE
    rows = [asked(many) for many in range(4)]
    rows[3]["messages"].insert(0, {"role": "assistant", "content": "Hello."})
    found = prepared(tmp_path, rows, tokenizer)
    assert len(found.train) == 2
    assert found.skipped in ({}, {"the chat template refuses it (roles must alternate)": 1})
    with pytest.raises(DataError, match=r"1 × the chat template refuses it \(roles must alternate"):
        prepared(tmp_path, rows[1:], tokenizer)
