"""Rendered examples against token ids and segment ends written down by hand, for each template
family.
"""

from itertools import pairwise

import numpy as np
import pytest
from tokenizers import processors

from mlx_distill.data.examples import Skip, make_example
from mlx_distill.data.sequences import end_of_turn, generation_prompt, render, stop_ids
from mlx_distill.errors import ModelError

EXAMPLE = make_example("2+3?", "2+3=5.", "5", (("system", "Be brief."),))
CHATML = (
    "<|im_start|>system\nBe "
    "brief.<|im_end|>\n<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n"
)
DEEPSEEK = "<｜begin▁of▁sentence｜>Be brief.<｜User｜>2+3?<｜Assistant｜>"
COT = "<think>\n2+3=5.\n</think>\n\n"


def pieces(sequence, tokenizer):
    """The text of the three segments."""
    ends = [0, sequence.prompt_end, sequence.cot_end, len(sequence)]
    return [tokenizer.decode(sequence.tokens[a:b]) for a, b in pairwise(ends)]


# --- golden: real tokenizers ---


@pytest.mark.network
def test_qwen3_ids_and_ends(qwen3_tokenizer):
    sequence = render(EXAMPLE, qwen3_tokenizer)
    prompt = [
        151644,
        8948,
        198,
        3430,
        9814,
        13,
        151645,
        198,
        151644,
        872,
        198,
        17,
        10,
        18,
        30,
        151645,
        198,
        151644,
        77091,
        198,
    ]
    cot = [151667, 198, 17, 10, 18, 28, 20, 624, 151668, 271]  # 624 is ".\n" and 271 "\n\n"
    assert sequence.tokens.tolist() == [*prompt, *cot, 20, 151645]
    assert (sequence.prompt_end, sequence.cot_end) == (20, 30)
    assert sequence.tokens.dtype == np.int32 and sequence.allowed.all()
    assert generation_prompt((*EXAMPLE.history, ("user", "2+3?")), qwen3_tokenizer).tokens == prompt
    assert stop_ids(qwen3_tokenizer) == {151645}


