"""What the models wrote for the same problems, and how to ask the student oneself.

In: a `Run`. Out: blocks of its page. Decided here: which three problems are shown, the same ones on
every page of the run: one that base and student differ on, one that the student got wrong, one that
it got right.
"""

from collections.abc import Iterator

from mlx_distill.reporting.commands import STUDENT, ask_command
from mlx_distill.reporting.kept_run import Run
from mlx_distill.reporting.page import Block, Command, Said, Wrote
from mlx_distill.scoring.generations import Generation
from mlx_distill.verify.tasks import THINK_END

SHOWN = 3
LONGEST = 4_000  # characters of a text's thinking, and of its answer
MODELS = {"base": "student before", "student": "student after", "teacher": "teacher"}


def differing(run: Run) -> list[str]:
    """The problems that one of base and student got right, and the other one wrong."""
    student, base = run.texts.get("student", {}), run.texts.get("base", {})
    return [one for one in student if one in base and base[one].correct != student[one].correct]


def problems_of(run: Run) -> list[str]:
    """The ids of the problems that are shown, fewer where fewer were asked."""
    right = {problem: text.correct for problem, text in run.texts.get("student", {}).items()}
    wrong = [one for one in right if not right[one]]
    found: list[str] = []
    for kind in (differing(run), wrong, [one for one in right if right[one]], *[right] * SHOWN):
        found += [one for one in kind if one not in found][:1]
    return found[:SHOWN]


def written_blocks(run: Run) -> list[Block]:
    """What base, student and teacher wrote for these problems."""
    return [_wrote(run, problem) for problem in problems_of(run)]


def _wrote(run: Run, problem: str) -> Wrote:
    asked = run.texts["student"][problem]
    return Wrote(asked.prompt, asked.gold, list(_said(run, problem)))


def _said(run: Run, problem: str) -> Iterator[Said]:
    for model, label in MODELS.items():
        if text := run.texts.get(model, {}).get(problem):
            thinking, tag, answer = text.text.partition(THINK_END)
            nothing = f"(nothing after {THINK_END})" if tag else f"(no {THINK_END})"
            answer = shortened(answer.strip()) or nothing
            yield Said(model, label, verdict(text), shortened(thinking) + tag, answer)


def verdict(text: Generation) -> str:
    """ "right", "wrong" or "unfinished"."""
    if not text.finished:
        return "unfinished"
    return "right" if text.correct else "wrong"


def shortened(text: str) -> str:
    """A text without its middle where it is long: how it ends matters as much as how it begins."""
    if len(text) <= LONGEST:
        return text
    left_out = len(text) - LONGEST
    return f"{text[: LONGEST // 2]}\n[… {left_out:,} characters …]\n{text[-LONGEST // 2 :]}"


def try_it(run: Run) -> list[Block]:
    """The command that asks the student, where it lies in the run."""
    if not (run.folder / STUDENT).is_file():
        return []
    prompts = [run.texts["student"][problem].prompt for problem in problems_of(run)[:1]]
    return [Command(ask_command(run.folder, *prompts))]
