"""The fields of a run's `manifest.json` that later starts, sweeps and reports rely on, with their
types.

In: what was read. Out: what is wrong with it, in a few words. A manifest without a field is one of
an earlier stage or version; a field of another type is damage.
"""

from typing import Any

NUMBER = (int, float)
FIELDS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "recipe_digest": str,
    "backend": str,
    "device": str,
    "git_commit": str,
    "created": str,
    "prompt_date": str,
    "models": dict,
    "data": dict,
    "data_digest": str,
    "steps": int,
    "starts": list,
    "teacher_cache": str,
    "exported_step": int,
    "elapsed_seconds": NUMBER,
    "tokens_read": int,
    "loss_tokens": int,
    "flops": dict,
    "student_files": dict,
    "finished": bool,
}
INSIDE: dict[str, type | tuple[type, ...]] = {
    "models": dict,
    "starts": dict,
    "flops": NUMBER,
    "student_files": str,
}


def trouble(content: Any) -> str:
    """What is wrong with a manifest that was read, "" if nothing is."""
    if not isinstance(content, dict):
        return f"it holds {_words(content)}, expected an object"
    for name, kind in FIELDS.items():
        value = content.get(name)
        if name in content and not _is(value, kind):
            return f"its {name} is {_words(value)}"
        if name in INSIDE and value:
            inner = value.values() if isinstance(value, dict) else value
            wrong = [one for one in inner if not _is(one, INSIDE[name])]
            if wrong:
                return f"its {name} hold {_words(wrong[0])}"
    return ""


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _words(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