@pytest.mark.network
def test_qwen3_keeps_what_its_template_would_alter(qwen3_tokenizer):
    example = make_example("hi", "a\n\n\n\nb", "one\n\ntwo", (("user", "x"), ("assistant", "y")))
    prompt, cot, answer = pieces(render(example, qwen3_tokenizer), qwen3_tokenizer)
    assert prompt.endswith(
        "<|im_start|>assistant\ny<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (cot, answer) == ("<think>\na\n\n\n\nb\n</think>\n\n", "one\n\ntwo<|im_end|>")


@pytest.mark.network
def test_smollm2_tags_of_three_tokens(smollm2_tokenizer):
    sequence = render(EXAMPLE, smollm2_tokenizer)
    prompt = [
        1,
        9690,
        198,
        6077,
        5453,
        30,
        2,
        198,
        1,
        4093,
        198,
        34,
        27,
        35,
        47,
        2,
        198,
        1,
        520,
        9531,
        198,
    ]
    cot = [44, 17400, 46, 198, 34, 27, 35, 45, 37, 30, 198, 9617, 17400, 46, 1116]
    assert sequence.tokens.tolist() == [*prompt, *cot, 37, 2]
    assert (sequence.prompt_end, sequence.cot_end) == (21, 36)


@pytest.mark.network
@pytest.mark.parametrize("answer", ["word", "5", "\\boxed{5}", "- a\n- b", "漢字 🎉"])
@pytest.mark.parametrize("name", ["qwen3_tokenizer", "smollm2_tokenizer"])
def test_real_tokenizers_cut_between_segments(name, answer, request):
    tokenizer = request.getfixturevalue(name)
    example = make_example("é?", "think 🤔 twice:", answer)
    assert pieces(render(example, tokenizer), tokenizer)[1:] == [
        "<think>\nthink 🤔 twice:\n</think>\n\n",
        f"{answer}<|im_end|>",
    ]


# --- golden: template families, on a tokenizer whose ids can be written down without it ---

FAMILIES = {
    "qwen2_5": (CHATML, "<|im_end|>"),  # passes text through
    "qwen3_5": (CHATML, "<|im_end|>"),  # its generation prompt ends in <think>\n
    "qwen3_8": (CHATML, "<|im_end|>"),  # the same, and inline tags mean nothing to it
    "deepseek_r1_distill": (
        DEEPSEEK,
        "<｜end▁of▁sentence｜>",
    ),  # strips the reasoning of every turn
}


@pytest.mark.parametrize("think_tokens", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_ids_and_ends(family, think_tokens, bytes_tokenizer, bytes_ids):
    prompt, end = FAMILIES[family]
    sequence = render(EXAMPLE, bytes_tokenizer(family, think_tokens))
    expected = [bytes_ids(text, think_tokens) for text in (prompt, COT, f"5{end}")]
    assert sequence.tokens.tolist() == [token for part in expected for token in part]
    assert (sequence.prompt_end, sequence.cot_end) == (
        len(expected[0]),
        len(expected[0]) + len(expected[1]),
    )


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_8", "deepseek_r1_distill"])
def test_generation_prompt_that_opens_think_is_a_prefix_of_training(
    family, bytes_tokenizer, bytes_ids
):
    tokenizer = bytes_tokenizer(family)
    ids = generation_prompt((*EXAMPLE.history, ("user", "2+3?")), tokenizer).tokens
    assert ids == bytes_ids(FAMILIES[family][0] + "<think>\n")
    assert render(EXAMPLE, tokenizer).tokens[: len(ids)].tolist() == ids


@pytest.mark.parametrize(
    ("ending", "cot_start"),
    [
        ("<think>", "<think>\n2"),
        ("<think>\n\n", "<think>\n\n2"),
        ("", "<think>\n2"),
    ],
)
def test_generation_prompt_endings(ending, cot_start, bytes_tokenizer):
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = "{{ messages[-1].content }}<|im_start|>{{ " + repr(ending) + " }}"
    prompt, cot, _ = pieces(render(make_example("q", "2", "5"), tokenizer), tokenizer)
    assert (prompt, cot) == ("q<|im_start|>", f"{cot_start}\n</think>\n\n")


def test_template_that_thinks_only_when_told(bytes_tokenizer):
    tokenizer = bytes_tokenizer("qwen3_5")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "enable_thinking is false", "true"
    ).replace("enable_thinking is defined and true", "not enable_thinking")
    ids = generation_prompt((("user", "q"),), tokenizer).tokens
    assert tokenizer.decode(ids).endswith("assistant\n<think>\n")


def test_token_over_a_boundary_belongs_to_where_it_begins(bytes_tokenizer):
    tokenizer = bytes_tokenizer(think_tokens=False, merges=((":", "<"), ("Ċ", "5")))
    tokenizer.chat_template = "{{ messages[-1].content }} Assistant:"
    assert pieces(render(make_example("q", "2", "5"), tokenizer), tokenizer) == [
        "q Assistant:<",
        "think>\n2\n</think>\n\n5",
        "<|im_end|>",
    ]


def test_trimmed_offsets_do_not_move_a_boundary(bytes_tokenizer):
    tokenizer = bytes_tokenizer(think_tokens=False, merges=(("Ġ", "<"),))
    tokenizer.chat_template = "{{ messages[-1].content }}: "
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    begin = tokenizer("a <", return_offsets_mapping=True)["offset_mapping"][1][0]
    assert begin == 2  # the space is trimmed from " <"
    assert pieces(render(make_example("q", "2", "5"), tokenizer), tokenizer)[:2] == [
        "q: <",
        "think>\n2\n</think>\n\n",
    ]


def test_bytes_of_one_character_stay_together(bytes_tokenizer):
    tokenizer = bytes_tokenizer("", think_tokens=False)
    tokenizer.chat_template = "{{ messages[-1].content }}漢"
    assert pieces(render(make_example("é", "2", "5"), tokenizer), tokenizer)[:2] == [
        "é漢",
        "<think>\n2\n</think>\n\n",
    ]


def test_the_tokenizer_adds_nothing_to_what_the_template_wrote(bytes_tokenizer, bytes_ids):
    tokenizer = bytes_tokenizer("deepseek_r1_distill")
    begin = "<｜begin▁of▁sentence｜>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, 3)]
    )
    assert tokenizer("a")["input_ids"][0] == 3
    assert render(EXAMPLE, tokenizer).tokens.tolist() == bytes_ids(
        DEEPSEEK + COT + "5<｜end▁of▁sentence｜>"
    )
    assert generation_prompt((*EXAMPLE.history, ("user", "2+3?")), tokenizer).tokens == bytes_ids(
        DEEPSEEK + "<think>\n"
    )


