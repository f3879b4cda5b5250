"""How often is a greedy text the same, whatever it is generated beside?

    python benchmarks/greedy_texts.py embedded:student --backend torch --dtype bfloat16

In: a model, problems of the embedded task (or a file of prompts, a line each). Out: a row of
`results/greedy-texts.csv` for each batch size: the share of texts that are those of batches of one.
A batch changes the order of sums and so the last digits of logits, which is enough to change a token
where two are nearly as likely.
"""

import csv
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.machines import facts
from mlx_distill.backends import choose_backend
from mlx_distill.backends.protocol import Model, Sampling
from mlx_distill.backends.stops import stops_of
from mlx_distill.data.sequences import generation_prompt
from mlx_distill.models.hub import load_tokenizer, model_folder
from mlx_distill.verify.tasks import load_task

RESULTS = Path(__file__).parent / "results" / "greedy-texts.csv"
BATCHES = (1, 4, 16, 64)


def texts(model: Model, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    found = dict(model.generate(prompts, sampling))
    return [found[place] for place in range(len(prompts))]


def measure(
    name: Annotated[str, typer.Argument(help="model: a folder, or embedded:NAME")],
    backend: Annotated[str, typer.Option()] = "mlx",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    task: Annotated[str, typer.Option()] = "embedded:dial",
    problems: Annotated[int, typer.Option()] = 200,
    longest: Annotated[int, typer.Option(help="new tokens")] = 256,
) -> None:
    """Generate with each batch size, and add the rows."""
    folder, engine = model_folder(name), choose_backend(backend)
    tokenizer = load_tokenizer(folder)
    model = engine.load_teacher(folder, name, 0, dtype)
    asked = load_task(task, problems, 42).problems
    prompts = [generation_prompt((("user", one.prompt),), tokenizer).tokens for one in asked]
    stops = stops_of(folder, tokenizer)
    alone: list[list[int]] = []
    rows = []
    for size in BATCHES:
        found = texts(model, prompts, Sampling(longest, batch_size=size, stop_ids=stops))
        alone = alone or found
        equal = sum(one == other for one, other in zip(found, alone, strict=True))
        rows.append(
            facts("benchmarks/greedy_texts.py")
            | {"model": Path(name).name, "backend": backend, "dtype": dtype, "texts": len(found)}
            | {"batch_size": size, "equal": equal, "share": equal / len(found)}
        )
        typer.echo(f"{backend} {dtype} batches of {size}: {equal} of {len(found)} texts equal")
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    typer.run(measure)
