"""The loss of a compat recipe on MLX and on torch beside the public code's
(weiruichen01/distilling-the-essence at b55aaf8, BSD-2): its formulas, written again in float64 over
the logits that transformers computes of the same tiny models, on rows of Qwen3's own tokenizer.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.numpy import save_file
from test_compat import IGNORED, stratos, their_ids, their_labels
from tiny import llama_config, random_weights
from transformers import AutoModelForCausalLM

from mlx_distill.backends import choose_backend
from mlx_distill.data.batches import Steps, validation_batches
from mlx_distill.data.prepare import prepare
from mlx_distill.data.sequences import Segment
from mlx_distill.objective import Objective
from mlx_distill.recipe.load import load_recipe
from mlx_distill.training.loop import loss_terms, validation_terms

pytestmark = pytest.mark.network

RECIPE = Path(__file__).parents[2] / "recipes" / "paper" / "bespoke-stratos-compat.toml"
VOCABULARY = 151_936  # the rows of Qwen3's head
ROWS = {f"{many} + 1?": stratos(f"{many} + 1?", "And so on. " * many) for many in range(0, 12, 2)}
# what the paper's studies change: our settings, the name of its segments, and how much it keeps
STUDIES = {
    "first half": (("truncation.fraction=0.5",), "promptcotAns", 0.5),
    "cot": (("truncation.fraction=1.0", "objective.segments=['cot']"), "cot", 1.0),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory, qwen3_tokenizer):
    """A folder with a teacher, a student that is far from it, and rows of differing lengths."""
    root = tmp_path_factory.mktemp("pair")
    for layers, name in ((1, "student"), (2, "teacher")):
        config = llama_config(layers, width=16, vocabulary=VOCABULARY, family="qwen3")
        qwen3_tokenizer.save_pretrained(root / name)
        (root / name / "config.json").write_text(json.dumps(config))
        weights = random_weights(config, seed=layers, scale=0.5)
        save_file(weights, root / name / "model.safetensors", metadata={"format": "pt"})
    lines = [json.dumps(row) + "\n" for row in ROWS.values()]
    (root / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return root


class PublicCode:
    """What its `_training_step` computes on one GPU, where a batch is one example."""

    def __init__(self, pair, tokenizer):
        self.tokenizer = tokenizer
        self.teacher, self.student = (
            AutoModelForCausalLM.from_pretrained(pair / name, dtype=torch.float64)
            for name in ("teacher", "student")
        )

    def example(self, asked, section, fraction):
        """Token ids and labels of a row."""
        ids = their_ids(ROWS[asked], self.tokenizer)
        labels = their_labels(ids, section, self.tokenizer)
        length = max(1, int(len(ids) * fraction))
        return torch.tensor(ids[:length]), torch.tensor(labels[:length])

    def loss(self, asked, section, fraction):
        """Half of the model's own loss and half of `ForwardKLDiv`, which is a cross-entropy; and
        the mean entropy of the teacher, by which that is more than a KL.
        """
        ids, labels = self.example(asked, section, fraction)
        mask = labels[1:] != IGNORED
        with torch.no_grad():
            teacher_probs = self.teacher(ids[None]).logits[0, :-1][mask].softmax(-1)
        log_probs = self.student(ids[None]).logits[0, :-1][mask].log_softmax(-1)
        hard = torch.nn.functional.nll_loss(log_probs, labels[1:][mask])
        forward = -(teacher_probs * log_probs).sum(-1).mean()
        entropy = -(teacher_probs * teacher_probs.log()).sum(-1).mean()
        return 0.5 * hard + 0.5 * forward, entropy

    def step(self, prompts, section, fraction):
        """The loss of as many GPUs as there are prompts, of which FSDP takes the mean, less half of
        the teacher's entropy; and the norm of its gradient.
        """
        self.student.zero_grad()
        total = 0.0
        for asked in prompts:
            loss, entropy = self.loss(asked, section, fraction)
            (loss / len(prompts)).backward()
            total += (loss.item() - 0.5 * entropy.item()) / len(prompts)
        squares = [one.grad.square().sum() for one in self.student.parameters()]
        return total, torch.stack(squares).sum().sqrt().item()


@pytest.fixture(scope="module")
def step(pair, qwen3_tokenizer):
    """`PublicCode.step` by prompts and study, computed once for both backends."""
    theirs = PublicCode(pair, qwen3_tokenizer)
    return cache(lambda prompts, study: theirs.step(prompts, *STUDIES[study][1:]))


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_step_and_a_validation_are_the_public_codes(backend, study, pair, step, qwen3_tokenizer):
    models = (f"teacher.model={pair}/teacher", f"student.model={pair}/student")
    rows = (f"data.source=bespoke-stratos:{pair}/rows.jsonl", "data.validation_examples=2")
    recipe = load_recipe(RECIPE, (*models, *rows, "data.train_examples=4", *STUDIES[study][0]))
    prepared = prepare(recipe, qwen3_tokenizer)
    segments, objective = recipe.objective.segments, Objective.from_table(recipe.objective)
    engine = choose_backend(backend)
    teacher = engine.load_teacher(pair / "teacher", "teacher")
    student = engine.load_student(pair / "student", "student", recipe)

    def prompts(ids):
        return tuple(sorted(prepared.examples[one].prompt for one in ids))

    held_out = validation_batches(prepared.validation, recipe.batch)
    scores = [student.score(batch, teacher.targets(batch), objective) for batch in held_out]
    chosen = [Segment[name.upper()] for name in segments]
    ours = validation_terms(sum(scores[1:], scores[0]), objective, chosen, True)["loss"]
    theirs, _ = step(prompts(one.id for one in prepared.validation), study)
    assert ours == pytest.approx(theirs, rel=1e-5)

    first = Steps(prepared.train, segments, recipe.batch, recipe.run.seed).step(0)
    sums = [
        student.accumulate(batch, teacher.targets(batch), objective, first.loss_tokens)
        for batch in first.batches
    ]
    loss = loss_terms(sum(sums[1:], sums[0]), objective)["loss"]
    theirs, norm = step(prompts(first.new), study)
    assert len(first.batches) == 4
    assert loss == pytest.approx(theirs, rel=1e-5)
    assert student.apply(0.0) == pytest.approx(norm, rel=1e-4)