# --- ends of turns ---


@pytest.mark.parametrize(
    ("template", "eos", "end", "stops"),
    [
        ("{{ messages[-1].content }}<|im_end|>\n", "<|endoftext|>", "<|im_end|>", {1, 2}),
        ("{{ messages[-1].content }} <|endoftext|>", "<|endoftext|>", " <|endoftext|>", {2}),
        ("{{ messages[-1].content }}\nUser:", "<|endoftext|>", "<|endoftext|>", {2}),
        ("{{ messages[0].content }}", "<|endoftext|>", "<|endoftext|>", {2}),
        ("{{ raise_exception('no') }}", "<|endoftext|>", "<|endoftext|>", {2}),
    ],
)
def test_end_of_turn(template, eos, end, stops, bytes_tokenizer):
    tokenizer = bytes_tokenizer(eos=eos)
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == end
    assert stop_ids(tokenizer) == stops


def test_no_end_of_turn_is_refused(bytes_tokenizer):
    tokenizer = bytes_tokenizer(eos="")
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ModelError, match="neither its chat template nor an eos_token"):
        end_of_turn(tokenizer)


# --- refusals ---


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (("q", "a</think>b", "c"), "literal </think> in its reasoning"),
        (("q", "a", "b<think>c"), "literal <think> in its answer"),
        (("q", "a", "b<|im_end|>"), "literal <|im_end|> in its answer"),
        (("q<|im_start|>system", "a", "b"), r"literal <|im_start|> in its prompt"),
    ],
)
@pytest.mark.parametrize("think_tokens", [True, False])
def test_control_text_in_a_row_is_skipped(parts, reason, think_tokens, bytes_tokenizer):
    with pytest.raises(Skip) as skip:
        render(make_example(*parts), bytes_tokenizer("qwen2_5", think_tokens))
    assert str(skip.value) == reason


def test_tags_in_a_prompt_are_only_text(bytes_tokenizer):
    tokenizer = bytes_tokenizer("qwen3_5")
    prompt, cot, _ = pieces(
        render(make_example("what is <think>?</think>", "a", "b"), tokenizer), tokenizer
    )
    assert prompt.endswith(
        "what is <think>?</think><|im_end|>\n<|im_start|>assistant\n"
    ) and cot.startswith("<think>\na")


def test_template_that_refuses_a_role_skips_the_row(bytes_tokenizer):
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    )
    with pytest.raises(Skip, match=r"the chat template refuses it \(no system role\)"):
        render(EXAMPLE, tokenizer)


def test_no_template_is_refused(bytes_tokenizer):
    with pytest.raises(ModelError, match=r"no chat template; put the chat_template\.jinja"):
        render(EXAMPLE, bytes_tokenizer())


def test_slow_tokenizer_is_refused():
    class Slow:
        is_fast, name_or_path = False, "old/model"

    with pytest.raises(ModelError, match=r"old/model: it is a slow one \(Slow\)"):
        end_of_turn(Slow())


# --- what is supervised ---


@pytest.mark.parametrize(
    ("segments", "learned"),
    [
        (("prompt",), CHATML[len("<|im_start|>") :]),  # the first token has nothing before it
        (("cot",), COT),
        (("answer",), "5<|im_end|>"),
        (("prompt", "cot"), CHATML[len("<|im_start|>") :] + COT),
        (("prompt", "answer"), CHATML[len("<|im_start|>") :] + "5<|im_end|>"),
        (("cot", "answer"), COT + "5<|im_end|>"),
        (("prompt", "cot", "answer"), CHATML[len("<|im_start|>") :] + COT + "5<|im_end|>"),
    ],
)
def test_supervised_tokens_are_exactly_the_segments(segments, learned, bytes_tokenizer):
    tokenizer = bytes_tokenizer("qwen2_5", False)
    sequence = render(EXAMPLE, tokenizer)
    assert tokenizer.decode(sequence.tokens[sequence.supervised(segments)]) == learned
