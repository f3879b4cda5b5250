"""Makes the embedded teacher and student base with this program itself: `python
benchmarks/make_embedded.py`.

Each starts as a folder with random weights drawn in numpy, is fine-tuned by an ordinary recipe
(kd_weight = 0 needs no teacher), scored on the held-out partition, and copied to `weights/NAME`;
what the run logged stays in `benchmarks/embedded/NAME`. Decided here: how big they are and how long
each one learns. The base stops early, when it knows the format and solves few.
"""

import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from safetensors.numpy import save_file

from mlx_distill import pipeline
from mlx_distill.embedded import task
from mlx_distill.embedded.tokenizer import END_OF_TURN, PAD, build_tokenizer, write_tokenizer
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.view import View

WEIGHTS = Path(task.__file__).parent / "weights"
LOG_FOLDER = Path(__file__).resolve().parent / "embedded"
LOGS = ("recipe.toml", "manifest.json", "metrics.jsonl", "validation.jsonl", "eval.json")
EMBEDDING_STD = 0.02  # as Llama and Qwen initialise
MATRIX_GAIN = 0.6  # of 1/sqrt(fan-in): so narrow a model learns slowly from matrices of 0.02
SEED = 7


@dataclass(frozen=True)
class Plan:
    """One model: its size and its training. `partition` is the task's, so that no two models learn
    from a common problem.
    """

    partition: str
    layers: int
    width: int
    heads: int
    ffn: int
    examples: int
    steps: int
    batch: int
    learning_rate: float


PLANS = {
    "teacher": Plan(
        "teacher",
        layers=2,
        width=192,
        heads=4,
        ffn=512,
        examples=8000,
        steps=500,
        batch=32,
        learning_rate=3e-3,
    ),
    "student": Plan(
        "base",
        layers=2,
        width=128,
        heads=4,
        ffn=336,
        examples=6000,
        steps=750,
        batch=16,
        learning_rate=3e-3,
    ),
}


def config(plan: Plan, vocabulary: int, ids: dict[str, int]) -> dict:
    """A Llama-family config of the plan's size."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": plan.width,
        "intermediate_size": plan.ffn,
        "num_hidden_layers": plan.layers,
        "num_attention_heads": plan.heads,
        "num_key_value_heads": plan.heads,
        "head_dim": plan.width // plan.heads,
        "hidden_act": "silu",
        "vocab_size": vocabulary,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": ids[END_OF_TURN],
        "pad_token_id": ids[PAD],
        "dtype": "float32",
    }


def random_weights(config: dict, seed: int) -> dict[str, np.ndarray]:
    """By Hugging Face names: the embedding from N(0, 0.02²), matrices from N(0, 0.36 / fan-in),
    norms 1.
    """
    random = np.random.default_rng(seed)
    width, ffn = config["hidden_size"], config["intermediate_size"]

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * MATRIX_GAIN / np.sqrt(columns)).astype(
            np.float32
        )

    embedding = random.standard_normal((config["vocab_size"], width)) * EMBEDDING_STD
    weights = {
        "model.embed_tokens.weight": embedding.astype(np.float32),
        "model.norm.weight": np.ones(width, np.float32),
    }
    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        weights |= {f"{path}.self_attn.{name}_proj.weight": matrix(width, width) for name in "qkvo"}
        weights |= {f"{path}.mlp.{name}_proj.weight": matrix(ffn, width) for name in ("gate", "up")}
        weights[f"{path}.mlp.down_proj.weight"] = matrix(width, ffn)
        weights |= {
            f"{path}.{name}_layernorm.weight": np.ones(width, np.float32)
            for name in ("input", "post_attention")
        }
    return weights


def write_untrained(plan: Plan, folder: Path, seed: int) -> None:
    """An ordinary model folder with random weights."""
    write_tokenizer(folder)
    tokenizer = build_tokenizer()
    described = config(plan, len(tokenizer), tokenizer.get_vocab())
    (folder / "config.json").write_text(json.dumps(described, indent=2))
    save_file(
        random_weights(described, seed), folder / "model.safetensors", metadata={"format": "pt"}
    )


def recipe(name: str, plan: Plan, work: Path) -> Recipe:
    """The fine-tuning of one model on its partition: every segment carries loss, nothing is cut."""
    return Recipe.model_validate(
        {
            "teacher": {"model": ""},
            "student": {"model": str(work / f"{name}-untrained")},
            "data": {
                "source": f"embedded:{task.NAME}",
                "split": plan.partition,
                "train_examples": plan.examples,
                "validation_examples": 64,
            },
            "objective": {"segments": ["cot", "answer"], "kd_weight": 0.0},
            "batch": {"micro_batch_size": 16, "global_batch_size": plan.batch, "pad_multiple": 16},
            "optim": {
                "learning_rate": plan.learning_rate,
                "schedule": "cosine",
                "weight_decay": 0.01,
                "decayed": "all",
                "beta2": 0.95,
                "steps": plan.steps,
            },
            "eval": {
                "task": f"embedded:{task.NAME}",
                "examples": 500,
                "max_new_tokens": 256,
                "batch_size": 125,
                "score_base": False,
            },
            "run": {
                "name": name,
                "folder": str(work / "runs"),
                "seed": SEED,
                "checkpoint_every": 100,
                "validate_every": 0,
                "export": "last",
            },
        }
    )


def make(name: str, work: Path) -> None:
    """Train one model in `work` (an unfinished training continues) and put it where the package
    finds it.
    """
    plan, console = PLANS[name], Console()
    untrained = work / f"{name}-untrained"
    if not (untrained / "model.safetensors").exists():
        write_untrained(plan, untrained, SEED)
    with View(console) as view:
        run = pipeline.run(recipe(name, plan, work), view)
    target = WEIGHTS / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(run / "student", target)
    logs = LOG_FOLDER / name
    logs.mkdir(parents=True, exist_ok=True)
    for log in LOGS:
        shutil.copy(run / log, logs / log)


def main() -> None:
    """`python benchmarks/make_embedded.py [teacher] [student]`; a folder to work in may be given as
    work=FOLDER.
    """
    names = [word for word in sys.argv[1:] if word in PLANS] or list(PLANS)
    asked = [word.removeprefix("work=") for word in sys.argv[1:] if word.startswith("work=")]
    os.chdir(
        asked[0] if asked else tempfile.mkdtemp(prefix="mlx-distill-make-")
    )  # the logs name no folder of this machine
    for name in names:
        make(name, Path())


if __name__ == "__main__":
    main()
