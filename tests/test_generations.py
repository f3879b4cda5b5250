"""Kept generations: a scoring that was stopped anywhere ends as if it had not been, and its file
says what was written.
"""

import hashlib
import json
import random

import pytest
from test_evaluate import Words, end_of_turn  # noqa: F401

from mlx_distill.recipe.training_tables import EvalTable
from mlx_distill.scoring.generations import Generations
from mlx_distill.scoring.score import score
from mlx_distill.verify.tasks import Problem, Task

SETTINGS = EvalTable(samples=2, temperature=0.7, batch_size=3, seed=5)


class Killed(BaseException):
    pass


class Drawn:
    """A model that draws its texts from the seed of the batch, and is killed at the batch numbered
    `dies`.
    """

    def __init__(self, tokenizer, dies=None):
        self.tokenizer, self.dies, self.asked = tokenizer, dies, []

    def generate(self, prompts, sampling):
        if len(self.asked) == self.dies:
            raise Killed
        self.asked.append(list(map(tuple, prompts)))
        writer = random.Random(sampling.seed)
        said = [f"</think> {writer.choice('12')} {writer.random()} <|end|>" for _ in prompts]
        found = [(place, self.tokenizer.encode(line)) for place, line in enumerate(said)]
        yield from reversed(found)  # the last one is finished first


def first_word(expected, generated):
    return generated.split("</think>")[1].split()[0] == expected


def make_task(count=5, expected="1"):
    return Task(
        "t", [Problem(f"id{i}", f"q{i}" + " more" * i, expected) for i in range(count)], first_word
    )


def scored(
    path, task=None, settings=SETTINGS, model="student", fields=None, dies=None, tokenizer=None
):
    """(the score without its time, the model, what was said)."""
    tokenizer, said = tokenizer or Words(), []
    drawn = Drawn(tokenizer, dies)
    kept = Generations(path, model, fields or {"fingerprint": "f"}, said.append)
    result = score(drawn, tokenizer, task or make_task(), settings, kept=kept)
    return result.model_copy(update={"seconds": 0.0}), drawn, said, kept


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(path):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows(path)]


def test_each_generation_is_a_row(tmp_path):
    path = tmp_path / "generations.jsonl"
    result, drawn, _, kept = scored(path)
    found = rows(path)
    assert [len(batch) for batch in drawn.asked] == [3, 3, 3, 1]
    assert {(row["problem"], row["sample"]) for row in found} == {
        (f"id{i}", k) for i in range(5) for k in (0, 1)
    }
    assert found[0]["prompt"] == "q4 more more more more", "the longest prompt comes first"
    assert sum(row["correct"] for row in found) / 10 == result.accuracy
    row = found[3]
    assert (
        row["model"] == "student"
        and row["key"] == kept.key
        and row["gold"] == "1"
        and row["compared"] == "text"
    )
    assert (
        first_word("1", row["text"]) is row["correct"]
        and row["finished"]
        and row["well_formed"]
        and row["tokens"] == 4
    )
    assert kept.reference() == {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


@pytest.mark.parametrize("dies", [0, 1, 2, 3])
def test_a_killed_scoring_ends_as_if_it_had_not_been(tmp_path, dies):
    whole, _, _, _ = scored(tmp_path / "whole.jsonl")
    path = tmp_path / "killed.jsonl"
    with pytest.raises(Killed):
        scored(path, dies=dies)
    result, drawn, said, _ = scored(path)
    assert result == whole and len(drawn.asked) == 4 - dies
    assert without_time(path) == without_time(tmp_path / "whole.jsonl")
    assert bool(dies) == any("goes on" in line for line in said)
    again, drawn, _, _ = scored(path)
    assert again == whole and not drawn.asked


def test_a_file_cut_at_any_byte_is_completed(tmp_path):
    whole, _, _, _ = scored(tmp_path / "whole.jsonl")
    content = (tmp_path / "whole.jsonl").read_bytes()
    path = tmp_path / "cut.jsonl"
    for length in range(0, len(content), 61):
        path.write_bytes(content[:length])
        result, _, said, _ = scored(path)
        assert result == whole and without_time(path) == without_time(tmp_path / "whole.jsonl")
        torn = bool(length) and content[length - 1 : length] != b"\n"
        assert torn == any("1 unreadable or torn lines are dropped" in line for line in said)


DAMAGES = [
    b"\xff\xfe\n",
    b"[1]\n",
    b"{}\n",
    b'{"problem": 3}\n',
    b"[" * 9000 + b"\n",
    b"9" * 9000 + b"\n",
    b"\0\n",
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_costs_its_batch(tmp_path, damage):
    path = tmp_path / "g.jsonl"
    whole, _, _, _ = scored(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], damage, *lines[5:]]))
    result, drawn, said, _ = scored(path)
    assert result == whole and len(drawn.asked) == 1 and len(rows(path)) == 10
    assert any("1 unreadable or torn lines are dropped" in line for line in said)


@pytest.mark.parametrize(
    "other",
    [
        {"fields": {"fingerprint": "g"}},
        {"settings": SETTINGS.model_copy(update={"seed": 6})},
        {"settings": SETTINGS.model_copy(update={"max_new_tokens": 6})},
        {"settings": SETTINGS.model_copy(update={"batch_size": 4})},
        {"task": make_task(6)},
        {"task": make_task(expected="2")},
    ],
)
def test_generations_of_another_scoring_are_not_taken(tmp_path, other):
    path = tmp_path / "g.jsonl"
    scored(path)
    expected, _, _, _ = scored(tmp_path / "new.jsonl", **other)
    result, drawn, said, kept = scored(path, **other)
    assert result == expected and drawn.asked
    assert any("10 generations of student were made with another" in line for line in said)
    assert {row["key"] for row in rows(path)} == {kept.key}


def test_other_models_rows_stay(tmp_path):
    path = tmp_path / "g.jsonl"
    scored(path, model="teacher")
    before = path.read_text()
    scored(path, model="student")
    scored(path, model="student", fields={"fingerprint": "g"})
    assert path.read_text().startswith(before) and len(rows(path)) == 20
    assert not scored(path, model="teacher")[1].asked


def test_what_is_written_cannot_hurt_a_terminal(tmp_path):
    class Rude(Drawn):
        def generate(self, prompts, sampling):
            rude = self.tokenizer.encode("</think> \x1b[2J\u202e\ud83d <|end|>")
            return ((place, rude) for place, _ in enumerate(prompts))

    tokenizer, path = Words(), tmp_path / "g.jsonl"
    score(Rude(tokenizer), tokenizer, make_task(), EvalTable(), kept=Generations(path, "m", {}))
    assert path.read_bytes().isascii() and b"\x1b" not in path.read_bytes()
    assert rows(path)[0]["text"] == "</think> \x1b[2J\u202e\ud83d"
