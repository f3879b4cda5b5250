"""A seal inside of a JSON file of a run: the SHA-256 of all else in it, by which a changed digit is
noticed.

In: the content of a file. Out: the same with its seal, or whether the seal still holds. A file of
an older version has none, and is believed.
"""

import hashlib
import json
from typing import Any

from mlx_distill.readers import parse_json

SEAL = "sha256"


class BrokenSeal(ValueError):
    """A file has a seal that is not of what it holds."""


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content with its seal."""
    return content | {SEAL: _digest(content)}


def unsealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content without its seal; raises `BrokenSeal`."""
    rest = {name: value for name, value in content.items() if name != SEAL}
    if SEAL in content and content[SEAL] != _digest(rest):
        raise BrokenSeal
    return rest


def _digest(content: dict[str, Any]) -> str:
    """Of what a reader finds: text for every key, null for NaN."""
    read = parse_json(json.dumps(content), "")
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()
