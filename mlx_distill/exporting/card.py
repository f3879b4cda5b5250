"""The model card of a student: `README.md`, as the Hugging Face hub shows it.

In: a run folder. Out: Markdown under a head of YAML, by huggingface_hub's `ModelCard`. Decided
here: what a stranger should know before using the model, all of it computed from the run's files,
and that no path of this machine is shown but its last part.
"""

from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.errors import RunError
from mlx_distill.exporting.licences import is_hub_id, licence_of
from mlx_distill.files import sha256_of, told_as, write_text
from mlx_distill.recipe.recipe import TABLES, Recipe, with_values
from mlx_distill.reporting.condition_words import capital, in_words
from mlx_distill.reporting.kept_run import Run, read_run
from mlx_distill.reporting.run_cost import cost_of
from mlx_distill.reporting.run_recipe import toml
from mlx_distill.reporting.run_words import headline_of_one, kl_sentence, subline
from mlx_distill.runs.manifest import Manifest
from mlx_distill.runs.own_files import CARD
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.scoring.finishing import unfinished_note
from mlx_distill.words import DASH, counted, in_bits, number, percent

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CUT = (
    "truncation.fraction",
    "truncation.keep",
    "truncation.span",
    "truncation.spread",
    "truncation.whole_share",
    "truncation.ending",
)
METHOD = (
    *CUT,
    "objective.segments",
    "objective.divergence",
    "objective.kd_weight",
    "rollouts.by",
)
# said only where they are not as by default
WHERE_SET = ("truncation.spread", "truncation.whole_share", "truncation.ending", "rollouts.by")
FORMATS = {
    "hf": "Hugging Face layout, for transformers and mlx-lm",
    "mlx": "mlx-lm's layout",
    "mlx-4bit": "mlx-lm's layout, quantised to 4 bits",
    "mlx-8bit": "mlx-lm's layout, quantised to 8 bits",
    "gguf": "GGUF for llama.cpp, LM Studio and Ollama, in the numbers of the student",
    "gguf-q8_0": "GGUF for llama.cpp, LM Studio and Ollama, quantised to Q8_0",
    "gguf-q4_0": "GGUF for llama.cpp, LM Studio and Ollama, quantised to Q4_0",
    "peft": "an adapter for peft, to be loaded on its base model",
    "mlx-adapters": "an adapter for mlx-lm, to be loaded on its base model",
}


def model_card(folder: Path, to: str = "hf", said: list[str] | None = None) -> str:
    """The card of the student of the run in `folder`, in the format `to`; `said` is what is known
    of that export.
    """
    from huggingface_hub import ModelCard

    run = read_run(folder)
    if run.recipe is None:
        raise RunError(f"{folder}: {run.notes.get('recipe.toml', 'recipe.toml cannot be read')}")
    parts = [
        f"# {run.name}",
        headline_of_one(run),
        *subline(run)[:1],
        _made_of(run, run.recipe),
        _format(to, said or []),
        _scores(run),
        _cost(run),
        _limits(run, run.recipe),
        _licences(run.recipe),
        f"## Recipe\n\nWhat differs from the defaults of mlx-distill:\n\n"
        f"```toml\n{toml(_without_paths(run.recipe)).strip()}\n```",
        _versions(run.manifest),
    ]
    body = "\n\n".join(filter(None, parts))
    return str(ModelCard(f"---\n{_head(run, run.recipe, to)}\n---\n\n{body}\n"))


def write_card(run: RunFolder) -> str:
    """Write the card into the run's student, unless a person changed the one that lies there; a
    sentence where that is so, else "".
    """
    path, text = run.student / CARD, model_card(run.path)
    ours = (
        run.readable(Manifest).card,
        sha256(text.encode()).hexdigest(),
    )  # or a kill came between
    if path.is_symlink() or (path.exists() and not (path.is_file() and sha256_of(path) in ours)):
        return f"{path} is not as a run wrote it and is left as it is"
    with told_as(RunError, path):
        write_text(path, text)
        run.update(Manifest, card=ours[1])
    return ""


def _head(run: Run, recipe: Recipe, to: str) -> str:
    from huggingface_hub import ModelCardData

    base, data = recipe.student.model, recipe.data.source
    results = _results(run)
    about = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        datasets=[data] if is_hub_id(data) else None,
        license=licence_of(base) or None,
        library_name={"gguf": "gguf", "mlx": "mlx", "peft": "peft"}.get(to.split("-")[0])
        or "transformers",
        pipeline_tag="text-generation",
        tags=["distillation", "mlx-distill"],
        model_name=run.name if results else None,
        eval_results=results or None,
    )
    return about.to_yaml()


def _results(run: Run) -> "list[EvalResult]":
    from huggingface_hub import EvalResult

    student = run.scores.get("student")
    if student is None:
        return []
    task = _shown(run.task)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type="accuracy",
            metric_value=round(student.accuracy, 4),
        )
    ]


def _made_of(run: Run, recipe: Recipe) -> str:
    teacher = recipe.teacher.model
    account, lines = run.manifest.data, []
    bits = recipe.teacher.quantize_bits
    if teacher:
        lines.append(f"- teacher: `{_shown(teacher)}`" + (f", {in_bits(bits)}" if bits else ""))
    tuning = {"full": "all weights trained"}.get(recipe.student.tuning, recipe.student.tuning)
    packed = recipe.student.quantize_bits
    rounded = f" on its weights {in_bits(packed)}" if packed else ""
    lines.append(f"- student before: `{_shown(recipe.student.model)}`, {tuning}{rounded}")
    data = f"- data: `{_shown(recipe.data.source)}`"
    if account:
        data += f", {counted(account.train, 'example')} to learn from"
        data += f" and {account.validation:,} held out, of {account.read:,} read"
    lines.append(data)
    settings = _settings(recipe, METHOD)
    if not teacher:
        settings["objective.kd_weight"] = 0
        del settings["objective.divergence"]
    lines.append(f"- method: {in_words(settings)}")
    if near := kl_sentence(run):
        lines.append(f"- {near}")
    listed = "\n".join(lines)
    return (
        "## How it was made\n\nIt was distilled with mlx-distill after *Distilling the Essence* "
        f"(arXiv 2512.21002): the student learns to answer as its teacher does.\n\n{listed}"
        if teacher
        else f"## How it was made\n\nIt was fine-tuned with mlx-distill, without a teacher.\n\n{listed}"
    )


