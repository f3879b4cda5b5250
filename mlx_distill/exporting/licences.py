"""The licence of a model or of data, as far as it is known on this machine.

In: a name as a recipe has it. Out: what its own card says, "" where there is none. Decided here:
nothing is asked of a network, and nothing is guessed: a card lies beside local files, or came with
a download.
"""

from pathlib import Path

from mlx_distill.models.hub import HUB_ID
from mlx_distill.runs.own_files import CARD

EMBEDDED = "mit"  # mlx-distill's own


def licence_of(name: str, kind: str = "model") -> str:
    """`kind` is "model" or "dataset"."""
    if name.startswith("embedded:"):
        return EMBEDDED
    card = _card(name, kind)
    return _licence_in(card) if card else ""


def is_hub_id(name: str) -> bool:
    """Whether a name in a recipe is of the hub: it looks like it, and nothing here is called so."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _card(name: str, kind: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if is_hub_id(name):
        found = try_to_load_from_cache(name, CARD, repo_type=kind)
        return Path(found) if isinstance(found, str) else None
    path = Path(name).expanduser()
    card = (path if path.is_dir() else path.parent) / CARD
    return card if card.is_file() else None


def _licence_in(card: Path) -> str:
    """What the head of a card says; a card that cannot be read says nothing."""
    from huggingface_hub import metadata_load

    try:
        said = metadata_load(card) or {}
    except Exception:  # whatever a YAML parser makes of somebody's file
        return ""
    licence = said.get("license_name") or said.get("license")
    return licence if isinstance(licence, str) else ""
