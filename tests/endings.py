"""How runs of the tiny recipe end, and when two endings are the same: a helper of the tests that
stop runs.
"""

import json
from pathlib import Path

from safetensors.numpy import load_file

STUDENT = "mlx_distill.backends.mlx.student:MlxStudent"
TORCH_STUDENT = "mlx_distill.backends.torch.student:TorchStudent"
SHORT = ("eval.max_new_tokens=4", "eval.examples=3")
CUT = ("token_share=0.5", "span=cot", "ending=answer", "whole_share=0.3")
LORA = ("student.tuning=lora", "student.rank=2", "student.alpha=4.0")
LORA += ("student.quantize_bits=4",)  # of the one matrix a block that is wide enough
LORA += tuple(f"truncation.{setting}" for setting in CUT)
WRITES = ("rollouts.max_new_tokens=6", "rollouts.batch_size=5", "truncation.span=cot")
TEACHER_WRITES = ("rollouts.by=teacher", "rollouts.samples=2", "rollouts.share=0.6", *WRITES)
STUDENT_WRITES = ("rollouts.by=student", "rollouts.refresh_every=2", *WRITES)
MODES = {"full": SHORT, "lora": (*SHORT, *LORA), "torch": SHORT, "torch lora": (*SHORT, *LORA)}
MODES |= {"torch nf4": (*SHORT, *LORA, "student.quantize_bits=nf4")}
PATIENT = ("optim.patience=2", "run.validate_every=1", "optim.learning_rate=0.3", "eval.task=")
MODES |= {"patience": PATIENT, "torch patience": PATIENT}
MODES |= {
    "teacher writes": (*SHORT, *TEACHER_WRITES),
    "student writes": (*SHORT, *STUDENT_WRITES),
    "torch student writes": (*SHORT, *STUDENT_WRITES),
}
TIMES = {
    "seconds",
    "source_seconds",
    "tokens_per_second",
    "active_bytes",
    "cache_bytes",
    "peak_bytes",
    "footprint_bytes",
    "elapsed_seconds",
    "created",
    "git_commit",
    "starts",
}
TIMES |= {"sha256", "logs", "card"}  # digests of files that say how long each step or text took
TIMES |= {"digest"}  # of a written text, which says the same


def timeless(content):
    """Without what differs from run to run by nature: times, memory, the checkout's commit, how
    often it was started.
    """
    if isinstance(content, dict):
        return {key: timeless(value) for key, value in content.items() if key not in TIMES}
    return [timeless(value) for value in content] if isinstance(content, list) else content


def arrays(file: Path) -> dict:
    """Name → type and bytes: a file's own order of its arrays is of no account."""
    return {
        name: (array.dtype, array.shape, array.tobytes()) for name, array in load_file(file).items()
    }


def logged(folder: Path, log: str) -> list[dict]:
    """The lines of a log as they lie there."""
    return [json.loads(line) for line in (folder / log).read_text().splitlines()]


def ending(folder: Path) -> dict:
    """Everything a run folder says, but for times, memory and where it lies."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    found = {"files": list(map(str, files))}
    found |= {
        str(name): (folder / name).read_bytes()
        for name in files
        if name.parts[0] == "student" and name.name != "README.md"  # it says times and memory
    }
    found |= {
        str(name): arrays(folder / name)
        for name in files
        if name.parts[0] == "checkpoints" and name.suffix == ".safetensors"
    }
    found |= {
        str(name): timeless(json.loads((folder / name).read_text()))
        for name in files
        if name.suffix == ".json"
    }
    return found | {
        log: timeless(logged(folder, log))
        for log in ("metrics.jsonl", "validation.jsonl", "generations.jsonl", "rollouts.jsonl")
        if (folder / log).exists()
    }


def assert_same(folder: Path, expected: dict) -> None:
    found = ending(folder)
    assert found["files"] == expected["files"]
    assert [row["step"] for row in found["metrics.jsonl"]] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in found["validation.jsonl"]] == [0, 3, 6]
    assert {name for name in expected if found[name] != expected[name]} == set()


def arguments(recipe: Path, folder: Path, mode: str = "full") -> list[str]:
    sets = (f"run.folder={folder}", *MODES[mode])
    if mode.endswith("writes"):
        sets += (f"rollouts.folder={folder / 'rollouts'}",)
    backend = "torch" if mode.startswith("torch") else "mlx"
    return [
        "run",
        str(recipe),
        "--backend",
        backend,
        *(word for item in sets for word in ("--set", item)),
    ]