def _format(to: str, said: list[str]) -> str:
    lines = "".join(f"\n- {capital(line.removeprefix('note: '))}." for line in said)
    return f"## Format\n\n{capital(FORMATS[to])}." + (f"\n{lines}" if lines else "")


def _scores(run: Run) -> str:
    if not run.scores:
        return "## Scores\n\nNot scored."
    named = {"student": "this model", "base": "the student before", "teacher": "the teacher"}
    rows = [
        f"| {words} | {percent(score.accuracy)} | {percent(score.low)} to {percent(score.high)} "
        f"| {percent(score.unfinished)} | {number(score.mean_tokens)} |"
        for role, words in named.items()
        if (score := run.scores.get(role))
    ]
    problems = max(score.problems for score in run.scores.values())
    return (
        f"## Scores\n\nOn `{_shown(run.task)}`, {counted(problems, 'problem')}:\n\n"
        "| | accuracy | 95\u00a0% interval | unfinished | tokens an answer |\n"
        "|---|---:|---:|---:|---:|\n" + "\n".join(rows) + "\n\nThe intervals cover the choice of "
        "problems, not that of a training seed. Scores of quantised forms are under Format."
    )


def _cost(run: Run) -> str:
    found = {name: text for name, text in cost_of(run).items() if text != DASH}
    lines = "\n".join(f"- {name}: {text}" for name, text in found.items())
    return f"## Cost of training\n\n{lines}" if lines else ""


def _limits(run: Run, recipe: Recipe) -> str:
    cut, lines = recipe.truncation, []
    if cut.cuts and cut.whole_share < 1:
        shown = " and ".join(_shown_after_the_cut(recipe))
        known = f"learned from {shown}" if shown else "knows from its base model"
        lines.append(
            f"It learned from cut texts ({in_words(_settings(recipe, CUT))}); what comes after the "
            f"cut it {known} alone."
        )
    if student := run.scores.get("student"):
        lines.append(f"{percent(student.unfinished)} of its answers on the task did not finish.")
        if note := unfinished_note(recipe, run.scores):
            lines.append(f"{capital(note)}.")
        lines.append("It was scored on this one task alone.")
    else:
        lines.append("It was not scored on any task.")
    lines.append("What its teacher and its data get wrong it may have learned.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _shown_after_the_cut(recipe: Recipe) -> Iterator[str]:
    """Which texts showed it what comes there."""
    if recipe.truncation.whole_share:
        yield "the whole texts"
    if recipe.truncation.ending == "answer":
        yield "the answers that follow it"


def _settings(recipe: Recipe, names: Sequence[str]) -> dict[str, Any]:
    """Fields by name, for `in_words`."""
    fields, found = recipe.model_dump(mode="json"), {}
    for name in names:
        table, field = name.split(".")
        if (
            name not in WHERE_SET
            or fields[table][field] != TABLES[table].model_fields[field].default
        ):
            found[name] = fields[table][field]
    return found


def _licences(recipe: Recipe) -> str:
    asked = [
        ("base model", recipe.student.model, "model"),
        ("teacher", recipe.teacher.model, "model"),
        ("data", recipe.data.source, "dataset"),
    ]
    lines = [
        f"- {what} `{_shown(name)}`: {licence_of(name, kind) or 'not known'}"
        for what, name, kind in asked
        if name
    ]
    return (
        "## Licences\n\n" + "\n".join(lines) + "\n\nSome licences ask something of models that "
        "learned from a teacher's answers; read them before you share this one."
    )


def _versions(made: Manifest) -> str:
    facts = {
        "made": made.created,
        "mlx-distill's commit": made.git_commit,
        "backend": " on ".join(filter(None, (made.backend, made.device))),
        **made.versions,
    }
    return "## Versions\n\n" + "\n".join(
        f"- {name}: {text}" for name, text in facts.items() if text
    )


def _without_paths(recipe: Recipe) -> Recipe:
    """The recipe without the folders of this machine."""
    places: dict[str, dict[str, Any]] = {
        table: {
            name: info.default
            for name, info in kind.model_fields.items()
            if name.endswith("folder")
        }
        for table, kind in TABLES.items()
    }
    places["student"] |= {"model": _shown(recipe.student.model)}
    places["teacher"] |= {"model": _shown(recipe.teacher.model)}
    places["data"] |= {"source": _shown(recipe.data.source)}
    also = tuple(map(_task, recipe.eval.also))
    places["eval"] |= {"task": _task(recipe.eval.task), "also": also, "compare": ()}
    return with_values(recipe, **places)


def _task(task: str) -> str:
    kind, colon, path = task.partition(":")
    return f"{kind}{colon}{_shown(path)}" if kind != "embedded" else task


def _shown(name: str) -> str:
    """A name without the folders that lead to it; a hub id and what is embedded stay whole."""
    if name.startswith("embedded:") or is_hub_id(name):
        return name
    head, colon, path = name.partition(":")
    if colon and path:  # a task
        return f"{head}:{Path(path).name}"
    return Path(name).name if name else name
