"""Runs that learn what a model writes: the ids as written, and endings to the bit after any kill."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from endings import STUDENT, TORCH_STUDENT, arguments, assert_same

from mlx_distill.backends import choose_backend
from mlx_distill.backends.pair import Pair
from mlx_distill.cost.flops import Shape
from mlx_distill.cost.writing import writing_cost
from mlx_distill.data.prepare import choose
from mlx_distill.data.sequences import generation_prompt
from mlx_distill.errors import DataError
from mlx_distill.recipe.load import load_recipe
from mlx_distill.runs.manifest import Manifest
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.runs.sample import Sample
from mlx_distill.view import silent
from mlx_distill.writing.of_recipe import Rollouts, held_out_texts, known_sequences

ADD = "mlx_distill.writing.texts:TextFile.add"


def made(tiny_recipe: Path, tmp_path: Path, *sets: str) -> tuple[Rollouts, object]:
    recipe = load_recipe(tiny_recipe, (f"rollouts.folder={tmp_path / 'rollouts'}", *sets))
    pair, backend = Pair.of(recipe), choose_backend("mlx")
    return Rollouts(pair, choose(recipe, pair.tokenizer), ""), backend


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("by", ["teacher", "student"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_what_is_learned_is_the_ids_as_they_were_written(tiny_recipe, tmp_path, by, share):
    rollouts, backend = made(
        tiny_recipe,
        tmp_path,
        f"rollouts.by={by}",
        "rollouts.samples=2",
        f"rollouts.share={share}",
        "rollouts.max_new_tokens=20",
        "truncation.fraction=1.0",
        'objective.segments=["cot","answer"]',
    )
    pair = rollouts.pair
    folder = {"teacher": pair.teacher, "student": pair.student}[by]
    prepared = rollouts.written(lambda: backend.load_teacher(folder, by), backend, silent())
    texts = {}
    for row in read(rollouts.folder / "texts.jsonl"):
        texts.setdefault(row["example"], []).append(row["tokens"])
    expected = []
    for example, said in rollouts.chosen.train:
        prompt = generation_prompt(example.turns, pair.tokenizer, example.tools).tokens
        own = [[*prompt, *tokens] for tokens in sorted(texts.get(example.id, []))]
        expected += own or [said.tokens.tolist()]
    found = [sequence.tokens.tolist() for sequence in prepared.train]
    assert sorted(found) == sorted(expected)
    assert (len(texts) == len(rollouts.chosen.train)) == (share == 1)
    kept = {example.id for example, _ in rollouts.chosen.train} - texts.keys()
    ids = [sequence.id for sequence in prepared.train]
    assert kept == {name for name in ids if "-" not in name}
    assert len(prepared.validation) == len(rollouts.chosen.validation)
    assert all(sequence.weight == 1 for sequence in prepared.train)


def test_texts_are_written_once_for_all_who_ask_the_same(tiny_recipe, tmp_path):
    asked = ("rollouts.by=teacher", "rollouts.max_new_tokens=5", "truncation.span=cot")
    rollouts, backend = made(tiny_recipe, tmp_path, *asked)
    loads = []

    def load():
        loads.append(1)
        return backend.load_teacher(rollouts.pair.teacher, "t")

    first = rollouts.written(load, backend, silent())
    again, _ = made(tiny_recipe, tmp_path, *asked, "truncation.fraction=0.4", "optim.steps=9")
    assert again.folder == rollouts.folder
    cut = again.written(load, backend, silent())
    assert len(loads) == 1
    for whole, shorter in zip(first.train_whole, cut.train_whole, strict=True):
        np.testing.assert_array_equal(whole.tokens, shorter.tokens)
    for setting in ("rollouts.temperature=0.5", "teacher.compute_dtype=bfloat16"):
        other, _ = made(tiny_recipe, tmp_path, *asked, setting)
        assert other.folder != rollouts.folder
    same, _ = made(tiny_recipe, tmp_path, *asked, "student.compute_dtype=bfloat16")
    assert same.folder == rollouts.folder


def test_a_plan_counts_texts_as_long_as_they_can_be(tiny_recipe, tmp_path):
    rollouts, backend = made(
        tiny_recipe, tmp_path, "rollouts.by=teacher", "rollouts.samples=2", "truncation.span=cot"
    )
    planned = rollouts.planned()
    load = lambda: backend.load_teacher(rollouts.pair.teacher, "t")  # noqa: E731
    written = rollouts.written(load, backend, silent())
    assert len(planned.train_whole) == len(written.train_whole)
    for longest, found in zip(planned.train_whole, written.train_whole, strict=True):
        assert len(longest) >= len(found) and longest.prompt_end == found.prompt_end


def test_a_plan_cuts_what_will_be_written_as_a_run_does(tiny_recipe, tmp_path):
    """Which texts stay whole, and where each other one is cut, is drawn by their ids."""
    asked = ("rollouts.by=teacher", "rollouts.samples=2", "rollouts.max_new_tokens=5")
    cut = ("truncation.span=cot", "truncation.spread=0.9", "truncation.whole_share=0.3")
    rollouts, backend = made(tiny_recipe, tmp_path, *asked, *cut)
    planned = rollouts.planned()
    load = lambda: backend.load_teacher(rollouts.pair.teacher, "t")  # noqa: E731
    written = rollouts.written(load, backend, silent())
    assert planned.stay_whole == written.stay_whole > 0
    names = [[text.id for text in one.train_whole] for one in (planned, written)]
    assert names[0] == names[1]


def test_what_is_shown_and_planned_is_what_lies_there(tiny_recipe, tmp_path):
    rollouts, backend = made(
        tiny_recipe,
        tmp_path,
        "rollouts.by=teacher",
        "rollouts.max_new_tokens=5",
        "truncation.span=cot",
    )
    before = known_sequences(rollouts.pair, "")
    assert "not written yet: all are taken as 5 tokens long" in " ".join(before.notes)
    cost = rollouts.cost()
    assert (cost.texts, cost.tokens) == (len(before.train_whole), 5 * len(before.train_whole))
    assert "writing: 20 texts, at most 100 tokens" in before.notes[-1]
    written = rollouts.written(
        lambda: backend.load_teacher(rollouts.pair.teacher, "t"), backend, silent()
    )
    after = known_sequences(rollouts.pair, "")
    assert str(rollouts.folder) in after.notes[-1]
    found = rollouts.account(tmp_path, lambda line: None)
    assert 0 < found.flops <= cost.flops and found.texts == cost.texts
    found, expected = ([s.tokens.tolist() for s in one.train] for one in (after, written))
    assert found == expected != [s.tokens.tolist() for s in before.train]


def test_the_cost_of_writing_is_one_pass_over_what_is_read_and_written():
    """Against a plain count over the matrices of a model of one block."""
    shape = Shape(width=8, layers=1, heads=2, kv_heads=1, head_dim=4, ffn=16, vocabulary=10)
    cost = writing_cost([3, 5], longest=2, at_once=1, writer=shape, number_bytes=4)
    block = 2 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 16)
    attention = 2 * 2 * 4  # two products a pair of tokens, half of the pairs
    expected = block * (5 + 7) + attention * (5**2 + 7**2) + 2 * 8 * 10 * 4
    assert cost.flops == expected
    assert cost.kv_bytes == 1 * (5 + 2) * 2 * 1 * 4 * 4
    assert (cost.texts, cost.tokens) == (2, 4)


KILLS = {
    "teacher writes": [dict(at=ADD), dict(at=ADD, call=2, when="after")],
    "student writes": [
        dict(at=ADD, when="after"),
        dict(at=f"{STUDENT}.accumulate", call=3),
        dict(at=ADD, call=2),
        dict(at=f"{STUDENT}.apply", call=1, when="after"),
        dict(at="mlx.core:save_safetensors", call=2),
        dict(at=f"{STUDENT}.apply", call=2),
    ],
    "torch student writes": [dict(at=ADD, call=2), dict(at=f"{TORCH_STUDENT}.apply", call=3)],
}


@pytest.mark.parametrize("mode", KILLS)
def test_a_run_killed_while_writing_and_between_ends_as_one_never_stopped(
    run_tiny, never_stopped, tmp_path, mode
):
    for kill in KILLS[mode]:
        assert run_tiny(mode, **kill).code == -9, kill
    result = run_tiny(mode)
    assert result.code == 0, result.err
    assert_same(tmp_path / "tiny", never_stopped(mode))
    written = RunFolder(tmp_path / "tiny").read(Manifest).written
    assert written.by == mode.split()[-2] and written.texts and written.tokens


def test_the_student_writes_again_what_the_next_steps_take(whole_run):
    folder = whole_run("student writes")
    rows = read(folder / "rollouts.jsonl")
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert {row["step"] for row in rows} == {0, 2, 4}
    again = {}
    for row in rows:
        again.setdefault((row["example"], row["sample"]), set()).add(tuple(row["tokens"]))
    assert any(len(texts) > 1 for texts in again.values())  # it has learned in between
    run = RunFolder(folder)
    thought = run.read(Manifest).data.segments["cot"]
    assert 0 < thought.before <= sum(len(row["tokens"]) for row in rows)  # none of a stand-in
    shown = run.read(Sample).tokens
    assert len({token.text for token in shown if token.segment == "cot"}) > 1


def test_activations_are_measured_on_real_texts_where_the_student_has_yet_to_write(
    tiny_recipe, tmp_path
):
    rollouts, backend = made(
        tiny_recipe, tmp_path, "rollouts.by=student", "rollouts.refresh_every=2"
    )
    said = tuple(sequence for _, sequence in rollouts.chosen.train)
    for prepared in (rollouts.planned(), rollouts.written(no_writer, backend, silent())):
        assert prepared.train_whole != said == prepared.measured


def test_answers_alone_may_be_learned_of_what_is_not_written_yet(tiny_recipe, tmp_path):
    asked = ("rollouts.by=student", "rollouts.refresh_every=2", 'objective.segments=["answer"]')
    rollouts, backend = made(tiny_recipe, tmp_path, *asked, "truncation.fraction=1.0")
    for prepared in (rollouts.planned(), rollouts.written(no_writer, backend, silent())):
        learned = [one.supervised(("answer",)).sum() for one in prepared.train]
        assert learned and set(learned) == {rollouts.table.max_new_tokens}


def no_writer():
    raise AssertionError("there is nothing to write before the first step")


def test_two_processes_write_each_text_once(tiny_recipe, tmp_path):
    words = [*arguments(tiny_recipe, tmp_path, "teacher writes")]
    words[0] = "write"
    command = [sys.executable, "-m", "mlx_distill", *words]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    (file,) = (tmp_path / "rollouts").glob("*/texts.jsonl")
    asked = [(row["example"], row["sample"]) for row in read(file)]
    assert len(asked) == len(set(asked)) > 0
    assert all("texts in" in text for text in said)


def test_what_cannot_be_written_before_a_run_is_refused(tiny_recipe, command_line, tmp_path):
    for mode in ("full", "student writes"):
        words = arguments(tiny_recipe, tmp_path, mode)
        result = command_line("write", *words[1:])
        assert result.code == 2
        assert "leaves nothing to be written before a run" in result.err


def test_prompts_alone_are_answered_and_learned(tiny_recipe, tmp_path, command_line):
    rows = read(tiny_recipe.parent / "rows.jsonl")
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    words = arguments(tiny_recipe, tmp_path, "teacher writes")
    words += ["--set", f"data.source={asked}", "--set", "data.format=prompts"]
    words += ["--set", "rollouts.share=1.0", "--set", "eval.task="]
    result = command_line(*words)
    assert result.code == 0, result.err
    written = RunFolder(tmp_path / "tiny").read(Manifest).written
    assert written.judged == 0 and written.texts
    # what an export is measured on: these texts, and no others where they are gone
    recipe = RunFolder(tmp_path / "tiny").recipe()
    texts = [one.tokens for one in held_out_texts(Pair.of(recipe), "")]
    assert texts and all(len(set(one.tolist())) > 5 for one in texts)
    (tmp_path / "rollouts").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"that the teacher wrote for held-out prompts cannot be"):
        held_out_texts(Pair.of(recipe), "")


def test_too_few_right_texts_for_a_step_are_not_blamed_on_the_batch(
    tiny_recipe, tmp_path, command_line
):
    words = arguments(tiny_recipe, tmp_path, "teacher writes")
    result = command_line(*words, "--set", "rollouts.share=1.0", "--set", "rollouts.keep=right")
    assert result.code == 2
    assert re.search(
        r": 0 of \d+ texts are learned, .*0\.0.% right.*, and a step takes \d+: raise", result.err
    )


@pytest.mark.parametrize("asked", ['rollouts.keep="right"', "rollouts.weigh=pass_rate"])
def test_texts_that_no_row_can_judge_are_refused_before_they_are_written(
    tiny_recipe, tmp_path, asked
):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(f'{{"prompt": "say {n}"}}\n' for n in range(30)))
    settings = (f"data.source={rows}", "data.format=prompts", "rollouts.samples=2", asked)
    with pytest.raises(DataError, match=r"none of 26 examples has one: name the column of answers"):
        made(tiny_recipe, tmp_path, "rollouts.by=teacher", *settings)
