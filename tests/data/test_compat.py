"""`data.compat = "paper"` beside the paper's public code (weiruichen01/distilling-the-essence at
b55aaf8, BSD-2), whose formulas are written again here: token ids, labels and loss.
"""

from pathlib import Path

import numpy as np
import pytest
from test_examples import BESPOKE, INSTRUCTION

from mlx_distill.data.batches import make_step
from mlx_distill.data.compat import mean_of_means, whole_conversation
from mlx_distill.data.reading import read_examples
from mlx_distill.data.truncate import truncate
from mlx_distill.errors import RecipeError
from mlx_distill.recipe.load import load_recipe
from mlx_distill.recipe.tables import DataTable, TruncationTable
from mlx_distill.recipe.training_tables import BatchTable

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
ROWS = [
    {
        "system": INSTRUCTION,
        "conversations": [
            {"from": "user", "value": asked},
            {"from": "assistant", "value": BESPOKE.replace("Two", f"{asked} Well, two")},
        ],
    }
    for asked in ASKED
]


def their_ids(row, tokenizer):
    """`formatting_func` and `tokenize`."""
    messages = []
    for turn in row["conversations"]:
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


@pytest.fixture
def examples(tmp_path):
    import json

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return list(read_examples(DataTable(source=f"bespoke-stratos:{path}")))


@pytest.mark.network
@pytest.mark.parametrize("section", SECTIONS)
def test_ids_and_labels_are_the_public_codes(section, examples, qwen3_tokenizer):
    for row, example in zip(ROWS, examples, strict=True):
        ours = whole_conversation(example, qwen3_tokenizer, SECTIONS[section])
        ids = their_ids(row, qwen3_tokenizer)
        assert ours.tokens.tolist() == ids
        labels = their_labels(ids, section, qwen3_tokenizer)
        labels[0] = IGNORED  # it is shifted away
        said = np.where(ours.supervised(SECTIONS[section]), ours.tokens, IGNORED)
        assert said.tolist() == labels.tolist()


@pytest.mark.network
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.75])
def test_the_first_part_is_the_public_codes(fraction, examples, qwen3_tokenizer):
    for row, example in zip(ROWS, examples, strict=True):
        ours = whole_conversation(example, qwen3_tokenizer, SECTIONS["promptcotAns"])
        ids = their_ids(row, qwen3_tokenizer)
        kept = ids[: max(1, int(len(ids) * fraction))]
        assert truncate(ours, TruncationTable(fraction=fraction)).tokens.tolist() == kept


@pytest.mark.network
@pytest.mark.parametrize(("keep", "half"), [("suffix", "right"), ("middle", "middle")])
def test_a_half_is_the_public_codes(keep, half, examples, qwen3_tokenizer):
    for row, example in zip(ROWS, examples, strict=True):
        ours = whole_conversation(example, qwen3_tokenizer, SECTIONS["promptcotAns"])
        ids = their_ids(row, qwen3_tokenizer)
        length = max(1, int(len(ids) * 0.5))
        start = len(ids) - length if half == "right" else (len(ids) - length) // 2
        cut = truncate(ours, TruncationTable(keep=keep, fraction=0.5))
        assert cut.tokens.tolist() == ids[start : start + length]


@pytest.mark.network
def test_the_loss_is_the_public_codes(examples, qwen3_tokenizer):
    """Half of each loss, each one the mean over sequences of means over tokens, on random logits;
    its forward KL is the KL plus the teacher's entropy.
    """
    segments = SECTIONS["cotAns"]
    whole = [whole_conversation(one, qwen3_tokenizer, segments) for one in examples]
    step = make_step(
        0,
        [mean_of_means(one, segments) for one in whole],
        segments,
        BatchTable(micro_batch_size=3, pad_multiple=1),
        False,
    )
    (batch,) = step.batches
    random, wide = np.random.default_rng(3), 7
    flat = random.normal(size=(2, batch.tokens.size, wide))
    u, v = flat - np.log(np.exp(flat).sum(-1, keepdims=True))
    target = batch.tokens.ravel() % wide
    kl = (np.exp(v) * (v - u)).sum(-1)
    entropy = -(np.exp(v) * v).sum(-1)
    at, right = batch.positions, batch.targets % wide
    terms = 0.5 * (kl + entropy)[at] - 0.5 * u[at, right]
    ours = (batch.weight * terms).sum() / step.loss_tokens
    means = []
    for row, length in enumerate(batch.lengths):  # theirs: batch size 1 on each of several GPUs
        ids = batch.tokens[row, :length].tolist()
        labels = their_labels(ids, "cotAns", qwen3_tokenizer)[1:]
        places = row * batch.tokens.shape[1] + np.flatnonzero(labels != IGNORED)
        forward = -(np.exp(v[places]) * u[places]).sum(-1)
        hard = -u[places, target[places + 1]]
        means.append(0.5 * forward.mean() + 0.5 * hard.mean())
    assert ours == pytest.approx(np.mean(means), rel=1e-6)


def test_what_a_model_writes_is_not_rendered_as_the_paper_does():
    recipe = Path(__file__).parents[2] / "recipes" / "cot50.toml"
    with pytest.raises(RecipeError, match='compat = "paper" renders what the data says'):
        load_recipe(recipe, ("data.compat=paper", "rollouts.by=teacher"))
    with pytest.raises(RecipeError, match="prompt has no place for the problem"):
        load_recipe(recipe, ('eval.prompt="no"',))
