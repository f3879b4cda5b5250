"""Public datasets by name: `data.source = "openthoughts"`.

In: the `[data]` table of a recipe. Out: the same table with what the named dataset needs: hub id,
config, split, format, columns, rows to keep. Decided here: the names (`NAMED`), and that a field
which a recipe sets itself stands. `NAME:FILE` reads rows of that layout from a file instead. Rows,
sizes and licences are what the hub's cards say; where a card says none, a dash stands.
"""

from dataclasses import dataclass, field
from typing import Any

from mlx_distill.recipe.tables import DataTable
from mlx_distill.words import DASH


@dataclass(frozen=True)
class NamedDataset:
    """A dataset of the hub: its id, the fields of `[data]` that read it, and what its card says."""

    id: str
    rows: str
    licence: str
    size: str = DASH
    fields: dict[str, Any] = field(default_factory=dict)


def _response(prompt: str, response: str, **others: Any) -> dict[str, Any]:
    columns = {"prompt_column": prompt, "response_column": response}
    return {"format": "response", **columns, **others}


CONVERSATIONS = {"format": "conversations"}
MESSAGES = {"format": "messages"}
S1K = {
    "format": "columns",
    "prompt_column": "question",
    "cot_column": "deepseek_thinking_trajectory",
    "answer_column": "deepseek_attempt",
}

NAMED = {
    "bespoke-stratos": NamedDataset(
        "bespokelabs/Bespoke-Stratos-17k", "16,710", "apache-2.0", fields=CONVERSATIONS
    ),
    "openthoughts": NamedDataset(
        "open-thoughts/OpenThoughts-114k", "113,957", "apache-2.0", fields=CONVERSATIONS
    ),
    "sky-t1": NamedDataset(
        "NovaSky-AI/Sky-T1_data_17k", "16.4k", "apache-2.0", fields=CONVERSATIONS
    ),
    "synthetic-1": NamedDataset(
        "PrimeIntellect/SYNTHETIC-1",
        "1,994,262",
        "apache-2.0",
        "26 GB",
        _response("prompt", "llm_response", where={"task_type": "verifiable_math"}),
    ),
    "nemotron": NamedDataset(
        "nvidia/Llama-Nemotron-Post-Training-Dataset",
        "about 22 M",
        "cc-by-4.0",
        fields=_response("input", "output", config="SFT", split="math", where={"reasoning": "on"}),
    ),
    "synthetic-2": NamedDataset(
        "PrimeIntellect/SYNTHETIC-2-SFT-verified", "105k", DASH, fields=MESSAGES
    ),
    "openthoughts3": NamedDataset(
        "open-thoughts/OpenThoughts3-1.2M", "1.2 M", "apache-2.0", "28 GB", CONVERSATIONS
    ),
    "openr1-math": NamedDataset(
        "open-r1/OpenR1-Math-220k", "93,733", "apache-2.0", fields=MESSAGES
    ),
    "mixture-of-thoughts": NamedDataset(
        "open-r1/Mixture-of-Thoughts", "349,317", DASH, fields=MESSAGES | {"config": "all"}
    ),
    "s1k": NamedDataset("simplescaling/s1K-1.1", "1,000", "mit", fields=S1K),
    "deepmath": NamedDataset(
        "zwhe99/DeepMath-103K", "103k", "mit", fields=_response("question", "r1_solution_1")
    ),
    "multilingual-thinking": NamedDataset(
        "HuggingFaceH4/Multilingual-Thinking", "1,000", "apache-2.0", fields=MESSAGES
    ),
    "gsm8k": NamedDataset(
        "openai/gsm8k", "7,473", "mit", fields={"format": "gsm8k", "config": "main"}
    ),
}
OF_THE_HUB = ("config", "split")  # what a file does not have


def resolved(data: DataTable) -> DataTable:
    """The table that reads a named dataset; any other table as it is."""
    name, _, file = data.source.partition(":")
    named = NAMED.get(name)
    if named is None:
        return data
    usual = {one: info.default for one, info in DataTable.model_fields.items()}
    chosen = {
        one: value
        for one, value in named.fields.items()
        if getattr(data, one) == usual[one] and not (file and one in OF_THE_HUB)
    }
    return data.model_copy(update={**chosen, "source": file or named.id})


def shown_datasets() -> list[list[str]]:
    """A row a dataset: its name, hub id, format, rows, size and licence."""
    return [
        [name, one.id, one.fields["format"], one.rows, one.size, one.licence]
        for name, one in NAMED.items()
    ]
