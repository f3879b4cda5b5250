"""What a model wrote, as a sequence: the ids as written, the segments as rendering would make them."""

import numpy as np
import pytest

from mlx_distill.data.examples import make_example
from mlx_distill.data.sequences import generation_prompt, render
from mlx_distill.writing.sequences import closing_and_end, written_sequence

EXAMPLES = [
    make_example("2+3?", "2+3=5.", "5"),
    make_example("2+3?", "Zwölf — 十二 😀\n\nso", "5 😀", (("system", "Be brief."),)),
    make_example("x", "a < b > c </thin k>", "say </ think> no more"),
]


def assert_segments_are_the_rendered_ones(tokenizer) -> None:
    for example in EXAMPLES:
        whole = render(example, tokenizer)
        prompt = generation_prompt(example.turns, tokenizer, example.tools)
        assert whole.tokens[: len(prompt.tokens)].tolist() == prompt.tokens
        written = whole.tokens[len(prompt.tokens) :].tolist()
        found = written_sequence("x", prompt.tokens, prompt.end, written, tokenizer)
        np.testing.assert_array_equal(found.tokens, whole.tokens)
        assert (found.prompt_end, found.cot_end) == (whole.prompt_end, whole.cot_end)
        assert found.closing == whole.closing


@pytest.mark.parametrize("template", ["qwen2_5", "deepseek_r1_distill"])
@pytest.mark.parametrize("tags", [True, False])
def test_a_text_as_it_would_be_rendered(bytes_tokenizer, template, tags):
    assert_segments_are_the_rendered_ones(bytes_tokenizer(template, think_tokens=tags))


@pytest.mark.network
def test_the_same_with_real_tokenizers(qwen3_tokenizer, smollm2_tokenizer):
    assert_segments_are_the_rendered_ones(qwen3_tokenizer)
    assert_segments_are_the_rendered_ones(smollm2_tokenizer)


@pytest.mark.parametrize(
    ("text", "reasoning"),
    [
        ("a</think>b", "a</think>"),
        ("a</think>\n\n b", "a</think>\n\n "),
        ("a</think>b</think>c", "a</think>"),
        ("</think>", "</think>"),
        ("a</think>\n", "a</think>\n"),
        ("never an end", "never an end"),
        ("", ""),
    ],
)
def test_reasoning_ends_after_the_first_tag(bytes_tokenizer, text, reasoning):
    tokenizer = bytes_tokenizer("qwen2_5", think_tokens=False)
    written = tokenizer(text, add_special_tokens=False)["input_ids"]
    closing, end = closing_and_end(written, tokenizer)
    assert tokenizer.decode(written[:end]) == reasoning
    if "</think>" in text:
        assert tokenizer.decode(written[closing:]).startswith("</think>")
    else:
        assert closing == -1
