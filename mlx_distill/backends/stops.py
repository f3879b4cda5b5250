"""Where a model's texts end when it is scored.

In: a model folder and tokenizers. Out: token ids. Decided here: a text ends where anyone says so:
the model's two configs, the tokenizer, or its chat template; as in an exported student's folder.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from mlx_distill.backends.export import config_stop_ids
from mlx_distill.data.sequences import stop_ids
from mlx_distill.errors import ModelError
from mlx_distill.models.folder import read_config, read_generation_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def stops_of(folder: Path, *tokenizers: "PreTrainedTokenizerFast") -> frozenset[int]:
    """The ids after which a text of the model in `folder` ends."""
    said = config_stop_ids(read_config(folder), read_generation_config(folder))
    return frozenset(said).union(*map(_ends, tokenizers))


def _ends(tokenizer: "PreTrainedTokenizerFast") -> frozenset[int]:
    try:
        return stop_ids(tokenizer)
    except ModelError:  # a teacher without a chat template: prompts are rendered with the student's
        return frozenset({tokenizer.eos_token_id} - {None})
